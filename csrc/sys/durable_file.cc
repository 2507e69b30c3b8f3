#include "sys/durable_file.h"

#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>

#include "sys/file_internal.h"
#include "sys/syscall_hooks.h"

namespace offload {
namespace {

constexpr mode_t kPrivate = S_IRUSR | S_IWUSR;
constexpr mode_t kOthers = S_IRWXG | S_IRWXO;

// `call` until it does not end in EINTR, through the hooks: 0 or errno.
template <typename Call>
int retried(SysOp op, int fd, Call call) {
  for (;;) {
    SysCall hooked{.op = op, .fd = fd};
    int err = hook_before(hooked);
    if (err == 0) err = call() == 0 ? 0 : errno;
    if (err != EINTR) return err;
  }
}

std::string path_of(const Directory& dir, const std::string& name) {
  return dir.path + "/" + name;
}

Status check_name(const Directory& dir, const std::string& name) {
  if (name.empty() || name == "." || name == ".." || name.find('/') != std::string::npos ||
      name.find('\0') != std::string::npos) {
    return Status::error(Code::kInvalid,
                         "'" + name + "' in " + dir.path + " is not the name of a file");
  }
  return Status::ok();
}

Status refuse(const std::string& path, const std::string& why) {
  return Status::error(Code::kInvalid, path + " " + why);
}

Status refuse_link(const std::string& path) {
  return refuse(path, "is a symbolic link, which is not followed; name the directory it points to");
}

Status in_use(const std::string& path) {
  return Status::from_errno(EWOULDBLOCK, "lock", path)
      .with_context("in use by another process, or opened twice by this one; close it there first");
}

Status check_kind(const struct stat& info, const std::string& path) {
  if (S_ISLNK(info.st_mode)) return refuse_link(path);
  if (!S_ISREG(info.st_mode)) return refuse(path, "is not a regular file; remove or rename it");
  return Status::ok();
}

Status check_private(const struct stat& info, const std::string& path) {
  if (info.st_uid != ::geteuid()) {
    return refuse(path, "belongs to user " + std::to_string(info.st_uid) + ", this is user " +
                            std::to_string(::geteuid()) + "; change its owner");
  }
  if ((info.st_mode & kOthers) != 0) {
    char mode[8];
    std::snprintf(mode, sizeof(mode), "%03o", static_cast<unsigned>(info.st_mode & 0777));
    return refuse(path, "has mode " + std::string(mode) + ", open to other users; chmod it to 600");
  }
  if (info.st_nlink != 1) {
    return refuse(path, "has " + std::to_string(info.st_nlink) +
                            " names; a change under one would show under the others: copy it");
  }
  return Status::ok();
}

// The whole file, for as long as its open file description lives.
Status lock(int fd, const std::string& path) {
  struct flock whole = {};
  whole.l_type = F_WRLCK;
  whole.l_whence = SEEK_SET;
  const int err = retried(SysOp::kLock, fd, [&] { return ::fcntl(fd, F_OFD_SETLK, &whole); });
  if (err == 0) return Status::ok();
  if (err == EWOULDBLOCK || err == EACCES) return in_use(path);
  return Status::from_errno(err, "lock", path)
      .with_context("the filesystem cannot lock files; name a directory on another");
}

// Makes the name with an empty file of mode 0600, whatever the umask.
Status create_empty(const Directory& dir, const std::string& name, const std::string& path) {
  const int result =
      internal::open_at(dir.fd.get(), name.c_str(), O_RDWR | O_CLOEXEC | O_CREAT | O_EXCL);
  if (result < 0) return Status::from_errno(-result, "create", path);
  UniqueFd fd(result);
  if (::fchmod(fd.get(), kPrivate) != 0) return Status::from_errno(errno, "chmod", path);
  return fd.close(path);
}

// Opened, locked, and at that moment the file that the name stands for.
Status open_existing(const Directory& dir, const std::string& name, DurableIo io, SwapFile& file) {
  struct stat named = {};
  if (::fstatat(dir.fd.get(), name.c_str(), &named, AT_SYMLINK_NOFOLLOW) != 0) {
    return Status::from_errno(errno, "open", file.path);
  }
  OFFLOAD_RETURN_IF_ERROR(check_kind(named, file.path));

  constexpr int kFlags = O_RDWR | O_CLOEXEC | O_NOFOLLOW;
  file.direct = io == DurableIo::kDirect;
  int result = internal::open_at(dir.fd.get(), name.c_str(), kFlags | (file.direct ? O_DIRECT : 0));
  if (file.direct && internal::is_refusal(result)) {
    file.direct = false;
    result = internal::open_at(dir.fd.get(), name.c_str(), kFlags);
  }
  if (result == -ELOOP) return refuse_link(file.path);
  if (result < 0) return Status::from_errno(-result, "open", file.path);
  file.fd = UniqueFd(result);
  OFFLOAD_RETURN_IF_ERROR(lock(file.fd.get(), file.path));

  struct stat opened = {};
  if (::fstat(file.fd.get(), &opened) != 0) return Status::from_errno(errno, "stat", file.path);
  OFFLOAD_RETURN_IF_ERROR(check_kind(opened, file.path));
  // A process that replaces a file locks the new one before it lets go of the old one.
  if (::fstatat(dir.fd.get(), name.c_str(), &named, AT_SYMLINK_NOFOLLOW) != 0) {
    return errno == ENOENT ? in_use(file.path) : Status::from_errno(errno, "stat", file.path);
  }
  if (named.st_dev != opened.st_dev || named.st_ino != opened.st_ino) return in_use(file.path);
  return check_private(opened, file.path);
}

}  // namespace

Result<Directory> open_directory(const std::string& path) {
  const int result = internal::open_at(AT_FDCWD, path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (result < 0) return internal::dir_error(-result, path);
  Directory dir;
  dir.fd = UniqueFd(result);
  dir.path = path;
  return dir;
}

Result<SwapFile> open_durable(const Directory& dir, const std::string& name, DurableOpen how,
                              DurableIo io) {
  OFFLOAD_RETURN_IF_ERROR(check_name(dir, name));
  SwapFile file;
  file.path = path_of(dir, name);
  if (how == DurableOpen::kCreate) OFFLOAD_RETURN_IF_ERROR(create_empty(dir, name, file.path));
  OFFLOAD_RETURN_IF_ERROR(open_existing(dir, name, io, file));
  if (how == DurableOpen::kCreate) {
    const Result<std::uint64_t> size = file_size(file);
    if (!size.is_ok()) return size.status();
    if (size.value() != 0) return in_use(file.path);
  }
  OFFLOAD_RETURN_IF_ERROR(internal::describe_file(file, file.path, io == DurableIo::kDirect));
  return file;
}

Status unlock_file(const SwapFile& file) {
  struct flock whole = {};
  whole.l_type = F_UNLCK;
  whole.l_whence = SEEK_SET;
  const int fd = file.fd.get();
  const int err = retried(SysOp::kLock, fd, [&] { return ::fcntl(fd, F_OFD_SETLK, &whole); });
  return err == 0 ? Status::ok() : Status::from_errno(err, "unlock", file.path);
}

Result<bool> exists_in_dir(const Directory& dir, const std::string& name) {
  OFFLOAD_RETURN_IF_ERROR(check_name(dir, name));
  struct stat info = {};
  if (::fstatat(dir.fd.get(), name.c_str(), &info, AT_SYMLINK_NOFOLLOW) == 0) return true;
  if (errno == ENOENT) return false;
  return Status::from_errno(errno, "stat", path_of(dir, name));
}

Status fdatasync_file(int fd, const std::string& path) {
  const int err = retried(SysOp::kFdatasync, fd, [fd] { return ::fdatasync(fd); });
  return err == 0 ? Status::ok() : Status::from_errno(err, "fdatasync", path);
}

Status fsync_dir(const Directory& dir) {
  const int fd = dir.fd.get();
  const int err = retried(SysOp::kFsync, fd, [fd] { return ::fsync(fd); });
  return err == 0 ? Status::ok() : Status::from_errno(err, "fsync", dir.path);
}

Status rename_in_dir(const Directory& dir, const std::string& from, const std::string& to) {
  const int fd = dir.fd.get();
  const int err =
      retried(SysOp::kRename, fd, [&] { return ::renameat(fd, from.c_str(), fd, to.c_str()); });
  if (err == 0) return Status::ok();
  return Status::from_errno(err, "rename", path_of(dir, from)).with_context("to '" + to + "'");
}

Status unlink_in_dir(const Directory& dir, const std::string& name) {
  const int fd = dir.fd.get();
  const int err = retried(SysOp::kUnlink, fd, [&] { return ::unlinkat(fd, name.c_str(), 0); });
  return err == 0 ? Status::ok() : Status::from_errno(err, "unlink", path_of(dir, name));
}

Status truncate_file(const SwapFile& file, std::uint64_t bytes) {
  const int err = internal::ftruncate_retried(file.fd.get(), bytes);
  return err == 0 ? Status::ok() : Status::from_errno(err, "ftruncate", file.path);
}

Result<std::uint64_t> file_size(const SwapFile& file) {
  struct stat info = {};
  if (::fstat(file.fd.get(), &info) != 0) return Status::from_errno(errno, "stat", file.path);
  return static_cast<std::uint64_t>(info.st_size);
}

Result<Uuid> random_uuid() {
  Uuid uuid{};
  ssize_t got = -1;
  do {
    got = ::getrandom(uuid.data(), uuid.size(), 0);
  } while (got < 0 && errno == EINTR);
  if (got < 0) return Status::from_errno(errno, "getrandom", "");
  if (static_cast<std::size_t>(got) != uuid.size()) {
    return Status::error(Code::kOsError, "the system's random source is not ready");
  }
  return uuid;
}

}  // namespace offload
