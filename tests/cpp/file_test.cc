#include "sys/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/align.h"
#include "base/format.h"
#include "doctest/doctest.h"
#include "sys/syscall_hooks.h"
#include "sys/unique_fd.h"
#include "temp_dir.h"

namespace offload {
namespace {

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

std::int64_t size_of(const SwapFile& file) {
  struct stat info = {};
  REQUIRE(::fstat(file.fd.get(), &info) == 0);
  return info.st_size;
}

// Refuses opens whose flags hold all of `flags`, really creating the file first where the kernel
// would; and any other operation named in `errors`.
class Refuse : public SyscallHooks {
 public:
  void open_with(int flags, int err) { opens_.emplace_back(flags, err); }
  void op(SysOp op, int err, int times = 1 << 30) { ops_[op] = {err, times}; }

  int before(SysCall& call) override {
    if (call.op == SysOp::kOpen) {
      for (const auto& [flags, err] : opens_) {
        if ((call.flags & flags) == flags) return err;
      }
    }
    const auto found = ops_.find(call.op);
    if (found == ops_.end() || found->second.second-- <= 0) return 0;
    return found->second.first;
  }

 private:
  std::vector<std::pair<int, int>> opens_;
  std::map<SysOp, std::pair<int, int>> ops_;
};

void check_round_trip(const SwapFile& file) {
  auto* buffer = static_cast<std::byte*>(std::aligned_alloc(kPageBytes, kPageBytes));
  REQUIRE(buffer != nullptr);
  for (std::size_t i = 0; i < kPageBytes; ++i) buffer[i] = static_cast<std::byte>(i * 7);
  CHECK(pwrite_some(file.fd.get(), buffer, kPageBytes, kPageBytes) == kPageBytes);
  for (std::size_t i = 0; i < kPageBytes; ++i) buffer[i] = std::byte{0};
  CHECK(pread_some(file.fd.get(), buffer, kPageBytes, kPageBytes) == kPageBytes);
  bool same = true;
  for (std::size_t i = 0; i < kPageBytes; ++i) same &= buffer[i] == static_cast<std::byte>(i * 7);
  CHECK(same);
  std::free(buffer);
}

}  // namespace

TEST_CASE("human_bytes uses binary units with one decimal") {
  CHECK(human_bytes(0) == "0 B");
  CHECK(human_bytes(1023) == "1023 B");
  CHECK(human_bytes(1024) == "1.0 KiB");
  CHECK(human_bytes(std::uint64_t{3} << 29) == "1.5 GiB");
  CHECK(human_bytes((std::uint64_t{1} << 20) - 1) == "1.0 MiB");
  CHECK(human_bytes(~std::uint64_t{0}) == "16.0 EiB");
}

TEST_CASE("UniqueFd closes once and reports a failed close") {
  int raw = -1;
  {
    UniqueFd first(::open("/dev/null", O_RDONLY | O_CLOEXEC));
    raw = first.get();
    REQUIRE(raw >= 0);
    UniqueFd second(std::move(first));
    CHECK_FALSE(first.is_open());  // NOLINT(bugprone-use-after-move)
    CHECK(second.get() == raw);
  }
  CHECK(::fcntl(raw, F_GETFD) == -1);

  UniqueFd closed(::open("/dev/null", O_RDONLY | O_CLOEXEC));
  CHECK(closed.close().is_ok());
  CHECK(closed.close().is_ok());
  UniqueFd stolen(::open("/dev/null", O_RDONLY | O_CLOEXEC));
  REQUIRE(::close(stolen.get()) == 0);
  const Status status = stolen.close("/dev/null");
  CHECK(status.os_errno() == EBADF);
  CHECK(contains(status.to_string(), "close /dev/null"));
}

TEST_CASE("open_scratch leaves no name and reports its alignment") {
  TempDir dir;
  Result<SwapFile> file = open_scratch(dir.path());
  REQUIRE_MESSAGE(file.is_ok(), file.status().to_string());
  CHECK(dir.empty());
  CHECK(file.value().path == dir.path());
  CHECK(file.value().alignment <= kPageBytes);
  CHECK(is_aligned(kPageBytes, file.value().alignment));
  const int flags = ::fcntl(file.value().fd.get(), F_GETFL);
  CHECK(((flags & O_DIRECT) != 0) == file.value().direct);
  CHECK((::fcntl(file.value().fd.get(), F_GETFD) & FD_CLOEXEC) != 0);
  check_round_trip(file.value());
}

TEST_CASE("open_scratch without O_TMPFILE unlinks a named file at once and says so") {
  TempDir dir;
  for (const int err : {EOPNOTSUPP, EISDIR, EINVAL}) {
    Refuse hooks;
    hooks.open_with(O_TMPFILE, err);
    ScopedSyscallHooks scope(hooks);
    Result<SwapFile> file = open_scratch(dir.path());
    REQUIRE_MESSAGE(file.is_ok(), file.status().to_string());
    CHECK(dir.empty());
    CHECK(contains(file.value().note, "no O_TMPFILE"));
    check_round_trip(file.value());
  }
}

TEST_CASE("open_scratch without O_DIRECT is buffered and says so") {
  TempDir dir;
  Refuse hooks;
  hooks.open_with(O_DIRECT, EINVAL);
  ScopedSyscallHooks scope(hooks);
  Result<SwapFile> file = open_scratch(dir.path());
  REQUIRE_MESSAGE(file.is_ok(), file.status().to_string());
  CHECK_FALSE(file.value().direct);
  CHECK(contains(file.value().note, "no O_DIRECT: buffered I/O"));
  CHECK_FALSE(contains(file.value().note, "O_TMPFILE"));
  CHECK(dir.empty());
  check_round_trip(file.value());
}

TEST_CASE("open_scratch on tmpfs says that the directory is memory") {
  Result<SwapFile> file = open_scratch("/dev/shm");
  if (!file.is_ok()) {
    MESSAGE("skipped: /dev/shm is not usable: ", file.status().to_string());
    return;
  }
  if (!file.value().in_memory) {
    MESSAGE("skipped: /dev/shm is not a tmpfs");
    return;
  }
  CHECK(contains(file.value().note, "/dev/shm (tmpfs) is memory, not a disk"));
  check_round_trip(file.value());
  REQUIRE(reserve_space(file.value(), 1 << 20).is_ok());
  CHECK(size_of(file.value()) == 1 << 20);
}

TEST_CASE("open_scratch names what is wrong with the directory") {
  TempDir dir;
  const Result<SwapFile> missing = open_scratch(dir.path() + "/missing");
  REQUIRE_FALSE(missing.is_ok());
  CHECK(missing.status().os_errno() == ENOENT);
  CHECK(contains(missing.status().to_string(), dir.path() + "/missing"));
  CHECK(contains(missing.status().to_string(), "does not exist"));

  const std::string plain = dir.path() + "/plain";
  std::ofstream(plain) << "x";
  const Result<SwapFile> not_dir = open_scratch(plain);
  REQUIRE_FALSE(not_dir.is_ok());
  CHECK(not_dir.status().os_errno() == ENOTDIR);
  CHECK(contains(not_dir.status().to_string(), "is not a directory"));

  for (const auto& [err, text] :
       {std::pair{EROFS, "read-only filesystem"}, std::pair{EACCES, "write and search permission"},
        std::pair{ENOSPC, "free some space"}, std::pair{EMFILE, "cannot create a swap file"}}) {
    Refuse hooks;
    hooks.open_with(O_TMPFILE, err);
    ScopedSyscallHooks scope(hooks);
    const Result<SwapFile> refused = open_scratch(dir.path());
    REQUIRE_FALSE(refused.is_ok());
    CHECK(refused.status().os_errno() == err);
    CHECK_MESSAGE(contains(refused.status().to_string(), text), refused.status().to_string());
  }
}

TEST_CASE("open_scratch without permission fails") {
  if (::geteuid() == 0) {
    MESSAGE("skipped: root may write anywhere");
    return;
  }
  TempDir dir;
  REQUIRE(::chmod(dir.path().c_str(), 0500) == 0);
  const Result<SwapFile> file = open_scratch(dir.path());
  CHECK_FALSE(file.is_ok());
  CHECK(file.status().os_errno() == EACCES);
  REQUIRE(::chmod(dir.path().c_str(), 0700) == 0);
}

TEST_CASE("reserve_space allocates blocks and grows only") {
  TempDir dir;
  Result<SwapFile> file = open_scratch(dir.path());
  REQUIRE(file.is_ok());
  REQUIRE(reserve_space(file.value(), 3 << 20).is_ok());
  CHECK(size_of(file.value()) == 3 << 20);
  struct stat info = {};
  REQUIRE(::fstat(file.value().fd.get(), &info) == 0);
  CHECK(info.st_blocks * 512 >= 3 << 20);
  REQUIRE(reserve_space(file.value(), 1 << 20).is_ok());
  CHECK(size_of(file.value()) == 3 << 20);
  REQUIRE(reserve_space(file.value(), 0).is_ok());
  CHECK(file.value().note.empty() != file.value().in_memory);
}

TEST_CASE("reserve_space finds a full disk ahead and leaves the file as it was") {
  TempDir dir;
  Result<SwapFile> file = open_scratch(dir.path());
  REQUIRE(file.is_ok());
  REQUIRE(reserve_space(file.value(), 1 << 20).is_ok());

  SUBCASE("more than is free") {
    const std::uint64_t needed = std::uint64_t{1} << 60;
    const Status status = reserve_space(file.value(), needed);
    CHECK(status.code() == Code::kNoSpace);
    CHECK(contains(status.to_string(), dir.path()));
    CHECK(contains(status.to_string(), "(1024.0 PiB) more") !=
          contains(status.to_string(), "(1.0 EiB) more"));
    CHECK(contains(status.to_string(), " free"));
  }
  SUBCASE("fallocate says ENOSPC") {
    Refuse hooks;
    hooks.op(SysOp::kFallocate, ENOSPC);
    ScopedSyscallHooks scope(hooks);
    const Status status = reserve_space(file.value(), 2 << 20);
    CHECK(status.code() == Code::kNoSpace);
    CHECK(contains(status.to_string(), "1048576 bytes (1.0 MiB) more"));
  }
  SUBCASE("quota") {
    Refuse hooks;
    hooks.op(SysOp::kFallocate, EDQUOT);
    ScopedSyscallHooks scope(hooks);
    const Status status = reserve_space(file.value(), 2 << 20);
    CHECK(status.code() == Code::kNoSpace);
    CHECK(contains(status.to_string(), "quota"));
  }
  CHECK(size_of(file.value()) == 1 << 20);
}

TEST_CASE("reserve_space retries EINTR and reports other errors") {
  TempDir dir;
  Result<SwapFile> file = open_scratch(dir.path());
  REQUIRE(file.is_ok());
  Refuse hooks;
  hooks.op(SysOp::kFallocate, EINTR, 20);
  ScopedSyscallHooks scope(hooks);
  CHECK(reserve_space(file.value(), 1 << 20).is_ok());
  hooks.op(SysOp::kFallocate, EIO);
  const Status status = reserve_space(file.value(), 2 << 20);
  CHECK(status.os_errno() == EIO);
  CHECK(status.op() == "fallocate");
  hooks.op(SysOp::kFtruncate, EROFS);
  CHECK(reserve_space(file.value(), 2 << 20).os_errno() == EROFS);
}

TEST_CASE("reserve_space without fallocate extends the file and says so once") {
  TempDir dir;
  Result<SwapFile> file = open_scratch(dir.path());
  REQUIRE(file.is_ok());
  Refuse hooks;
  hooks.op(SysOp::kFallocate, EOPNOTSUPP);
  ScopedSyscallHooks scope(hooks);
  REQUIRE(reserve_space(file.value(), 1 << 20).is_ok());
  const std::string note = file.value().note;
  CHECK(contains(note, "cannot reserve space"));
  REQUIRE(reserve_space(file.value(), 2 << 20).is_ok());
  CHECK(file.value().note == note);
  CHECK(size_of(file.value()) == 2 << 20);
}

}  // namespace offload
