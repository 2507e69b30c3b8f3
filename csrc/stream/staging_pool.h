// StagingPool: the memory that chunks of updates pass through, in blocks of the swap store.
//
// Last in, first out: what was used last is still in a cache, and of a pool that is larger than
// needed only a part is ever touched. Not thread-safe: the pipeline's mutex guards it. The pool
// owns the memory; REQUIRES: blocks come back before it goes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "mem/host_memory.h"

namespace offload {

class StagingPool {
 public:
  StagingPool() = default;
  StagingPool(Lease memory, std::uint64_t block_bytes)
      : memory_(std::move(memory)), blocks_(memory_.nbytes() / block_bytes) {
    free_.reserve(blocks_);
    for (std::size_t i = blocks_; i > 0; --i) {
      free_.push_back(memory_.data() + (i - 1) * block_bytes);
    }
  }

  std::size_t blocks() const { return blocks_; }
  std::size_t free_blocks() const { return free_.size(); }

  // REQUIRES: one is free. A chunk takes all that it needs at once, or waits without any.
  std::byte* take() {
    std::byte* block = free_.back();
    free_.pop_back();
    return block;
  }
  void give_back(std::byte* block) { free_.push_back(block); }

 private:
  Lease memory_;
  std::size_t blocks_ = 0;
  std::vector<std::byte*> free_;
};

}  // namespace offload
