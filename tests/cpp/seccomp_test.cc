// io_uring as containers refuse it: a seccomp filter that answers its system calls with an errno.
//
// The filter is of one thread and of those that it starts; the rest of the test program keeps its
// rings.
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include <cerrno>
#include <cstddef>
#include <initializer_list>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "doctest/doctest.h"
#include "io/probe.h"
#include "io_testing.h"
#include "store_testing.h"

#ifdef OFFLOAD_HAVE_LIBURING

namespace offload {
namespace {

// From now on `calls` of this thread, and of those that it starts, fail with `err`. 0 or an errno.
int refuse(std::initializer_list<unsigned> calls, unsigned err) {
  std::vector<sock_filter> program = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
  };
  for (const unsigned call : calls) {
    program.push_back(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1));
    program.push_back(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | err));
  }
  program.push_back(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
  const sock_fprog filter = {static_cast<unsigned short>(program.size()), program.data()};
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return errno;
  return ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0 ? 0 : errno;
}

struct Outcome {
  int not_filtered = 0;  // errno of a kernel that has no seccomp
  std::string chosen;    // by kAuto, which must succeed
  std::string reason;
  int wrong = -1;  // of transfers on the engine that kAuto gave
  Status forced;   // of kUring
};

Outcome in_a_thread_without(std::initializer_list<unsigned> calls, int err) {
  const TestFile file(kRegionBytes);
  Outcome outcome;
  std::thread thread([&] {
    outcome.not_filtered = refuse(calls, static_cast<unsigned>(err));
    if (outcome.not_filtered != 0) return;
    Result<EngineChoice> choice = make_engine(EngineKind::kAuto, {});
    outcome.forced = make_engine(EngineKind::kUring, {}).status();
    if (!choice.is_ok()) {
      outcome.reason = choice.status().to_string();
      return;
    }
    outcome.chosen = choice.value().engine->name();
    outcome.reason = choice.value().reason;
    outcome.wrong = random_waves(*choice.value().engine, file, 0, 3);
    if (!choice.value().engine->close().is_ok()) ++outcome.wrong;
  });
  thread.join();
  return outcome;
}

bool is_filtered(const Outcome& outcome) {
  if (outcome.not_filtered == 0) return true;
  MESSAGE("skipped: no seccomp filter, errno ", outcome.not_filtered);
  return false;
}

bool has_ring() {
  return make_engine(EngineKind::kUring, {}).is_ok();
}

}  // namespace

TEST_CASE("A filter on io_uring_setup or io_uring_enter leaves the thread engine, which says why") {
  if (!has_ring()) return;
  for (const unsigned call : {__NR_io_uring_setup, __NR_io_uring_enter}) {
    for (const int err : {EPERM, ENOSYS}) {
      CAPTURE(call);
      CAPTURE(err);
      const Outcome outcome = in_a_thread_without({call}, err);
      if (!is_filtered(outcome)) return;
      INFO(outcome.reason);
      CHECK(outcome.chosen == "threads");
      CHECK(outcome.reason.find("threads: no io_uring, io_uring_") == 0);
      CHECK(contains(outcome.reason, "(errno " + std::to_string(err) + ")"));
      CHECK(outcome.wrong == 0);
      CHECK(outcome.forced.os_errno() == err);
    }
  }
  CHECK(has_ring());
}

TEST_CASE("A filter on all of io_uring leaves the thread engine") {
  if (!has_ring()) return;
  const Outcome outcome = in_a_thread_without(
      {__NR_io_uring_setup, __NR_io_uring_enter, __NR_io_uring_register}, EPERM);
  if (!is_filtered(outcome)) return;
  CHECK(outcome.chosen == "threads");
  CHECK(outcome.wrong == 0);
  CHECK(outcome.forced.os_errno() == EPERM);
}

TEST_CASE("A filter on io_uring_register alone leaves a ring without registered files and memory") {
  if (!has_ring()) return;
  for (const int err : {EPERM, ENOSYS}) {
    CAPTURE(err);
    const Outcome outcome = in_a_thread_without({__NR_io_uring_register}, err);
    if (!is_filtered(outcome)) return;
    INFO(outcome.reason);
    CHECK(outcome.chosen == "io_uring");
    CHECK(contains(outcome.reason, "io_uring_register_buffers: "));
    CHECK(contains(outcome.reason, "(errno " + std::to_string(err) + ")"));
    CHECK(outcome.wrong == 0);
    CHECK_MESSAGE(outcome.forced.is_ok(), outcome.forced.to_string());
  }
}

}  // namespace offload

#endif  // OFFLOAD_HAVE_LIBURING
