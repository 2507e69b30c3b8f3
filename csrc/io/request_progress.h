// What a result code means for a request: the one function that both engines pass every result
// through, and the counters it feeds.
//
// IoMeter is thread-safe. The free functions touch only the request they are given, which the
// calling engine thread owns.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>

#include "base/status.h"
#include "io/io_engine.h"

namespace offload {

// The most that one syscall or ring entry is asked to move: Linux caps both just below 2 GiB.
inline constexpr std::size_t kMaxTransferBytes = std::size_t{1} << 30;

// EINTR/EAGAIN in a row without a byte moved after which a request fails with that errno rather
// than spin for ever.
inline constexpr unsigned kMaxRetries = 10'000;

class IoMeter {
 public:
  void started();
  void finished(bool ok);  // REQUIRES: a started() that was not finished yet
  void moved(IoOp op, std::size_t bytes, bool is_short);
  void retried();
  IoCounters snapshot() const;

 private:
  using Clock = std::chrono::steady_clock;

  mutable std::mutex mutex_;  // guards all below
  IoCounters counters_;
  std::uint64_t in_flight_ = 0;
  Clock::time_point busy_since_;  // while in_flight_ > 0
};

enum class Progress : std::uint8_t {
  kMore,    // issue what next_transfer_bytes() says, from moved() on
  kFailed,  // complete with the Status
  kDone,    // all bytes moved
};

// Whether its owner cancelled it, and what it then completes with.
bool is_cancelled(const IoRequest& request);
Status cancelled_error(const IoRequest& request);
// What a queued request completes with when its engine is closed.
Status closed_error();

// Bytes to ask for next.
std::size_t next_transfer_bytes(IoRequest& request);

// Takes `result` (bytes moved, or -errno) of a transfer of next_transfer_bytes() into the request;
// sets `status` when it returns kFailed.
Progress apply_result(IoRequest& request, std::int64_t result, IoMeter& meter, Status& status);

}  // namespace offload
