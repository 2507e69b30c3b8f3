#include "store/bounce_pool.h"

#include <utility>

namespace offload {

BouncePool::BouncePool(Lease memory, std::size_t buffers, std::uint64_t block_bytes)
    : memory_(std::move(memory)), buffers_(buffers) {
  free_.reserve(buffers);
  for (std::size_t i = 0; i < buffers; ++i) free_.push_back(memory_.data() + i * block_bytes);
}

Result<std::unique_ptr<BouncePool>> BouncePool::create(std::size_t buffers,
                                                       std::uint64_t block_bytes) {
  Result<std::shared_ptr<HostArena>> arena = HostArena::create(buffers * block_bytes);
  if (!arena.is_ok()) return arena.status().with_context("buffers for encrypted swap");
  Result<Lease> memory = arena.value()->allocate(buffers * block_bytes);
  if (!memory.is_ok()) return memory.status().with_context("buffers for encrypted swap");
  return std::unique_ptr<BouncePool>(new BouncePool(memory.take(), buffers, block_bytes));
}

std::byte* BouncePool::take() {
  std::lock_guard lock(mutex_);
  if (free_.empty()) return nullptr;
  std::byte* buffer = free_.back();
  free_.pop_back();
  return buffer;
}

void BouncePool::give_back(std::byte* buffer) {
  std::lock_guard lock(mutex_);
  free_.push_back(buffer);
}

}  // namespace offload
