#include "stream/transfer.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace offload {

Result<std::shared_ptr<Transfer>> Transfer::start(SwapStore& store, IoOp op, ObjectId object,
                                                  std::shared_ptr<Lease> lease,
                                                  std::uint64_t nbytes, std::span<const Span> spans,
                                                  IoPriority priority) {
  if (nbytes > lease->nbytes()) {
    return Status::error(Code::kInvalid, "a transfer of " + std::to_string(nbytes) +
                                             " bytes does not fit a lease of " +
                                             std::to_string(lease->nbytes()));
  }
  const Result<std::uint64_t> size = store.nbytes(object);
  if (!size.is_ok()) return size.status();
  if (size.value() != nbytes) {
    return Status::error(Code::kInvalid, "a transfer of " + std::to_string(nbytes) +
                                             " bytes is not the whole of a swap object of " +
                                             std::to_string(size.value()));
  }
  std::vector<SwapStore::Range> ranges;
  ranges.reserve(spans.size());
  for (const Span& span : spans) {
    if (span.begin >= span.end || span.end > nbytes) {
      return Status::error(Code::kInvalid,
                           "[" + std::to_string(span.begin) + ", " + std::to_string(span.end) +
                               ") is no part of a swap object of " + std::to_string(nbytes));
    }
    ranges.push_back({object, span.begin, lease->data() + span.begin, span.end - span.begin});
  }
  auto transfer = std::make_shared<Transfer>();
  const std::atomic<bool>* cancelled = &transfer->cancelled_;
  auto done = [transfer, lease = std::move(lease)](const Status& status) mutable {
    lease.reset();
    transfer->finish(status);
  };
  OFFLOAD_RETURN_IF_ERROR(op == IoOp::kWrite
                              ? store.write(ranges, priority, std::move(done), cancelled)
                              : store.read(ranges, priority, std::move(done), cancelled));
  return transfer;
}

Result<std::shared_ptr<Transfer>> Transfer::write(SwapStore& store, ObjectId object,
                                                  std::shared_ptr<Lease> lease,
                                                  std::uint64_t nbytes, IoPriority priority) {
  const Span whole{0, nbytes};
  return start(store, IoOp::kWrite, object, std::move(lease), nbytes, {&whole, 1}, priority);
}

Result<std::shared_ptr<Transfer>> Transfer::read(SwapStore& store, ObjectId object,
                                                 std::shared_ptr<Lease> lease, std::uint64_t nbytes,
                                                 IoPriority priority) {
  const Span whole{0, nbytes};
  return start(store, IoOp::kRead, object, std::move(lease), nbytes, {&whole, 1}, priority);
}

Result<std::shared_ptr<Transfer>> Transfer::read_blocks(SwapStore& store, ObjectId object,
                                                        std::shared_ptr<Lease> lease,
                                                        std::uint64_t nbytes,
                                                        std::span<const Span> spans,
                                                        IoPriority priority) {
  return start(store, IoOp::kRead, object, std::move(lease), nbytes, spans, priority);
}

template <typename Read>
Result<std::shared_ptr<Transfer>> Transfer::from_files(const FileRanges& ranges,
                                                       std::shared_ptr<Lease> lease, Read read) {
  if (ranges.buffer_bytes() > lease->nbytes()) {
    return Status::error(Code::kInvalid,
                         "ranges of files of " + std::to_string(ranges.buffer_bytes()) +
                             " bytes do not fit a lease of " + std::to_string(lease->nbytes()));
  }
  auto transfer = std::make_shared<Transfer>();
  std::byte* const buffer = lease->data();
  auto done = [transfer, lease = std::move(lease)](const Status& status) mutable {
    lease.reset();
    transfer->finish(status);
  };
  OFFLOAD_RETURN_IF_ERROR(read(buffer, std::move(done), &transfer->cancelled_));
  return transfer;
}

Result<std::shared_ptr<Transfer>> Transfer::read(FileRanges& ranges, std::shared_ptr<Lease> lease,
                                                 IoPriority priority) {
  return from_files(ranges, std::move(lease), [&](std::byte* buffer, auto done, auto* cancel) {
    return ranges.read(buffer, priority, std::move(done), cancel);
  });
}

Result<std::shared_ptr<Transfer>> Transfer::read_blocks(FileRanges& ranges,
                                                        std::shared_ptr<Lease> lease,
                                                        std::span<const Span> spans,
                                                        IoPriority priority) {
  return from_files(ranges, std::move(lease), [&](std::byte* buffer, auto done, auto* cancel) {
    return ranges.read_blocks(buffer, spans, priority, std::move(done), cancel);
  });
}

Prerequisites Transfer::prerequisites() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return after_;
}

void Transfer::await_prerequisites() const {
  constexpr unsigned kLookMs = 1000;
  for (const std::shared_ptr<Prerequisite>& one : prerequisites()) {
    while (!one->await(kLookMs)) {
    }
  }
}

Status Transfer::wait() {
  await_prerequisites();
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return done_; });
  return status_;
}

bool Transfer::wait_for(unsigned milliseconds) const {
  using std::chrono::steady_clock;
  const auto deadline = steady_clock::now() + std::chrono::milliseconds(milliseconds);
  for (const std::shared_ptr<Prerequisite>& one : prerequisites()) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - steady_clock::now());
    if (!one->await(static_cast<unsigned>(std::max<std::int64_t>(left.count(), 0)))) return done();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  return changed_.wait_for(lock, deadline - steady_clock::now(), [this] { return done_; });
}

void Transfer::follow(Prerequisites after) {
  const std::lock_guard<std::mutex> lock(mutex_);
  after_ = std::move(after);
}

void Transfer::finish(const Status& status) {
  Prerequisites after;  // goes without the lock
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    after.swap(after_);
  }
  after.clear();
  end(status);
}

}  // namespace offload
