#include "io/io_scheduler.h"

#include <cstdint>
#include <limits>
#include <string>

namespace offload {

void RequestList::push(IoRequest* request) {
  IoEngineAccess::next(*request) = nullptr;
  if (head_ == nullptr) {
    head_ = request;
  } else {
    IoEngineAccess::next(*tail_) = request;
  }
  tail_ = request;
}

IoRequest* RequestList::pop() {
  IoRequest* request = head_;
  if (request != nullptr) head_ = IoEngineAccess::next(*request);
  return request;
}

namespace {

IoOp other(IoOp op) {
  return op == IoOp::kRead ? IoOp::kWrite : IoOp::kRead;
}

}  // namespace

bool IoScheduler::empty() const {
  for (const auto& by_priority : lists_) {
    for (const RequestList& list : by_priority) {
      if (!list.empty()) return false;
    }
  }
  return true;
}

void IoScheduler::push(IoRequest* request) {
  IoEngineAccess::moved(*request) = 0;
  IoEngineAccess::retries(*request) = 0;
  IoEngineAccess::ticket(*request) = next_ticket_++;
  list(request->priority, request->op).push(request);
}

IoOp IoScheduler::choose_direction(IoPriority priority) const {
  if (!waits(priority, IoOp::kRead)) return IoOp::kWrite;
  if (!waits(priority, IoOp::kWrite)) return IoOp::kRead;
  if (phase_bytes_ == 0) {
    const std::uint64_t read = IoEngineAccess::ticket(list(priority, IoOp::kRead).front());
    const std::uint64_t write = IoEngineAccess::ticket(list(priority, IoOp::kWrite).front());
    return read < write ? IoOp::kRead : IoOp::kWrite;
  }
  return started_in_phase_ < phase_bytes_ ? phase_ : other(phase_);
}

IoScheduler::Choice IoScheduler::choose() const {
  for (const IoPriority priority : {IoPriority::kDemand, IoPriority::kBackground}) {
    if (!waits(priority, IoOp::kRead) && !waits(priority, IoOp::kWrite)) continue;
    const IoOp op = choose_direction(priority);
    // The turn passes only when what is in flight has finished; until then nothing starts.
    const bool must_wait = phase_bytes_ != 0 && in_flight_[static_cast<int>(other(op))] > 0;
    return {!must_wait, priority, op};
  }
  return {};
}

bool IoScheduler::can_start() const {
  return choose().found;
}

IoRequest* IoScheduler::next() {
  const Choice choice = choose();
  if (!choice.found) return nullptr;
  if (choice.op != phase_) {
    phase_ = choice.op;
    started_in_phase_ = 0;
  }
  IoRequest* request = list(choice.priority, choice.op).pop();
  started_in_phase_ += request->nbytes;
  ++in_flight_[static_cast<int>(choice.op)];
  return request;
}

IoRequest* IoScheduler::upcoming() {
  const Choice choice = choose();
  return list(choice.priority, choice.op).front();
}

void IoScheduler::finished(const IoRequest& request) {
  --in_flight_[static_cast<int>(request.op)];
}

IoRequest* IoScheduler::cancel_one() {
  for (auto& by_priority : lists_) {
    for (RequestList& list : by_priority) {
      if (IoRequest* request = list.pop(); request != nullptr) return request;
    }
  }
  return nullptr;
}

Status validate_requests(std::span<IoRequest* const> requests) {
  constexpr auto kMaxEnd = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  for (const IoRequest* request : requests) {
    if (request == nullptr) return Status::error(Code::kInvalid, "submit: null request");
    if (request->fd < 0 || request->buffer == nullptr || request->nbytes == 0) {
      return Status::error(Code::kInvalid, "submit: request without a file, a buffer or bytes");
    }
    if (request->nbytes > kMaxEnd || request->offset > kMaxEnd - request->nbytes) {
      return Status::error(Code::kInvalid, "submit: request ends beyond the largest file offset");
    }
  }
  return Status::ok();
}

Status validate_options(const IoEngineOptions& options) {
  if (options.queue_depth < 1 || options.queue_depth > IoEngineOptions::kMaxQueueDepth) {
    return Status::error(Code::kInvalid, "queue_depth " + std::to_string(options.queue_depth) +
                                             " is not within 1 to " +
                                             std::to_string(IoEngineOptions::kMaxQueueDepth));
  }
  if (options.threads < 1 || options.threads > IoEngineOptions::kMaxThreads) {
    return Status::error(Code::kInvalid, "threads " + std::to_string(options.threads) +
                                             " is not within 1 to " +
                                             std::to_string(IoEngineOptions::kMaxThreads));
  }
  return Status::ok();
}

}  // namespace offload
