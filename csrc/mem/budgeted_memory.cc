#include "mem/budgeted_memory.h"

#include <algorithm>
#include <utility>

#include "base/align.h"

namespace offload {

Status Budget::take(std::uint64_t nbytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (nbytes > limit_ - in_use_) {
    return Status::error(Code::kBudget, name_ + " budget of " + std::to_string(limit_) +
                                            " bytes: " + std::to_string(nbytes) +
                                            " bytes are needed, " +
                                            std::to_string(limit_ - in_use_) + " are free");
  }
  in_use_ += nbytes;
  return Status::ok();
}

void Budget::give_back(std::uint64_t nbytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  in_use_ -= nbytes;
}

std::uint64_t Budget::in_use() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return in_use_;
}

std::shared_ptr<BudgetedMemory> BudgetedMemory::wrap(std::shared_ptr<HostMemory> inner,
                                                     std::shared_ptr<Budget> budget) {
  return std::shared_ptr<BudgetedMemory>(new BudgetedMemory(std::move(inner), std::move(budget)));
}

Result<Block> BudgetedMemory::allocate_block(std::uint64_t nbytes) {
  const std::uint64_t need = block_bytes(nbytes);
  OFFLOAD_RETURN_IF_ERROR(budget_->take(need));
  Result<Block> block = MemoryWrapper::allocate_block(nbytes);
  if (!block.is_ok()) budget_->give_back(need);
  return block;
}

void BudgetedMemory::give_back(Block block) {
  const std::uint64_t nbytes = block.nbytes;
  MemoryWrapper::give_back(block);
  budget_->give_back(nbytes);
}

HostMemory::Usage BudgetedMemory::usage() const {
  Usage usage = MemoryWrapper::usage();
  const std::uint64_t limit = budget_->limit();
  const std::uint64_t room = (limit - budget_->in_use()) / kPageBytes * kPageBytes;
  usage.budget = std::min(usage.budget, limit);
  usage.largest_free = std::min(usage.largest_free, room);
  return usage;
}

}  // namespace offload
