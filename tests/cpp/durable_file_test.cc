#include "sys/durable_file.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <functional>
#include <set>
#include <string>

#include "doctest/doctest.h"
#include "sys/syscall_hooks.h"
#include "temp_dir.h"

namespace offload {
namespace {

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

Directory directory(const TempDir& dir) {
  Result<Directory> opened = open_directory(dir.path());
  REQUIRE_MESSAGE(opened.is_ok(), opened.status().to_string());
  return opened.take();
}

Result<SwapFile> create(const Directory& dir, const std::string& name = "file") {
  return open_durable(dir, name, DurableOpen::kCreate, DurableIo::kBuffered);
}

Result<SwapFile> reopen(const Directory& dir, const std::string& name = "file") {
  return open_durable(dir, name, DurableOpen::kExisting, DurableIo::kBuffered);
}

void must_create(const Directory& dir, const std::string& name = "file") {
  const Result<SwapFile> file = create(dir, name);
  REQUIRE_MESSAGE(file.is_ok(), file.status().to_string());
}

void check_refused(const Result<SwapFile>& file, Code code, const std::string& part) {
  REQUIRE_FALSE(file.is_ok());
  INFO(file.status().to_string());
  CHECK(file.status().code() == code);
  CHECK(contains(file.status().to_string(), part));
}

mode_t mode_of(const SwapFile& file) {
  struct stat info = {};
  REQUIRE(::fstat(file.fd.get(), &info) == 0);
  return info.st_mode & 07777;
}

// Calls `act` ahead of the n-th (from 0) call of `op`, which fails with what it returns.
class Before : public SyscallHooks {
 public:
  Before(SysOp op, int nth, std::function<int()> act) : op_(op), left_(nth), act_(std::move(act)) {}
  int before(SysCall& call) override {
    if (call.op != op_ || left_-- != 0) return 0;
    return act_();
  }

 private:
  const SysOp op_;
  int left_;
  const std::function<int()> act_;
};

// The first `times` calls of `op` (with all of `flags`) fail with `err`.
class Fail : public SyscallHooks {
 public:
  Fail(SysOp op, int err, int times = 1 << 30, int flags = 0)
      : op_(op), err_(err), left_(times), flags_(flags) {}
  int before(SysCall& call) override {
    if (call.op != op_ || (call.flags & flags_) != flags_) return 0;
    return left_-- > 0 ? err_ : 0;
  }

 private:
  const SysOp op_;
  const int err_;
  int left_;
  const int flags_;
};

struct Umask {
  explicit Umask(mode_t mask) : former(::umask(mask)) {}
  ~Umask() { ::umask(former); }
  const mode_t former;
};

}  // namespace

TEST_CASE("open_durable creates with mode 0600 whatever the umask") {
  TempDir temp;
  const Directory dir = directory(temp);
  for (const mode_t mask : {0000, 0022, 0777}) {
    const Umask umask(mask);
    const std::string name = "file" + std::to_string(mask);
    const Result<SwapFile> file = create(dir, name);
    REQUIRE_MESSAGE(file.is_ok(), file.status().to_string());
    CHECK(mode_of(file.value()) == 0600);
    CHECK(file.value().path == temp.path() + "/" + name);
    CHECK((::fcntl(file.value().fd.get(), F_GETFD) & FD_CLOEXEC) != 0);
    CHECK_FALSE(file.value().direct);
    CHECK(file_size(file.value()).value() == 0);
  }
}

TEST_CASE("open_durable creates once and opens only what is there") {
  TempDir temp;
  const Directory dir = directory(temp);
  CHECK(reopen(dir).status().os_errno() == ENOENT);
  CHECK_FALSE(exists_in_dir(dir, "file").value());
  must_create(dir);
  CHECK(exists_in_dir(dir, "file").value());
  CHECK(create(dir).status().os_errno() == EEXIST);
  CHECK(reopen(dir).is_ok());
  for (const std::string name : {"", ".", "..", "a/b", "/file"}) {
    check_refused(create(dir, name), Code::kInvalid, "not the name of a file");
  }
}

TEST_CASE("open_durable follows no symbolic link") {
  TempDir temp;
  const Directory dir = directory(temp);
  must_create(dir, "target");
  std::filesystem::create_symlink("target", temp.path() + "/file");
  check_refused(reopen(dir), Code::kInvalid, "symbolic link");
  CHECK(create(dir).status().os_errno() == EEXIST);
  std::filesystem::create_symlink("nothing", temp.path() + "/dangling");
  check_refused(reopen(dir, "dangling"), Code::kInvalid, "symbolic link");
  CHECK(create(dir, "dangling").status().os_errno() == EEXIST);
  CHECK(exists_in_dir(dir, "dangling").value());
  CHECK_FALSE(exists_in_dir(dir, "nothing").value());

  // One that takes the file's place between the look and the open.
  must_create(dir, "late");
  Before hooks(SysOp::kOpen, 0, [&] {
    std::filesystem::remove(temp.path() + "/late");
    std::filesystem::create_symlink("target", temp.path() + "/late");
    return 0;
  });
  const ScopedSyscallHooks scope(hooks);
  check_refused(reopen(dir, "late"), Code::kInvalid, "symbolic link");
}

TEST_CASE("open_durable refuses what is not a private regular file with one name") {
  TempDir temp;
  const Directory dir = directory(temp);
  std::filesystem::create_directory(temp.path() + "/folder");
  check_refused(reopen(dir, "folder"), Code::kInvalid, "not a regular file");
  REQUIRE(::mkfifo((temp.path() + "/pipe").c_str(), 0600) == 0);
  check_refused(reopen(dir, "pipe"), Code::kInvalid, "not a regular file");

  must_create(dir);
  const std::string path = temp.path() + "/file";
  for (const mode_t mode : {0640, 0604, 0610}) {
    REQUIRE(::chmod(path.c_str(), mode) == 0);
    check_refused(reopen(dir), Code::kInvalid, "chmod it to 600");
  }
  REQUIRE(::chmod(path.c_str(), 0600) == 0);
  std::filesystem::create_hard_link(path, temp.path() + "/second");
  check_refused(reopen(dir), Code::kInvalid, "2 names");
  std::filesystem::remove(temp.path() + "/second");
  if (::geteuid() == 0) {
    REQUIRE(::chown(path.c_str(), 12345, 12345) == 0);
    check_refused(reopen(dir), Code::kInvalid, "belongs to user 12345");
    REQUIRE(::chown(path.c_str(), 0, 0) == 0);
  } else {
    MESSAGE("skipped: only root can give a file away");
  }
  CHECK(reopen(dir).is_ok());
}

TEST_CASE("open_durable locks: twice in one process, and against another until it is killed") {
  TempDir temp;
  const Directory dir = directory(temp);
  {
    const Result<SwapFile> first = create(dir);
    REQUIRE(first.is_ok());
    check_refused(reopen(dir), Code::kOsError, "in use by another process");
    CHECK(reopen(dir).status().os_errno() == EWOULDBLOCK);
  }
  CHECK(reopen(dir).is_ok());

  int ready[2];
  REQUIRE(::pipe(ready) == 0);
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    const Result<SwapFile> held = reopen(dir);
    const char byte = held.is_ok() ? 'y' : 'n';
    if (::write(ready[1], &byte, 1) == 1) ::pause();
    ::_exit(0);
  }
  char byte = 0;
  REQUIRE(::read(ready[0], &byte, 1) == 1);
  CHECK(byte == 'y');
  check_refused(reopen(dir), Code::kOsError, "in use by another process");
  REQUIRE(::kill(child, SIGKILL) == 0);
  REQUIRE(::waitpid(child, nullptr, 0) == child);
  CHECK(reopen(dir).is_ok());
  ::close(ready[0]);
  ::close(ready[1]);
}

TEST_CASE("open_durable notices that the file was replaced before it was locked") {
  TempDir temp;
  const Directory dir = directory(temp);
  must_create(dir);
  must_create(dir, "other");
  {
    Before hooks(SysOp::kLock, 0, [&] {
      std::filesystem::rename(temp.path() + "/other", temp.path() + "/file");
      return 0;
    });
    const ScopedSyscallHooks scope(hooks);
    check_refused(reopen(dir), Code::kOsError, "in use by another process");
  }
  CHECK(reopen(dir).is_ok());
  Before hooks(SysOp::kLock, 0, [&] {
    std::filesystem::remove(temp.path() + "/file");
    return 0;
  });
  const ScopedSyscallHooks scope(hooks);
  check_refused(reopen(dir), Code::kOsError, "in use by another process");
}

TEST_CASE("open_durable does not take a file that another wrote to for one that it created") {
  TempDir temp;
  const Directory dir = directory(temp);
  Before hooks(SysOp::kLock, 0, [&] {
    std::ofstream(temp.path() + "/file") << "bytes";
    return 0;
  });
  const ScopedSyscallHooks scope(hooks);
  check_refused(create(dir), Code::kOsError, "in use by another process");
}

TEST_CASE("open_durable falls back to buffered I/O and says so, only where direct was asked for") {
  TempDir temp;
  const Directory dir = directory(temp);
  {
    Fail hooks(SysOp::kOpen, EINVAL, 1 << 30, O_DIRECT);
    const ScopedSyscallHooks scope(hooks);
    const Result<SwapFile> file =
        open_durable(dir, "file", DurableOpen::kCreate, DurableIo::kDirect);
    REQUIRE_MESSAGE(file.is_ok(), file.status().to_string());
    CHECK_FALSE(file.value().direct);
    CHECK(contains(file.value().note, "no O_DIRECT"));
  }
  const Result<SwapFile> direct =
      open_durable(dir, "file", DurableOpen::kExisting, DurableIo::kDirect);
  REQUIRE_MESSAGE(direct.is_ok(), direct.status().to_string());
  const int flags = ::fcntl(direct.value().fd.get(), F_GETFL);
  CHECK(((flags & O_DIRECT) != 0) == direct.value().direct);
  CHECK_FALSE(contains(create(dir, "buffered").value().note, "no O_DIRECT"));
}

TEST_CASE("names and lengths change as asked") {
  TempDir temp;
  const Directory dir = directory(temp);
  must_create(dir, "from");
  must_create(dir, "to");
  {
    const Result<SwapFile> from = reopen(dir, "from");
    REQUIRE(from.is_ok());
    CHECK(truncate_file(from.value(), 12345).is_ok());
    CHECK(fdatasync_file(from.value().fd.get(), from.value().path).is_ok());
  }
  CHECK(rename_in_dir(dir, "from", "to").is_ok());
  CHECK(fsync_dir(dir).is_ok());
  CHECK_FALSE(exists_in_dir(dir, "from").value());
  {
    const Result<SwapFile> to = reopen(dir, "to");
    REQUIRE(to.is_ok());
    CHECK(file_size(to.value()).value() == 12345);
  }
  CHECK(unlink_in_dir(dir, "to").is_ok());
  CHECK(unlink_in_dir(dir, "to").os_errno() == ENOENT);
  CHECK(rename_in_dir(dir, "from", "to").os_errno() == ENOENT);
  CHECK(temp.empty());
}

TEST_CASE("each durable operation retries EINTR and reports what else goes wrong") {
  TempDir temp;
  const Directory dir = directory(temp);
  const Result<SwapFile> file = create(dir, "held");
  REQUIRE(file.is_ok());
  struct Case {
    SysOp op;
    const char* name;
    std::function<Status()> act;
  };
  const int fd = file.value().fd.get();
  const Case cases[] = {
      {SysOp::kFdatasync, "fdatasync", [&] { return fdatasync_file(fd, "held"); }},
      {SysOp::kFsync, "fsync", [&] { return fsync_dir(dir); }},
      {SysOp::kRename, "rename", [&] { return rename_in_dir(dir, "x", "y"); }},
      {SysOp::kUnlink, "unlink", [&] { return unlink_in_dir(dir, "y"); }},
      {SysOp::kFtruncate, "ftruncate", [&] { return truncate_file(file.value(), 7); }},
      {SysOp::kLock, "lock", [&] { return create(dir, "z").status(); }},
      {SysOp::kOpen, "create", [&] { return create(dir, "w").status(); }},
  };
  for (const Case& c : cases) {
    INFO(c.name);
    must_create(dir, c.op == SysOp::kUnlink ? "y" : "x");
    {
      Fail hooks(c.op, EIO);
      const ScopedSyscallHooks scope(hooks);
      const Status status = c.act();
      CHECK(status.os_errno() == EIO);
      CHECK(status.op() == c.name);
      CHECK_FALSE(status.path().empty());
    }
    std::filesystem::remove(temp.path() + "/z");
    {
      Fail hooks(c.op, EINTR, 20);
      const ScopedSyscallHooks scope(hooks);
      const Status status = c.act();
      CHECK_MESSAGE(status.is_ok(), status.to_string());
    }
    for (const char* name : {"x", "y", "z", "w"}) {
      std::filesystem::remove(temp.path() + "/" + name);
    }
  }
}

TEST_CASE("open_directory says what is wrong with a directory") {
  TempDir temp;
  CHECK(contains(open_directory(temp.path() + "/none").status().to_string(), "does not exist"));
  std::ofstream(temp.path() + "/file") << "x";
  CHECK(contains(open_directory(temp.path() + "/file").status().to_string(), "not a directory"));
}

TEST_CASE("random_uuid never repeats") {
  std::set<Uuid> seen;
  for (int i = 0; i < 100; ++i) {
    const Result<Uuid> uuid = random_uuid();
    REQUIRE(uuid.is_ok());
    CHECK(seen.insert(uuid.value()).second);
  }
}

}  // namespace offload
