// Ring: an io_uring as UringEngine uses it: requests go in as entries, results come out, and what
// the kernel can keep registered (files, memory) is.
//
// An entry without a request is the engine's armed read of its eventfd.
// Contract: one thread makes, uses and destroys the ring. A failure of io_uring_enter itself is
// sticky: error().
#pragma once

#ifdef OFFLOAD_HAVE_LIBURING

#include <liburing.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "io/io_engine.h"
#include "io/registered_memory.h"
#include "sys/at_fork.h"

namespace offload {

class Ring {
 public:
  Ring() = default;
  ~Ring();
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // Room for `requests` and the armed read. Registers `files`; a kernel that refuses that is used
  // without. Errors: see open_ring().
  Status open(unsigned requests, std::vector<int> files);
  // Lets go of the kernel's side and of registered memory's owners. REQUIRES: nothing in flight.
  void close();
  std::string describe() const;  // one line
  RegisteredMemory& memory() { return memory_; }

  // Write an entry for what is left of `request`, or the read of `nbytes` of an eventfd. False when
  // the kernel takes no entries at the moment.
  bool write(IoRequest* request);
  bool write_wake(int eventfd, void* into, unsigned nbytes);

  // Submits all entries and waits for `wait_for` completions. False when the kernel was busy or the
  // ring broke.
  bool enter(unsigned wait_for);
  bool has_unsubmitted() const { return !unsubmitted_.empty(); }
  const Status& error() const { return error_; }
  void fail(const Status& error) { error_ = error; }

  // Calls take(request or null, result) for every completion that is there; false when there is
  // none.
  template <typename Take>
  bool reap(Take take) {
    io_uring_cqe* cqe = nullptr;
    unsigned head = 0;
    unsigned count = 0;
    io_uring_for_each_cqe(&ring_, head, cqe) {
      ++count;
      take(static_cast<IoRequest*>(io_uring_cqe_get_data(cqe)), cqe->res);
    }
    io_uring_cq_advance(&ring_, count);
    return count > 0;
  }

  // The requests whose entries the kernel never took. REQUIRES: the ring broke.
  std::vector<IoRequest*> take_unsubmitted();

 private:
  io_uring_sqe* next_entry();  // null when there is none

  const OwnerProcess owner_;
  bool is_open_ = false;
  io_uring ring_ = {};
  std::vector<int> files_;  // registered, by index
  std::string files_note_;
  RegisteredMemory memory_;
  std::vector<IoRequest*> unsubmitted_;  // of entries the kernel has not taken, oldest first
  unsigned busy_ = 0;                    // refusals in a row
  Status error_;
};

}  // namespace offload

#endif  // OFFLOAD_HAVE_LIBURING
