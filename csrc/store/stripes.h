// Stripes: the swap files of a store, one in each of its directories, each with an engine of its
// own, so that a slow disk holds up nothing but its own transfers.
//
// Blocks are spread in proportion to the files' rates:
//  1. reserve: space grows by share; what a directory cannot hold, the others take.
//  2. pick, for each block written: of the files with a free slot, the one that is least full for
//     its rate; but none whose waiting writes would take much longer than another's.
//
// Not thread-safe, but for Stripe::queued_bytes and the engines.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"
#include "io/io_engine.h"
#include "io/probe.h"
#include "store/slot_allocator.h"
#include "sys/file.h"

namespace offload {

struct Stripe {
  SwapFile file;
  std::unique_ptr<IoEngine> engine;
  std::string engine_reason;
  SlotAllocator slots;
  double rate = 1;      // bytes per second, or relative to the others
  bool full = false;    // a write found no space although it was reserved: no new versions here
  Status full_because;  // the error it got
  std::atomic<std::uint64_t> queued_bytes{0};  // of writes submitted and not complete
};

class Stripes {
 public:
  explicit Stripes(std::uint64_t block_bytes) : block_bytes_(block_bytes) {}

  // `rate` in any unit that all share, > 0.
  Status add(SwapFile file, EngineKind kind, const IoEngineOptions& options, double rate);

  std::size_t count() const { return stripes_.size(); }
  Stripe& operator[](std::size_t i) { return *stripes_[i]; }
  const Stripe& operator[](std::size_t i) const { return *stripes_[i]; }

  std::uint64_t slots() const;
  std::uint64_t free_slots() const;  // of files that take new versions

  // Space for `slots` in all, reserved in the filesystems. kNoSpace (path, needed, free) leaves
  // everything as it was.
  Status reserve(std::uint64_t slots);

  // Takes no new versions on file `i` any more; false when no other one has a free slot.
  bool set_full(std::size_t i, const Status& why);
  // Every file is tried again from now on.
  void clear_full();

  // Where a new version of a block goes. REQUIRES: free_slots() > 0.
  std::size_t pick() const;

 private:
  Status reserve_one(std::size_t i, std::uint64_t slots);
  Status undo(const std::vector<std::uint64_t>& former, const Status& why);

  const std::uint64_t block_bytes_;
  std::vector<std::unique_ptr<Stripe>> stripes_;
};

// `wanted` slots in all over files that have `former` and can have `most`, the additional ones in
// proportion to `rates`. Nothing when they cannot hold them.
std::optional<std::vector<std::uint64_t>> share_slots(std::uint64_t wanted,
                                                      const std::vector<std::uint64_t>& former,
                                                      const std::vector<std::uint64_t>& most,
                                                      const std::vector<double>& rates);

}  // namespace offload
