// RequestQueue: the requests that wait for a place, demand ahead of background, each priority in
// order of submission.
//
// Contract: an intrusive list; no operation allocates. A request is in one list at a time. Not
// thread-safe: its engine's mutex guards it.
#pragma once

#include <vector>

#include "base/status.h"
#include "io/io_engine.h"

namespace offload {

// First in, first out.
class RequestList {
 public:
  bool empty() const { return head_ == nullptr; }
  void push(IoRequest* request);
  IoRequest* pop();  // null when empty

 private:
  IoRequest* head_ = nullptr;
  IoRequest* tail_ = nullptr;  // meaningful when head_ is not null
};

class RequestQueue {
 public:
  bool empty() const { return demand_.empty() && background_.empty(); }
  void push(IoRequest* request);  // also forgets the progress of an earlier use
  IoRequest* pop();               // the next to start; null when empty

 private:
  RequestList demand_;
  RequestList background_;
};

// kInvalid when a request of the batch breaks what io_engine.h requires of it.
Status validate_requests(const std::vector<IoRequest*>& requests);
// kInvalid when an option is out of its range.
Status validate_options(const IoEngineOptions& options);

}  // namespace offload
