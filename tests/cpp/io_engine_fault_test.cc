// What the I/O engines do when the kernel fails them: single operations, the ring, its creation.
#include <fcntl.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "io/probe.h"
#include "io/request_progress.h"
#include "io_testing.h"
#include "sys/unique_fd.h"

namespace offload {

TEST_CASE_TEMPLATE("short transfers, EINTR and EAGAIN are handled inside", Factory,
                   OFFLOAD_ENGINES) {
  TestFile file(2 * kRegionBytes);
  Faults faults(file.file.alignment, [](unsigned n) {
    return Faults::Fault{n % 5 == 1 ? EINTR : n % 7 == 2 ? EAGAIN : 0, n % 2 == 0};
  });
  ScopedSyscallHooks scope(faults);
  auto engine = make<Factory>(3, 3);
  if (!engine) return;
  std::array<int, 2> wrong{};
  {
    std::vector<std::jthread> submitters;
    for (unsigned i = 0; i < 2; ++i) {
      submitters.emplace_back([&, i] { wrong[i] = random_waves(*engine, file, i, 6); });
    }
  }
  CHECK(wrong[0] == 0);
  CHECK(wrong[1] == 0);
  CHECK(engine->close().is_ok());
  const IoCounters counters = engine->counters();
  CHECK(counters.requests == 2 * (6 * kSlots + 1));
  CHECK(counters.continued > 0);
  CHECK(counters.continued <= faults.shorts());
  CHECK(counters.retried > 0);
  CHECK(counters.requests + counters.continued + counters.retried == faults.count());
}

TEST_CASE_TEMPLATE("an EINTR storm ends in success, an endless one in an error", Factory,
                   OFFLOAD_ENGINES) {
  TestFile file(kPageBytes);
  Buffer buffer(kPageBytes);
  unsigned storm = 500;
  Faults faults(kPageBytes,
                [&](unsigned n) { return Faults::Fault{n < storm ? EINTR : 0, false}; });
  ScopedSyscallHooks scope(faults);
  auto engine = make<Factory>();
  if (!engine) return;
  SUBCASE("ends") {
    RecordingRequest request(IoOp::kWrite, file.fd(), buffer.get(), kPageBytes, 0);
    REQUIRE(engine->submit({&request}).is_ok());
    CHECK(request.wait().is_ok());
    CHECK(engine->counters().retried == storm);
  }
  SUBCASE("endless") {
    storm = ~0u;
    RecordingRequest request(IoOp::kWrite, file.fd(), buffer.get(), kPageBytes, 0);
    REQUIRE(engine->submit({&request}).is_ok());
    const Status status = request.wait();
    CHECK(status.os_errno() == EINTR);
    CHECK(status.to_string().find("gave up") != std::string::npos);
    CHECK(engine->counters().retried == kMaxRetries);
  }
  CHECK(engine->close().is_ok());
}

TEST_CASE_TEMPLATE("an error fails the request it struck and no other", Factory, OFFLOAD_ENGINES) {
  constexpr unsigned kRequests = 10;
  TestFile file(kRequests * kPageBytes);
  Buffer buffer(kRequests * kPageBytes);
  for (const int err : {EIO, ENOSPC}) {
    Faults faults(kPageBytes, [=](unsigned n) { return Faults::Fault{n == 4 ? err : 0, false}; });
    ScopedSyscallHooks scope(faults);
    auto engine = make<Factory>();
    if (!engine) return;
    std::vector<std::unique_ptr<RecordingRequest>> requests;
    for (unsigned i = 0; i < kRequests; ++i) {
      requests.push_back(std::make_unique<RecordingRequest>(
          IoOp::kWrite, file.fd(), buffer.get() + i * kPageBytes, kPageBytes, i * kPageBytes));
    }
    REQUIRE(engine->submit(pointers(requests)).is_ok());
    int failed = 0;
    for (const auto& request : requests) {
      const Status status = request->wait();
      if (status.is_ok()) continue;
      ++failed;
      CHECK(status.os_errno() == err);
      CHECK(status.code() == (err == ENOSPC ? Code::kNoSpace : Code::kOsError));
      CHECK(status.op() == "write");
      CHECK(status.path() == "test-file");
      CHECK(status.offset() == static_cast<std::int64_t>(request->offset));
    }
    CHECK(failed == 1);
    CHECK(engine->close().is_ok());
    CHECK(engine->counters().failed == 1);
    CHECK(engine->counters().requests == kRequests);
    CHECK(engine->counters().bytes_written == (kRequests - 1) * kPageBytes);
  }
}

TEST_CASE_TEMPLATE("an error after a short transfer names the offset it reached", Factory,
                   OFFLOAD_ENGINES) {
  TestFile file(8 * kPageBytes);
  Buffer buffer(8 * kPageBytes);
  Faults faults(kPageBytes, [](unsigned n) { return Faults::Fault{n == 1 ? EIO : 0, n == 0}; });
  ScopedSyscallHooks scope(faults);
  auto engine = make<Factory>();
  if (!engine) return;
  RecordingRequest request(IoOp::kRead, file.fd(), buffer.get(), 6 * kPageBytes, kPageBytes);
  REQUIRE(engine->submit({&request}).is_ok());
  CHECK(request.wait().offset() == 3 * kPageBytes);
  CHECK(engine->counters().bytes_read == 2 * kPageBytes);
  CHECK(engine->counters().continued == 1);
}

TEST_CASE_TEMPLATE("the end of the file inside a read is corruption", Factory, OFFLOAD_ENGINES) {
  TestFile file(4 * kPageBytes);
  Buffer buffer(4 * kPageBytes);
  auto engine = make<Factory>();
  if (!engine) return;
  RecordingRequest inside(IoOp::kRead, file.fd(), buffer.get(), 4 * kPageBytes, 2 * kPageBytes);
  RecordingRequest beyond(IoOp::kRead, file.fd(), buffer.get(), kPageBytes, 64 * kPageBytes);
  REQUIRE(engine->submit({&inside}).is_ok());
  CHECK(inside.wait().code() == Code::kCorrupt);
  CHECK(inside.wait().to_string().find("16384, 8192 bytes too early") != std::string::npos);
  REQUIRE(engine->submit({&beyond}).is_ok());
  CHECK(beyond.wait().code() == Code::kCorrupt);
}

TEST_CASE_TEMPLATE("real errors of the kernel are reported", Factory, OFFLOAD_ENGINES) {
  TempDir dir;
  Buffer buffer(kPageBytes);
  auto engine = make<Factory>();
  if (!engine) return;
  UniqueFd read_only(::open("/dev/zero", O_RDONLY | O_CLOEXEC));
  UniqueFd full(::open("/dev/full", O_WRONLY | O_CLOEXEC));
  RecordingRequest bad(IoOp::kWrite, read_only.get(), buffer.get(), kPageBytes, 0);
  RecordingRequest no_space(IoOp::kWrite, full.get(), buffer.get(), kPageBytes, 0);
  REQUIRE(engine->submit({&bad, &no_space}).is_ok());
  CHECK(bad.wait().os_errno() == EBADF);
  CHECK(no_space.wait().code() == Code::kNoSpace);
}

namespace {

// Fails one kind of operation, from the nth on.
class FailFrom : public SyscallHooks {
 public:
  FailFrom(SysOp op, int err, int first, int times)
      : op_(op), err_(err), first_(first), end_(first + times) {}
  int before(SysCall& call) override {
    if (call.op != op_) return 0;
    const int n = count_++;
    return n >= first_ && n < end_ ? err_ : 0;
  }

 private:
  const SysOp op_;
  const int err_;
  const int first_;
  const int end_;
  std::atomic<int> count_{0};
};

}  // namespace

TEST_CASE("make_engine names its choice and falls back when the kernel refuses a ring") {
  Result<EngineChoice> threads = make_engine(EngineKind::kThreads, {});
  REQUIRE(threads.is_ok());
  CHECK(std::string(threads.value().engine->name()) == "threads");
  CHECK(threads.value().reason == "threads: requested");

  Result<EngineChoice> chosen = make_engine(EngineKind::kAuto, {});
  REQUIRE(chosen.is_ok());
  CHECK(chosen.value().reason.find(chosen.value().engine->name()) == 0);

  CHECK(make_engine(EngineKind::kAuto, {.queue_depth = 0}).status().code() == Code::kInvalid);

  FailFrom refuse(SysOp::kRingSetup, EPERM, 0, 1 << 30);
  ScopedSyscallHooks scope(refuse);
  Result<EngineChoice> fallback = make_engine(EngineKind::kAuto, {});
  REQUIRE(fallback.is_ok());
  CHECK(std::string(fallback.value().engine->name()) == "threads");
  CHECK(fallback.value().reason.find("threads: no io_uring, ") == 0);
  const Result<EngineChoice> forced = make_engine(EngineKind::kUring, {});
  CHECK_FALSE(forced.is_ok());
#ifdef OFFLOAD_HAVE_LIBURING
  CHECK(fallback.value().reason.find("Operation not permitted (errno 1)") != std::string::npos);
  CHECK(forced.status().os_errno() == EPERM);
#else
  CHECK(forced.status().code() == Code::kUnsupported);
#endif
}

#ifdef OFFLOAD_HAVE_LIBURING

TEST_CASE("a ring that an older kernel refuses is tried again without the new flags") {
  if (!make<Uring>()) return;
  FailFrom refuse(SysOp::kRingSetup, EINVAL, 0, 1);
  ScopedSyscallHooks scope(refuse);
  TestFile file(kRegionBytes);
  auto engine = make<Uring>();
  REQUIRE(engine);
  CHECK(random_waves(*engine, file, 0, 3) == 0);
}

TEST_CASE("a kernel that is busy for a while only delays a ring") {
  for (const int err : {EAGAIN, EBUSY, EINTR}) {
    TestFile file(kRegionBytes);
    FailFrom busy(SysOp::kRingEnter, err, 3, 200);
    ScopedSyscallHooks scope(busy);
    auto engine = make<Uring>();
    if (!engine) return;
    CHECK(random_waves(*engine, file, 0, 3) == 0);
    CHECK(engine->close().is_ok());
  }
}

TEST_CASE("a ring that may be made but not used is a refused ring") {
  if (!make<Uring>()) return;
  FailFrom filtered(SysOp::kRingEnter, EPERM, 0, 1 << 30);
  ScopedSyscallHooks scope(filtered);
  CHECK(make_uring_engine({}).status().os_errno() == EPERM);
  const Result<EngineChoice> fallback = make_engine(EngineKind::kAuto, {});
  REQUIRE(fallback.is_ok());
  CHECK(fallback.value().reason.find("io_uring_enter: Operation not permitted") !=
        std::string::npos);
}

TEST_CASE("a ring that breaks fails every request once and stays failed") {
  constexpr unsigned kRequests = 64;
  TestFile file(kRequests * kPageBytes);
  Buffer buffer(kRequests * kPageBytes);
  for (const int first : {1, 2, 3, 5, 9, 20}) {
    FailFrom broken(SysOp::kRingEnter, EBADF, first, 1 << 30);
    ScopedSyscallHooks scope(broken);
    auto engine = make<Uring>(4);
    if (!engine) return;
    std::vector<std::unique_ptr<RecordingRequest>> requests;
    for (unsigned i = 0; i < kRequests; ++i) {
      requests.push_back(std::make_unique<RecordingRequest>(
          IoOp::kWrite, file.fd(), buffer.get() + i * kPageBytes, kPageBytes, i * kPageBytes));
    }
    const Status submitted = engine->submit(pointers(requests));
    unsigned failed = 0;
    if (submitted.is_ok()) {
      for (const auto& request : requests) {
        const Status status = request->wait();
        if (status.is_ok()) continue;
        ++failed;
        CHECK_MESSAGE(status.os_errno() == EBADF, status.to_string());
      }
      CHECK(failed > 0);
    } else {
      CHECK(submitted.os_errno() == EBADF);
    }
    CHECK(engine->submit({}).os_errno() == EBADF);
    CHECK(engine->close().os_errno() == EBADF);
    for (const auto& request : requests) CHECK(request->completed() == (submitted.is_ok() ? 1 : 0));
  }
}

#endif  // OFFLOAD_HAVE_LIBURING

}  // namespace offload
