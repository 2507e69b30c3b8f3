// HostMemory: where every lease of host memory comes from, and Lease, the right to use some.
//
// Contract: a block is page aligned and sized to whole pages, nothing is rounded further. HostArena
// is the memory itself; budgets, counters, poison and faults are each a class that wraps another
// HostMemory (memory_wrapper.h) and may be stacked in any order. Whatever fails leaves every layer
// as it was.
//
// Thread-safe. A Lease keeps the memory it came from alive, wrappers included. REQUIRES: owned by a
// std::shared_ptr.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "base/align.h"
#include "base/status.h"

namespace offload {

// The size of the block that a request for `nbytes` gets. The few sizes above what any address
// space holds are not rounded: that would wrap around.
constexpr std::uint64_t block_bytes(std::uint64_t nbytes) {
  return nbytes > ~std::uint64_t{0} - kPageBytes ? nbytes : align_up(nbytes, kPageBytes);
}

struct Block {
  std::byte* data = nullptr;
  std::uint64_t nbytes = 0;
};

class Lease;

class HostMemory : public std::enable_shared_from_this<HostMemory> {
 public:
  // In bytes, but for `allocations`. Each layer fills in what it knows or narrows what is below it.
  struct Usage {
    std::uint64_t budget = 0;  // the tightest limit: an arena's size, or a Budget's
    std::uint64_t in_use = 0;
    std::uint64_t committed = 0;     // what the process is charged for
    std::uint64_t largest_free = 0;  // the longest block that can be had now
    std::uint64_t peak = 0;          // the most ever in use at once; 0 where nothing counts
    std::uint64_t allocations = 0;   // granted so far; 0 where nothing counts
  };

  virtual ~HostMemory() = default;
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  // A lease of block_bytes(nbytes) bytes. kInvalid when `nbytes` is 0, kBudget when a limit leaves
  // no room for it, kNoMemory when the system refuses the pages.
  Result<Lease> allocate(std::uint64_t nbytes);

  // As allocate(), without an owner: for wrappers.
  virtual Result<Block> allocate_block(std::uint64_t nbytes) = 0;
  // REQUIRES: `block` came from this object's allocate_block() and was not given back yet.
  virtual void give_back(Block block) = 0;

  virtual Usage usage() const = 0;

  // The reserved range of addresses that every block lies in, and its size; constant. Pages that
  // were never part of a block may be inaccessible.
  virtual std::byte* base() const = 0;
  virtual std::uint64_t capacity() const = 0;
  // Where registered ranges end: at multiples of this from base(), or at the end of what is
  // committed. No device copy may go across (memory_registrar.h).
  virtual std::uint64_t commit_step() const = 0;
  // What could not be had and was done without, for people; empty when there was nothing.
  virtual const std::string& note() const = 0;

 protected:
  HostMemory() = default;
};

// The right to use `nbytes()` bytes at `data()`; given back when destroyed. Not thread-safe itself.
class Lease {
 public:
  Lease() = default;
  Lease(Lease&& other) noexcept;
  Lease& operator=(Lease&& other) noexcept;
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  ~Lease();

  std::byte* data() const { return block_.data; }
  std::size_t nbytes() const { return block_.nbytes; }
  bool empty() const { return block_.data == nullptr; }
  void release();

 private:
  friend class HostMemory;
  Lease(std::shared_ptr<HostMemory> memory, Block block)
      : memory_(std::move(memory)), block_(block) {}

  std::shared_ptr<HostMemory> memory_;
  Block block_;
};

}  // namespace offload
