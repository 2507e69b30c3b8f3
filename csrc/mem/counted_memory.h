// CountedMemory: counts what passes through it: bytes in use, their peak, allocations granted.
//
// Thread-safe; usage() is consistent within its three counts.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>

#include "mem/memory_wrapper.h"

namespace offload {

class CountedMemory final : public MemoryWrapper {
 public:
  static std::shared_ptr<CountedMemory> wrap(std::shared_ptr<HostMemory> inner);

  Result<Block> allocate_block(std::uint64_t nbytes) override;
  void give_back(Block block) override;
  // in_use, peak and allocations are those of this wrapper.
  Usage usage() const override;

 private:
  explicit CountedMemory(std::shared_ptr<HostMemory> inner) : MemoryWrapper(std::move(inner)) {}

  mutable std::mutex mutex_;  // guards all below
  std::uint64_t in_use_ = 0;
  std::uint64_t peak_ = 0;
  std::uint64_t allocations_ = 0;
};

}  // namespace offload
