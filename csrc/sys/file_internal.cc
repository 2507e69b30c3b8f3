#include "sys/file_internal.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>

#include "base/align.h"
#include "sys/syscall_hooks.h"

namespace offload::internal {
namespace {

constexpr mode_t kMode = S_IRUSR | S_IWUSR;

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

Status stop_direct(SwapFile& file) {
  const int flags = ::fcntl(file.fd.get(), F_GETFL);
  if (flags < 0 || ::fcntl(file.fd.get(), F_SETFL, flags & ~O_DIRECT) != 0) {
    return Status::from_errno(errno, "fcntl", file.path);
  }
  file.direct = false;
  return Status::ok();
}

}  // namespace

void add_note(std::string& note, const std::string& text) {
  if (!note.empty()) note += "; ";
  note += text;
}

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

int ftruncate_retried(int fd, std::uint64_t bytes) {
  for (;;) {
    SysCall call{.op = SysOp::kFtruncate, .fd = fd, .nbytes = bytes};
    int err = hook_before(call);
    if (err == 0) err = ::ftruncate(fd, static_cast<off_t>(bytes)) == 0 ? 0 : errno;
    if (err != EINTR) return err;
  }
}

Status describe_file(SwapFile& file, const std::string& name, bool want_direct) {
  struct statfs fs = {};
  while (::fstatfs(file.fd.get(), &fs) != 0) {
    if (errno != EINTR) return Status::from_errno(errno, "statfs", file.path);
  }
  const auto type = static_cast<std::uint32_t>(fs.f_type);
  file.in_memory = type == TMPFS_MAGIC || type == RAMFS_MAGIC;
  const std::string where = type == TMPFS_MAGIC   ? name + " (tmpfs)"
                            : type == RAMFS_MAGIC ? name + " (ramfs)"
                                                  : name;

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
  if (want_direct && !file.direct) {
    add_note(file.note, where + " has no O_DIRECT: buffered I/O, swap pages count as memory");
  }
  if (file.in_memory) {
    add_note(file.note, where + " is memory, not a disk: what is swapped there stays in RAM");
  }
  return Status::ok();
}

}  // namespace offload::internal
