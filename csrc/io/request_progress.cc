#include "io/request_progress.h"

#include <algorithm>
#include <cerrno>
#include <string>

namespace offload {

IoCounters& IoCounters::operator+=(const IoCounters& other) {
  bytes_read += other.bytes_read;
  bytes_written += other.bytes_written;
  requests += other.requests;
  continued += other.continued;
  retried += other.retried;
  failed += other.failed;
  busy_ns += other.busy_ns;
  return *this;
}

void IoMeter::started() {
  std::lock_guard lock(mutex_);
  if (in_flight_++ == 0) busy_since_ = Clock::now();
}

void IoMeter::finished(bool ok) {
  std::lock_guard lock(mutex_);
  ++counters_.requests;
  if (!ok) ++counters_.failed;
  if (--in_flight_ == 0) {
    counters_.busy_ns += std::chrono::nanoseconds(Clock::now() - busy_since_).count();
  }
}

void IoMeter::moved(IoOp op, std::size_t bytes, bool is_short) {
  std::lock_guard lock(mutex_);
  (op == IoOp::kRead ? counters_.bytes_read : counters_.bytes_written) += bytes;
  if (is_short) ++counters_.continued;
}

void IoMeter::retried() {
  std::lock_guard lock(mutex_);
  ++counters_.retried;
}

IoCounters IoMeter::snapshot() const {
  std::lock_guard lock(mutex_);
  IoCounters counters = counters_;
  if (in_flight_ > 0) {
    counters.busy_ns += std::chrono::nanoseconds(Clock::now() - busy_since_).count();
  }
  return counters;
}

bool is_cancelled(const IoRequest& request) {
  return request.cancel != nullptr && request.cancel->load(std::memory_order_acquire);
}

Status cancelled_error(const IoRequest& request) {
  return Status::error(Code::kCancelled, std::string("the ") +
                                             (request.op == IoOp::kRead ? "read" : "write") +
                                             " was cancelled before it started");
}

Status closed_error() {
  return Status::error(Code::kClosed, "the I/O engine was closed");
}

std::size_t next_transfer_bytes(IoRequest& request) {
  return std::min(request.nbytes - IoEngineAccess::moved(request), kMaxTransferBytes);
}

Progress apply_result(IoRequest& request, std::int64_t result, IoMeter& meter, Status& status) {
  const char* op = request.op == IoOp::kRead ? "read" : "write";
  std::size_t& moved = IoEngineAccess::moved(request);
  unsigned& retries = IoEngineAccess::retries(request);
  const auto at = static_cast<std::int64_t>(request.offset + moved);

  if (result == -EINTR || result == -EAGAIN) {
    if (++retries <= kMaxRetries) {
      meter.retried();
      return Progress::kMore;
    }
    status = Status::from_errno(static_cast<int>(-result), op, request.path, at)
                 .with_context("gave up after " + std::to_string(kMaxRetries) + " retries");
    return Progress::kFailed;
  }
  if (result < 0) {
    status = Status::from_errno(static_cast<int>(-result), op, request.path, at);
    return Progress::kFailed;
  }
  if (result == 0) {
    status = request.op == IoOp::kRead
                 ? Status::error(Code::kCorrupt,
                                 "read " + std::string(request.path) +
                                     ": the file ends at offset " + std::to_string(at) + ", " +
                                     std::to_string(request.nbytes - moved) + " bytes too early")
                 : Status::from_errno(EIO, op, request.path, at)
                       .with_context("the kernel accepted no bytes");
    return Progress::kFailed;
  }
  const auto bytes = static_cast<std::size_t>(result);
  const std::size_t asked = next_transfer_bytes(request);
  moved += bytes;
  retries = 0;
  meter.moved(request.op, bytes, bytes < asked);
  return moved < request.nbytes ? Progress::kMore : Progress::kDone;
}

}  // namespace offload
