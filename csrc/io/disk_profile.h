// DiskProfile: how fast a disk reads, writes and does both at once, measured.
//
// How measure_disk goes about it:
//  1. A region of the file is reserved and written once, so that no read meets a hole and no timed
//     write allocates. A disk too slow to fill it in a seventh of the time gets a smaller one.
//  2. Six phases of a seventh each keep queue_depth requests of block_bytes in flight, through the
//     engine: write, read, mixed, mixed, read, write. In that order a rate that drifts steadily
//     has the same mean in each kind. Mixed: every second request is a read, so that as many bytes
//     go either way; reads and writes each have a half of the region.
//  3. Of each phase its beginning is left out. A disk that has finished few requests when a phase
//     is over gets more time.
// The bytes are random, since some disks and filesystems compress. Direct I/O only: what the page
// cache or a filesystem in memory can do says nothing of a disk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "base/status.h"
#include "io/io_engine.h"
#include "sys/file.h"

namespace offload {

struct DiskProfile {
  bool measured = false;
  std::string reason;    // why it was not measured; empty when it was
  double read_bps = 0;   // bytes per second, nothing else going on
  double write_bps = 0;  // likewise
  double mixed_bps = 0;  // of both directions together
  bool phases = false;   // mixing is more than 10% slower than taking turns: turns_bps()

  // Of both directions together, as many bytes each way, one direction at a time.
  double turns_bps() const { return 2 / (1 / read_bps + 1 / write_bps); }
};

struct DiskProfileOptions {
  static constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

  double seconds = 2.0;                     // in all, on a disk that is not slow
  std::uint64_t region_bytes = 256 * kMiB;  // at least kLeastRegionBytes and queue_depth blocks
  std::size_t block_bytes = kMiB;           // whole pages, up to kMostBlockBytes
  unsigned queue_depth = 16;                // up to kMostQueueDepth

  static constexpr std::uint64_t kLeastRegionBytes = 16 * kMiB;
  static constexpr std::size_t kMostBlockBytes = 8 * kMiB;
  static constexpr unsigned kMostQueueDepth = 256;
};

// Overwrites the beginning of `file`, and makes it longer where need be: meant for a scratch file
// of its own. `engine` must mix directions (phase_bytes == 0) and should have nothing else to do.
// Takes queue_depth * block_bytes of memory while it runs. Blocks; any one thread may call it.
// Not measured, with a reason: the file is buffered or in memory. kNoSpace: the least region does
// not fit into half of what is free; kInvalid: an option is out of its range; else the Status of
// the first request that failed, when all of them have ended.
Result<DiskProfile> measure_disk(SwapFile& file, IoEngine& engine,
                                 const DiskProfileOptions& options = {});

// The region to use of `free_bytes`: at most half of them, whole blocks. 0: too little is free.
std::uint64_t profile_region(std::uint64_t free_bytes, const DiskProfileOptions& options);

}  // namespace offload
