#include "sys/file.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdio>

#include "base/align.h"
#include "base/format.h"
#include "sys/syscall_hooks.h"

namespace offload {
namespace {

constexpr mode_t kMode = S_IRUSR | S_IWUSR;
constexpr int kFlags = O_RDWR | O_CLOEXEC;

void add_note(std::string& note, const std::string& text) {
  if (!note.empty()) note += "; ";
  note += text;
}

// openat(2), retried on EINTR: a descriptor, or -errno.
int open_at(int dir_fd, const char* name, int flags) {
  for (;;) {
    SysCall call{.op = SysOp::kOpen, .fd = dir_fd, .flags = flags};
    int err = hook_before(call);
    if (err == 0) {
      const int fd = ::openat(dir_fd, name, flags, kMode);
      if (fd >= 0) return fd;
      err = errno;
    }
    if (err != EINTR) return -err;
  }
}

// Creates a file under a random name and unlinks it: a descriptor, or -errno.
int open_named(int dir_fd, int extra_flags) {
  std::uint64_t random[2];
  if (::getrandom(random, sizeof(random), 0) != static_cast<ssize_t>(sizeof(random))) {
    return -EAGAIN;
  }
  char name[64];
  std::snprintf(name, sizeof(name), ".offload-%016llx%016llx",
                static_cast<unsigned long long>(random[0]),
                static_cast<unsigned long long>(random[1]));
  const int fd = open_at(dir_fd, name, kFlags | O_CREAT | O_EXCL | O_NOFOLLOW | extra_flags);
  if (fd == -EEXIST) return fd;
  // Also after a failure: a filesystem that refuses O_DIRECT does so after creating the file.
  if (::unlinkat(dir_fd, name, 0) != 0 && fd >= 0) {
    const int err = errno;
    ::close(fd);
    return -err;
  }
  return fd;
}

bool is_refusal(int result) {
  return result == -EOPNOTSUPP || result == -EISDIR || result == -EINVAL;
}

Status dir_error(int err, const std::string& dir) {
  const Status status = Status::from_errno(err, "open", dir);
  switch (err) {
    case ENOENT:
      return status.with_context("the swap directory does not exist; create it or name another");
    case ENOTDIR:
      return status.with_context("the swap directory is not a directory; name a directory");
    case EACCES:
    case EPERM:
      return status.with_context(
          "no file can be created in the swap directory; grant this user write and search "
          "permission or name another");
    case EROFS:
      return status.with_context(
          "the swap directory is on a read-only filesystem; name a writable one");
    case ENOSPC:
    case EDQUOT:
      return status.with_context("no room for a new file in the swap directory; free some space");
    default:
      return status.with_context("cannot create a swap file");
  }
}

// What statx says about direct I/O on `fd`: its alignment; 0 when the file has none; kPageBytes
// when the kernel does not say.
std::size_t direct_alignment(int fd) {
#ifdef STATX_DIOALIGN
  struct statx info = {};
  if (::statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &info) == 0 &&
      (info.stx_mask & STATX_DIOALIGN) != 0) {
    return std::max(info.stx_dio_mem_align, info.stx_dio_offset_align);
  }
#else
  static_cast<void>(fd);
#endif
  return kPageBytes;
}

// Opens with the most that the filesystem takes, O_DIRECT before namelessness: a file that is
// unlinked at once leaves nothing behind either, buffered pages count as memory.
Status open_file(int dir_fd, SwapFile& file) {
  int result = -EINVAL;
  bool unnamed = true;
  for (const bool direct : {true, false}) {
    const int extra = direct ? O_DIRECT : 0;
    file.direct = direct;
    unnamed = true;
    result = open_at(dir_fd, ".", kFlags | O_TMPFILE | extra);
    if (is_refusal(result)) {
      unnamed = false;
      result = open_named(dir_fd, extra);
    }
    if (!is_refusal(result)) break;
  }
  if (result < 0) return dir_error(-result, file.path);
  file.fd = UniqueFd(result);
  if (!unnamed) add_note(file.note, file.path + " has no O_TMPFILE: created and unlinked at once");
  return Status::ok();
}

Status stop_direct(SwapFile& file) {
  const int flags = ::fcntl(file.fd.get(), F_GETFL);
  if (flags < 0 || ::fcntl(file.fd.get(), F_SETFL, flags & ~O_DIRECT) != 0) {
    return Status::from_errno(errno, "fcntl", file.path);
  }
  file.direct = false;
  return Status::ok();
}

int fallocate_retried(int fd, std::uint64_t bytes) {
  for (;;) {
    SysCall call{.op = SysOp::kFallocate, .fd = fd, .nbytes = bytes};
    int err = hook_before(call);
    if (err == 0) err = ::fallocate(fd, 0, 0, static_cast<off_t>(bytes)) == 0 ? 0 : errno;
    if (err != EINTR) return err;
  }
}

int ftruncate_retried(int fd, std::uint64_t bytes) {
  for (;;) {
    SysCall call{.op = SysOp::kFtruncate, .fd = fd, .nbytes = bytes};
    int err = hook_before(call);
    if (err == 0) err = ::ftruncate(fd, static_cast<off_t>(bytes)) == 0 ? 0 : errno;
    if (err != EINTR) return err;
  }
}

std::string exact_and_human(std::uint64_t bytes) {
  return std::to_string(bytes) + " bytes (" + human_bytes(bytes) + ")";
}

Status no_space(const SwapFile& file, std::uint64_t needed, std::uint64_t free) {
  return Status::from_errno(ENOSPC, "reserve", file.path)
      .with_context("needs " + exact_and_human(needed) + " more, " + exact_and_human(free) +
                    " free");
}

Result<std::uint64_t> free_bytes(const SwapFile& file) {
  struct statvfs fs = {};
  while (::fstatvfs(file.fd.get(), &fs) != 0) {
    if (errno != EINTR) return Status::from_errno(errno, "statvfs", file.path);
  }
  return std::uint64_t{fs.f_bavail} * fs.f_frsize;
}

}  // namespace

Result<SwapFile> open_scratch(const std::string& dir) {
  const int dir_result = open_at(AT_FDCWD, dir.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC);
  if (dir_result < 0) return dir_error(-dir_result, dir);
  const UniqueFd dir_fd(dir_result);

  SwapFile file;
  file.path = dir;
  OFFLOAD_RETURN_IF_ERROR(open_file(dir_fd.get(), file));

  struct statfs fs = {};
  while (::fstatfs(file.fd.get(), &fs) != 0) {
    if (errno != EINTR) return Status::from_errno(errno, "statfs", dir);
  }
  const auto type = static_cast<std::uint32_t>(fs.f_type);
  file.in_memory = type == TMPFS_MAGIC || type == RAMFS_MAGIC;
  const std::string where = type == TMPFS_MAGIC   ? dir + " (tmpfs)"
                            : type == RAMFS_MAGIC ? dir + " (ramfs)"
                                                  : dir;

  file.alignment = kPageBytes;
  if (file.direct) {
    const std::size_t alignment = direct_alignment(file.fd.get());
    if (alignment > kPageBytes || (alignment != 0 && !std::has_single_bit(alignment))) {
      return Status::error(Code::kUnsupported, where + " needs direct I/O in multiples of " +
                                                   std::to_string(alignment) + " bytes; at most " +
                                                   std::to_string(kPageBytes) +
                                                   " is supported: name another directory");
    }
    if (alignment == 0) {
      OFFLOAD_RETURN_IF_ERROR(stop_direct(file));
    } else {
      file.alignment = alignment;
    }
  }
  if (!file.direct) {
    add_note(file.note, where + " has no O_DIRECT: buffered I/O, swap pages count as memory");
  }
  if (file.in_memory) {
    add_note(file.note, where + " is memory, not a disk: what is swapped there stays in RAM");
  }
  return file;
}

Status reserve_space(SwapFile& file, std::uint64_t bytes) {
  const int fd = file.fd.get();
  struct stat info = {};
  if (::fstat(fd, &info) != 0) return Status::from_errno(errno, "stat", file.path);
  const auto former_size = static_cast<std::uint64_t>(info.st_size);
  const std::uint64_t allocated = static_cast<std::uint64_t>(info.st_blocks) * 512;
  const std::uint64_t needed = bytes > allocated ? bytes - allocated : 0;

  Result<std::uint64_t> free = free_bytes(file);
  if (!free.is_ok()) return free.status();
  if (needed > free.value()) return no_space(file, needed, free.value());
  if (bytes == 0) return Status::ok();

  int err = fallocate_retried(fd, bytes);
  if (err == 0) return Status::ok();
  if (err == EOPNOTSUPP || err == ENOSYS) {
    if (bytes <= former_size) return Status::ok();
    err = ftruncate_retried(fd, bytes);
    if (err != 0) return Status::from_errno(err, "ftruncate", file.path);
    const std::string warning = file.path + " cannot reserve space: a write may find the disk full";
    if (file.note.find(warning) == std::string::npos) add_note(file.note, warning);
    return Status::ok();
  }
  // What fallocate got hold of before it failed is given back.
  const int undo = ftruncate_retried(fd, former_size);
  if (undo != 0) {
    return Status::from_errno(undo, "ftruncate", file.path)
        .with_context("giving back a failed reservation");
  }
  if (err != ENOSPC && err != EDQUOT) return Status::from_errno(err, "fallocate", file.path);
  Result<std::uint64_t> free_now = free_bytes(file);
  if (!free_now.is_ok()) return free_now.status();
  const Status status = no_space(file, needed, free_now.value());
  return err == ENOSPC ? status : status.with_context("the disk quota is used up");
}

std::int64_t pread_some(int fd, std::byte* buffer, std::size_t nbytes, std::uint64_t offset) {
  SysCall call{.op = SysOp::kPread, .fd = fd, .nbytes = nbytes, .offset = offset};
  const int err = hook_before(call);
  if (err != 0) return -err;
  const ssize_t moved = ::pread(fd, buffer, call.nbytes, static_cast<off_t>(offset));
  return moved < 0 ? -errno : moved;
}

std::int64_t pwrite_some(int fd, const std::byte* buffer, std::size_t nbytes,
                         std::uint64_t offset) {
  SysCall call{.op = SysOp::kPwrite, .fd = fd, .nbytes = nbytes, .offset = offset};
  const int err = hook_before(call);
  if (err != 0) return -err;
  const ssize_t moved = ::pwrite(fd, buffer, call.nbytes, static_cast<off_t>(offset));
  return moved < 0 ? -errno : moved;
}

}  // namespace offload
