// The ring's registered memory: same bytes with and without, refusals that only cost speed, and a
// fork that finds nothing pinned.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/align.h"
#include "doctest/doctest.h"
#include "io/io_engine.h"
#include "io_testing.h"
#include "sys/at_fork.h"

namespace offload {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

// Anonymous memory, all of it writable or only its first part.
class Mapping {
 public:
  Mapping(std::size_t nbytes, std::size_t writable) : nbytes_(nbytes) {
    void* base = ::mmap(nullptr, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REQUIRE(base != MAP_FAILED);
    base_ = static_cast<std::byte*>(base);
    make_writable(writable);
  }
  ~Mapping() { ::munmap(base_, nbytes_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  void make_writable(std::size_t nbytes) {
    REQUIRE(::mprotect(base_, nbytes, PROT_READ | PROT_WRITE) == 0);
  }
  std::byte* base() const { return base_; }
  std::size_t nbytes() const { return nbytes_; }

 private:
  std::byte* base_ = nullptr;
  std::size_t nbytes_;
};

// Writes random bytes from `from` to the file, reads them to `to`.
bool round_trip(IoEngine& engine, const TestFile& file, std::byte* from, std::byte* to,
                std::size_t nbytes, unsigned seed) {
  std::mt19937_64 random(seed);
  fill_random(from, nbytes, random);
  RecordingRequest write(IoOp::kWrite, file.fd(), from, nbytes, 0);
  if (!engine.submit({&write}).is_ok() || !write.wait().is_ok()) return false;
  std::memset(to, 0xEE, nbytes);
  RecordingRequest read(IoOp::kRead, file.fd(), to, nbytes, 0);
  if (!engine.submit({&read}).is_ok() || !read.wait().is_ok()) return false;
  return std::memcmp(from, to, nbytes) == 0;
}

// Memory the kernel has pinned for rings of this process, in KiB.
long pinned_kib() {
  std::ifstream status("/proc/self/status");
  std::string line;
  while (std::getline(status, line)) {
    if (line.starts_with("VmPin:")) return std::stol(line.substr(6));
  }
  return -1;
}

}  // namespace

TEST_CASE_TEMPLATE("memory that was added, is not whole, or was never added serves alike", Factory,
                   OFFLOAD_ENGINES) {
  TestFile file(4 * kMiB);
  auto engine = make<Factory>();
  if (!engine) return;
  // Chunks of 32 MiB: one whole, one that becomes whole later, a short last one.
  const auto added = std::make_shared<Mapping>(70 * kMiB, 40 * kMiB);
  const Mapping plain(4 * kMiB, 4 * kMiB);
  engine->add_memory({added->base(), added->nbytes(), added});
  const std::size_t offsets[] = {0, kPageBytes, 30 * kMiB, 31 * kMiB + kMiB / 2, 33 * kMiB};
  unsigned seed = 0;
  for (const std::size_t offset : offsets) {
    std::byte* inside = added->base() + offset;
    CHECK(round_trip(*engine, file, inside, plain.base(), kMiB, ++seed));
    CHECK(round_trip(*engine, file, plain.base(), inside, kMiB, ++seed));
  }
  added->make_writable(70 * kMiB);
  for (int i = 0; i < 40; ++i) {
    std::byte* late = added->base() + (i % 2 == 0 ? 50 : 69) * kMiB;
    CHECK(round_trip(*engine, file, late, plain.base(), kMiB, ++seed));
  }
  CHECK(engine->close().is_ok());
}

TEST_CASE_TEMPLATE("an engine keeps added memory until it is closed, not longer", Factory,
                   OFFLOAD_ENGINES) {
  TestFile file(kMiB);
  auto engine = make<Factory>();
  if (!engine) return;
  auto added = std::make_shared<Mapping>(32 * kMiB, 32 * kMiB);
  const std::weak_ptr<Mapping> alive = added;
  engine->add_memory({added->base(), added->nbytes(), added});
  CHECK(round_trip(*engine, file, added->base(), added->base() + kMiB, kMiB, 1));
  CHECK(engine->close().is_ok());
  added.reset();
  CHECK(alive.expired());
}

#ifdef OFFLOAD_HAVE_LIBURING

TEST_CASE("a kernel that registers nothing only costs speed, and describe() says so") {
  struct Refuse : SyscallHooks {
    int before(SysCall& call) override { return call.op == SysOp::kRingRegister ? ENOMEM : 0; }
  } refuse;
  ScopedSyscallHooks scope(refuse);
  TestFile file(kMiB);
  const auto added = std::make_shared<Mapping>(32 * kMiB, 32 * kMiB);
  Result<std::unique_ptr<IoEngine>> made =
      make_uring_engine({.queue_depth = 4, .files = {file.fd()}});
  if (!made.is_ok()) return;
  auto engine = made.take();
  INFO(engine->describe());
  CHECK(engine->describe().find("io_uring_register_files") != std::string::npos);
  CHECK(engine->describe().find("io_uring_register_buffers") != std::string::npos);
  engine->add_memory({added->base(), added->nbytes(), added});
  CHECK(round_trip(*engine, file, added->base(), added->base() + kMiB, kMiB, 1));
  CHECK(engine->close().is_ok());
}

TEST_CASE("added memory is pinned while it is used, and not across a fork") {
  TestFile file(kMiB);
  const auto added = std::make_shared<Mapping>(64 * kMiB, 64 * kMiB);
  Result<std::unique_ptr<IoEngine>> made =
      make_uring_engine({.queue_depth = 4, .files = {file.fd()}});
  if (!made.is_ok()) return;
  auto engine = made.take();
  // The kernel may still be letting go of what an earlier ring had.
  long before = pinned_kib();
  for (int i = 0; i < 500 && before > 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    before = pinned_kib();
  }
  REQUIRE(before == 0);
  engine->add_memory({added->base(), added->nbytes(), added});
  REQUIRE(round_trip(*engine, file, added->base(), added->base() + 40 * kMiB, kMiB, 1));
  if (::geteuid() != 0 && pinned_kib() == before) {
    MESSAGE("skipped: no registered memory under this user's limit, ", engine->describe());
    return;
  }
  // One chunk or both: one that the kernel refuses at the moment is served without.
  REQUIRE(pinned_kib() - before >= 32 * 1024);

  // A transfer between the engine's hook and the fork registers nothing.
  long pinned_at_fork = -1;
  bool served_at_fork = false;
  auto at_fork = std::make_unique<AroundFork>(
      [&] {
        served_at_fork =
            round_trip(*engine, file, added->base(), added->base() + 40 * kMiB, kMiB, 3);
        pinned_at_fork = pinned_kib();
      },
      [] {});
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    // The exit status is all a forked child may report.
    RecordingRequest request(IoOp::kRead, file.fd(), added->base(), kMiB, 0);
    bool right = engine->submit({&request}).code() == Code::kInvalid;
    right = right && engine->close().code() == Code::kInvalid;
    engine.reset();
    ::_exit(right ? 0 : 1);
  }
  at_fork.reset();
  CHECK(served_at_fork);
  CHECK(pinned_at_fork == before);
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);

  CHECK(round_trip(*engine, file, added->base() + kMiB, added->base() + 41 * kMiB, kMiB, 2));
  CHECK(pinned_kib() - before >= 32 * 1024);
  CHECK(engine->close().is_ok());
  CHECK(pinned_kib() == before);
}

#endif  // OFFLOAD_HAVE_LIBURING

TEST_CASE("a forked child may not use its parent's threads, and can let go of them") {
  TestFile file(kMiB);
  auto engine = make<ThreadPool>();
  Buffer buffer(kPageBytes);
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    RecordingRequest request(IoOp::kRead, file.fd(), buffer.get(), kPageBytes, 0);
    const Status refused = engine->submit({&request});
    bool right = refused.code() == Code::kInvalid;
    right = right && refused.to_string().find("forked child") != std::string::npos;
    engine.reset();
    ::_exit(right ? 0 : 1);
  }
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
  RecordingRequest request(IoOp::kRead, file.fd(), buffer.get(), kPageBytes, 0);
  REQUIRE(engine->submit({&request}).is_ok());
  CHECK(request.wait().is_ok());
}

}  // namespace offload
