#include "io/request_queue.h"

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

void RequestQueue::push(IoRequest* request) {
  IoEngineAccess::moved(*request) = 0;
  IoEngineAccess::retries(*request) = 0;
  (request->priority == IoPriority::kDemand ? demand_ : background_).push(request);
}

IoRequest* RequestQueue::pop() {
  return demand_.empty() ? background_.pop() : demand_.pop();
}

Status validate_requests(const std::vector<IoRequest*>& requests) {
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
