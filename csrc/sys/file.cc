#include "sys/file.h"

#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>

#include "base/align.h"
#include "base/format.h"
#include "sys/file_internal.h"
#include "sys/syscall_hooks.h"

namespace offload {
namespace {

constexpr int kFlags = O_RDWR | O_CLOEXEC;

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
  const int fd =
      internal::open_at(dir_fd, name, kFlags | O_CREAT | O_EXCL | O_NOFOLLOW | extra_flags);
  if (fd == -EEXIST) return fd;
  // Also after a failure: a filesystem that refuses O_DIRECT does so after creating the file.
  if (::unlinkat(dir_fd, name, 0) != 0 && fd >= 0) {
    const int err = errno;
    ::close(fd);
    return -err;
  }
  return fd;
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
    result = internal::open_at(dir_fd, ".", kFlags | O_TMPFILE | extra);
    if (internal::is_refusal(result)) {
      unnamed = false;
      result = open_named(dir_fd, extra);
    }
    if (!internal::is_refusal(result)) break;
  }
  if (result < 0) return internal::dir_error(-result, file.path);
  file.fd = UniqueFd(result);
  if (!unnamed) {
    internal::add_note(file.note, file.path + " has no O_TMPFILE: created and unlinked at once");
  }
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

std::string exact_and_human(std::uint64_t bytes) {
  return std::to_string(bytes) + " bytes (" + human_bytes(bytes) + ")";
}

Status no_space(const SwapFile& file, std::uint64_t needed, std::uint64_t free) {
  return Status::from_errno(ENOSPC, "reserve", file.path)
      .with_context("needs " + exact_and_human(needed) + " more, " + exact_and_human(free) +
                    " free");
}

}  // namespace

Result<SwapFile> open_scratch(const std::string& dir) {
  const int dir_result = internal::open_at(AT_FDCWD, dir.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC);
  if (dir_result < 0) return internal::dir_error(-dir_result, dir);
  const UniqueFd dir_fd(dir_result);

  SwapFile file;
  file.path = dir;
  OFFLOAD_RETURN_IF_ERROR(open_file(dir_fd.get(), file));

  OFFLOAD_RETURN_IF_ERROR(internal::describe_file(file, dir, true));
  return file;
}

Result<std::uint64_t> free_space(const SwapFile& file) {
  struct statvfs fs = {};
  while (::fstatvfs(file.fd.get(), &fs) != 0) {
    if (errno != EINTR) return Status::from_errno(errno, "statvfs", file.path);
  }
  return std::uint64_t{fs.f_bavail} * fs.f_frsize;
}

Status reserve_space(SwapFile& file, std::uint64_t bytes) {
  const int fd = file.fd.get();
  struct stat info = {};
  if (::fstat(fd, &info) != 0) return Status::from_errno(errno, "stat", file.path);
  const auto former_size = static_cast<std::uint64_t>(info.st_size);
  const std::uint64_t allocated = static_cast<std::uint64_t>(info.st_blocks) * 512;
  const std::uint64_t needed = bytes > allocated ? bytes - allocated : 0;

  Result<std::uint64_t> free = free_space(file);
  if (!free.is_ok()) return free.status();
  if (needed > free.value()) return no_space(file, needed, free.value());
  if (bytes == 0) return Status::ok();

  int err = fallocate_retried(fd, bytes);
  if (err == 0) return Status::ok();
  if (err == EOPNOTSUPP || err == ENOSYS) {
    if (bytes <= former_size) return Status::ok();
    err = internal::ftruncate_retried(fd, bytes);
    if (err != 0) return Status::from_errno(err, "ftruncate", file.path);
    const std::string warning = file.path + " cannot reserve space: a write may find the disk full";
    if (file.note.find(warning) == std::string::npos) internal::add_note(file.note, warning);
    return Status::ok();
  }
  // What fallocate got hold of before it failed is given back.
  const int undo = internal::ftruncate_retried(fd, former_size);
  if (undo != 0) {
    return Status::from_errno(undo, "ftruncate", file.path)
        .with_context("giving back a failed reservation");
  }
  if (err != ENOSPC && err != EDQUOT) return Status::from_errno(err, "fallocate", file.path);
  Result<std::uint64_t> free_now = free_space(file);
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

Status read_all(const SwapFile& file, std::span<std::byte> bytes, std::uint64_t offset) {
  while (!bytes.empty()) {
    const std::int64_t moved = pread_some(file.fd.get(), bytes.data(), bytes.size(), offset);
    if (moved == -EINTR) continue;
    if (moved == 0) {
      return Status::error(Code::kCorrupt, file.path + " ends at offset " + std::to_string(offset) +
                                               ", " + std::to_string(bytes.size()) +
                                               " bytes too early");
    }
    if (moved < 0) {
      return Status::from_errno(static_cast<int>(-moved), "pread", file.path,
                                static_cast<std::int64_t>(offset));
    }
    bytes = bytes.subspan(static_cast<std::size_t>(moved));
    offset += static_cast<std::uint64_t>(moved);
  }
  return Status::ok();
}

Status write_all(const SwapFile& file, std::span<const std::byte> bytes, std::uint64_t offset) {
  while (!bytes.empty()) {
    const std::int64_t moved = pwrite_some(file.fd.get(), bytes.data(), bytes.size(), offset);
    if (moved == -EINTR) continue;
    if (moved <= 0) {
      return Status::from_errno(moved == 0 ? EIO : static_cast<int>(-moved), "pwrite", file.path,
                                static_cast<std::int64_t>(offset));
    }
    bytes = bytes.subspan(static_cast<std::size_t>(moved));
    offset += static_cast<std::uint64_t>(moved);
  }
  return Status::ok();
}

}  // namespace offload
