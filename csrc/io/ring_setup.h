// Making an io_uring that has what UringEngine needs, or saying what it lacks.
#pragma once

#ifdef OFFLOAD_HAVE_LIBURING

#include <liburing.h>

#include <string>

#include "base/status.h"

namespace offload {

// Opens `ring` with room for `entries` unsubmitted entries, unmapped in children of fork().
// kUnsupported: the kernel's io_uring lacks READ and WRITE or may drop completions; kOsError: the
// kernel refuses a ring. REQUIRES: only the calling thread will use the ring. After ok the caller
// owes io_uring_queue_exit.
Status open_ring(unsigned entries, io_uring& ring);

// One line about the kernel's side of it.
std::string describe_ring(const io_uring& ring);

}  // namespace offload

#endif  // OFFLOAD_HAVE_LIBURING
