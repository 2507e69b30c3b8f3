// WakeEvent: how other threads end the engine thread's wait in the kernel: an eventfd, of which a
// read is kept armed in the ring.
//
// Contract: signal() from any thread; arm(), is_armed() and took() from the ring's thread alone.
#pragma once

#ifdef OFFLOAD_HAVE_LIBURING

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>

#include "base/status.h"
#include "io/ring.h"
#include "sys/unique_fd.h"

namespace offload {

class WakeEvent {
 public:
  Status open() {
    fd_ = UniqueFd(::eventfd(0, EFD_CLOEXEC));
    return fd_.is_open() ? Status::ok() : Status::from_errno(errno, "eventfd", "");
  }

  // Ends the armed read. An eventfd refuses a write only at a count of 2^64 - 2, out of reach.
  Status signal() {
    const std::uint64_t one = 1;
    while (::write(fd_.get(), &one, sizeof(one)) != sizeof(one)) {
      if (errno != EINTR) return Status::from_errno(errno, "eventfd write", "");
    }
    return Status::ok();
  }

  // Tried again at the next call when the ring takes no entries at the moment.
  void arm(Ring& ring) {
    if (!armed_) armed_ = ring.write_wake(fd_.get(), &count_, sizeof(count_));
  }
  bool is_armed() const { return armed_; }

  // The completion of the armed read.
  Status took(int result) {
    armed_ = false;
    const int err = -result;
    if (err <= 0 || err == EINTR || err == EAGAIN) return Status::ok();
    return Status::from_errno(err, "eventfd read", "");
  }

 private:
  UniqueFd fd_;
  std::uint64_t count_ = 0;  // target of the armed read
  bool armed_ = false;
};

}  // namespace offload

#endif  // OFFLOAD_HAVE_LIBURING
