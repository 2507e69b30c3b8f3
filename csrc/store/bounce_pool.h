// BouncePool: page-aligned buffers of one block each, for what must not be written from where it
// lies: the ciphertext of a block that its owner still reads.
//
// Contract: buffers() of them, made at once; take() never allocates. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "base/status.h"
#include "mem/host_arena.h"

namespace offload {

class BouncePool {
 public:
  static Result<std::unique_ptr<BouncePool>> create(std::size_t buffers, std::uint64_t block_bytes);

  // Null when all are out.
  std::byte* take();
  void give_back(std::byte* buffer);

  std::size_t buffers() const { return buffers_; }
  const Lease& memory() const { return memory_; }

 private:
  BouncePool(Lease memory, std::size_t buffers, std::uint64_t block_bytes);

  const Lease memory_;
  const std::size_t buffers_;
  std::mutex mutex_;
  std::vector<std::byte*> free_;  // guarded by mutex_
};

}  // namespace offload
