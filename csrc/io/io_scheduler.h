// IoScheduler: the requests that wait for a place, and which of them is next.
//
// Demand goes ahead of background. Within a priority:
//  - mixed (phase_bytes == 0): in the order of submission.
//  - in phases, for disks on which reads and writes at once are slower than in turns: only one
//    direction is in flight at a time, in the order of submission. The other one has its turn when
//      a. nothing waits in this one, or
//      b. phase_bytes of this one were started, or
//      c. a demand request waits there and none here,
//    and what is in flight has finished.
//
// Contract: intrusive lists; no operation allocates. A request is in one list at a time. Not
// thread-safe: its engine's mutex guards it.
#pragma once

#include <cstdint>
#include <span>

#include "base/status.h"
#include "io/io_engine.h"

namespace offload {

// First in, first out.
class RequestList {
 public:
  bool empty() const { return head_ == nullptr; }
  const IoRequest* front() const { return head_; }  // null when empty
  IoRequest* front() { return head_; }
  void push(IoRequest* request);
  IoRequest* pop();  // null when empty

 private:
  IoRequest* head_ = nullptr;
  IoRequest* tail_ = nullptr;  // meaningful when head_ is not null
};

class IoScheduler {
 public:
  explicit IoScheduler(std::uint64_t phase_bytes) : phase_bytes_(phase_bytes) {}

  bool empty() const;                       // nothing waits
  bool can_start() const;                   // next() would return a request
  void push(IoRequest* request);            // also forgets the progress of an earlier use
  IoRequest* next();                        // to be started now; null when none may be
  IoRequest* upcoming();                    // likely next; it stays. Null when none waits
  void finished(const IoRequest& request);  // one that next() returned
  IoRequest* cancel_one();                  // any that waits, never to be started; null when none

 private:
  struct Choice {
    bool found = false;
    IoPriority priority = IoPriority::kDemand;
    IoOp op = IoOp::kRead;
  };
  Choice choose() const;
  IoOp choose_direction(IoPriority priority) const;
  const RequestList& list(IoPriority priority, IoOp op) const {
    return lists_[static_cast<int>(priority)][static_cast<int>(op)];
  }
  RequestList& list(IoPriority priority, IoOp op) {
    return lists_[static_cast<int>(priority)][static_cast<int>(op)];
  }
  bool waits(IoPriority priority, IoOp op) const { return !list(priority, op).empty(); }

  const std::uint64_t phase_bytes_;
  RequestList lists_[2][2];          // by priority, direction
  std::uint64_t in_flight_[2] = {};  // by direction
  std::uint64_t next_ticket_ = 0;
  IoOp phase_ = IoOp::kRead;            // the direction that has its turn
  std::uint64_t started_in_phase_ = 0;  // bytes
};

// kInvalid when a request of the batch breaks what io_engine.h requires of it.
Status validate_requests(std::span<IoRequest* const> requests);
// kInvalid when an option is out of its range.
Status validate_options(const IoEngineOptions& options);

}  // namespace offload
