#include "sys/read_only_file.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <cerrno>
#include <utility>

#include "base/align.h"
#include "sys/file_internal.h"

namespace offload {
namespace {

bool version_of(int fd, ReadOnlyFile::Version& version, bool& is_regular) {
  struct stat status = {};
  if (::fstat(fd, &status) != 0) return false;
  version.inode = status.st_ino;
  version.bytes = static_cast<std::uint64_t>(status.st_size);
  version.modified_ns =
      static_cast<std::int64_t>(status.st_mtim.tv_sec) * 1'000'000'000 + status.st_mtim.tv_nsec;
  is_regular = S_ISREG(status.st_mode);
  return true;
}

}  // namespace

Result<ReadOnlyFile> ReadOnlyFile::open(const std::string& path) {
  const int fd = internal::open_at(AT_FDCWD, path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return Status::from_errno(-fd, "open", path);
  ReadOnlyFile file;
  file.fd = UniqueFd(fd);
  file.path = path;
  bool is_regular = false;
  if (!version_of(fd, file.version, is_regular)) return Status::from_errno(errno, "fstat", path);
  if (!is_regular) return Status::error(Code::kInvalid, path + " is no regular file");
  // Requests are large, and what lies beyond one may be dropped before it is wanted.
  static_cast<void>(::posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM));
  return file;
}

bool ReadOnlyFile::is_unchanged() const {
  Version now;
  bool is_regular = false;
  return version_of(fd.get(), now, is_regular) && now == version;
}

void ReadOnlyFile::drop_cache(std::uint64_t offset, std::uint64_t nbytes) const {
  const std::uint64_t first = offset / kPageBytes * kPageBytes;
  const std::uint64_t end = align_up(offset + nbytes, kPageBytes);
  static_cast<void>(::posix_fadvise(fd.get(), static_cast<off_t>(first),
                                    static_cast<off_t>(end - first), POSIX_FADV_DONTNEED));
}

}  // namespace offload
