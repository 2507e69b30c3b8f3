#include "io/ring_setup.h"

#ifdef OFFLOAD_HAVE_LIBURING

#include <sys/utsname.h>

#include <cerrno>
#include <cstdio>

#include "sys/syscall_hooks.h"

namespace offload {

Status open_ring(unsigned entries, io_uring& ring) {
  // Newest first; a kernel that does not know a flag says EINVAL.
  constexpr unsigned kFlags[] = {
#ifdef IORING_SETUP_SINGLE_ISSUER
      IORING_SETUP_COOP_TASKRUN | IORING_SETUP_SINGLE_ISSUER,
#endif
      0,
  };
  int err = EINVAL;
  for (const unsigned flags : kFlags) {
    SysCall call{.op = SysOp::kRingSetup, .nbytes = entries, .flags = static_cast<int>(flags)};
    err = hook_before(call);
    if (err == 0) err = -io_uring_queue_init(entries, &ring, flags);
    if (err != EINVAL) break;
  }
  if (err != 0) return Status::from_errno(err, "io_uring_setup", "");

  Status status;
  io_uring_probe* probe = io_uring_get_probe_ring(&ring);
  // A filter may refuse io_uring_register, and so the probe; Linux 5.6 brought the feature with the
  // operations.
  const bool has_operations = probe == nullptr
                                  ? (ring.features & IORING_FEAT_RW_CUR_POS) != 0
                                  : io_uring_opcode_supported(probe, IORING_OP_READ) != 0 &&
                                        io_uring_opcode_supported(probe, IORING_OP_WRITE) != 0;
  if (!has_operations) {
    status = Status::error(Code::kUnsupported, "io_uring of this kernel lacks READ and WRITE");
  } else if ((ring.features & IORING_FEAT_NODROP) == 0) {
    status = Status::error(Code::kUnsupported, "io_uring of this kernel may drop completions");
  } else {
    err = io_uring_ring_dontfork(&ring);
    if (err < 0) status = Status::from_errno(-err, "io_uring_ring_dontfork", "");
  }
  io_uring_free_probe(probe);
  if (!status.is_ok()) io_uring_queue_exit(&ring);
  return status;
}

std::string describe_ring(const io_uring& ring) {
  utsname system = {};
  // Fails only for a bad address.
  static_cast<void>(::uname(&system));
  char features[16];
  std::snprintf(features, sizeof(features), "0x%x", ring.features);
  return std::string("Linux ") + system.release + ", ring features " + features + ", flags " +
         std::to_string(ring.flags);
}

}  // namespace offload

#endif  // OFFLOAD_HAVE_LIBURING
