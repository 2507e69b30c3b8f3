#include "mem/counted_memory.h"

#include <algorithm>

namespace offload {

std::shared_ptr<CountedMemory> CountedMemory::wrap(std::shared_ptr<HostMemory> inner) {
  return std::shared_ptr<CountedMemory>(new CountedMemory(std::move(inner)));
}

Result<Block> CountedMemory::allocate_block(std::uint64_t nbytes) {
  Result<Block> block = MemoryWrapper::allocate_block(nbytes);
  if (!block.is_ok()) return block;
  std::lock_guard<std::mutex> lock(mutex_);
  in_use_ += block.value().nbytes;
  peak_ = std::max(peak_, in_use_);
  ++allocations_;
  return block;
}

void CountedMemory::give_back(Block block) {
  {
    // First, so that memory which another thread gets at once is never counted twice.
    std::lock_guard<std::mutex> lock(mutex_);
    in_use_ -= block.nbytes;
  }
  MemoryWrapper::give_back(block);
}

HostMemory::Usage CountedMemory::usage() const {
  Usage usage = MemoryWrapper::usage();
  std::lock_guard<std::mutex> lock(mutex_);
  usage.in_use = in_use_;
  usage.peak = peak_;
  usage.allocations = allocations_;
  return usage;
}

}  // namespace offload
