// Budget, a hard limit in bytes that several memories may share, and BudgetedMemory, which obeys
// one.
//
// Thread-safe. Bytes are taken from the budget before memory is allocated and returned after it was
// given back, so the limit holds at every moment.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "base/status.h"
#include "mem/memory_wrapper.h"

namespace offload {

class Budget {
 public:
  // `name` is for messages: "host".
  Budget(std::string name, std::uint64_t limit) : name_(std::move(name)), limit_(limit) {}

  // kBudget with limit, needed and free when `nbytes` more would exceed the limit.
  Status take(std::uint64_t nbytes);
  // REQUIRES: `nbytes` were taken.
  void give_back(std::uint64_t nbytes);

  std::uint64_t limit() const { return limit_; }
  std::uint64_t in_use() const;

 private:
  const std::string name_;
  const std::uint64_t limit_;
  mutable std::mutex mutex_;
  std::uint64_t in_use_ = 0;  // guarded by mutex_
};

class BudgetedMemory final : public MemoryWrapper {
 public:
  static std::shared_ptr<BudgetedMemory> wrap(std::shared_ptr<HostMemory> inner,
                                              std::shared_ptr<Budget> budget);

  Result<Block> allocate_block(std::uint64_t nbytes) override;
  void give_back(Block block) override;
  Usage usage() const override;

 private:
  BudgetedMemory(std::shared_ptr<HostMemory> inner, std::shared_ptr<Budget> budget)
      : MemoryWrapper(std::move(inner)), budget_(std::move(budget)) {}

  const std::shared_ptr<Budget> budget_;
};

}  // namespace offload
