// SimulatedDevice: a device without one. Its memory is a range of the host's, its copy streams are
// queues, its compute stream is the caller's own thread.
//
// It keeps CUDA's rules and is as unkind as they allow:
//  1. work of a copy stream is done in order, and a wait in it holds up what is behind.
//  2. the destination of a copy is filled with 0xFF (NaN) as soon as the copy may start, and the
//     source is read only when the copy ends. What reads too early sees poison; what overwrites a
//     source too early is copied.
//  3. when it ends, `pace` says: kTimed after `delay_s` and at `bytes_per_s`, by a thread for each
//     stream; kEarliest as it is submitted, so that what had to wait for an earlier use of the
//     destination shows; kLatest not before somebody who may waits for it, so that what had to wait
//     for the copy shows. kEarliest and kLatest start no thread and are deterministic.
//  4. host memory must be registered, and a copy that goes from one registered range into the next
//     is refused, as CUDA does.
//
// Thread-safe.
#pragma once

#include <cstdint>
#include <memory>

#include "base/status.h"
#include "device/device.h"

namespace offload {

struct SimulatedDeviceOptions {
  enum class Pace : std::uint8_t { kTimed, kEarliest, kLatest };

  std::uint64_t memory_bytes = 0;
  Pace pace = Pace::kTimed;
  double delay_s = 0;      // of each copy
  double bytes_per_s = 0;  // of each stream; 0: as fast as the memory is
  bool check = true;       // with an OrderChecker
  bool unified = false;    // its memory is the host's, where that is registered
};

// kInvalid when a number makes no sense; kOsError or kNoMemory when there can be no more threads.
Result<std::shared_ptr<Device>> make_simulated_device(const SimulatedDeviceOptions& options);

}  // namespace offload
