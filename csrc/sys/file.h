// The file syscalls: scratch files, reserved space, positioned I/O.
//
// Free functions, safe from any thread unless they share a SwapFile that one of them changes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "base/status.h"
#include "sys/unique_fd.h"

namespace offload {

// A file without a name: it is gone when the descriptor is, whatever ends the process.
struct SwapFile {
  UniqueFd fd;
  std::string path;           // of its directory; for messages
  bool direct = false;        // opened with O_DIRECT
  bool in_memory = false;     // the filesystem is tmpfs or ramfs
  std::size_t alignment = 1;  // of offsets, sizes and buffers; a power of two, <= kPageBytes
  std::string note;           // the fallbacks taken, for people; empty when there were none
};

// A scratch file in `dir`. Where the filesystem lacks O_TMPFILE it is created under a random name
// and unlinked at once; where it lacks O_DIRECT I/O is buffered; `note` names each. Errors: the
// directory is missing, not a directory, not writable (the Status says what to do); kUnsupported
// when direct I/O needs more than kPageBytes alignment.
Result<SwapFile> open_scratch(const std::string& dir);

// Bytes that this user can still write on the file's filesystem.
Result<std::uint64_t> free_space(const SwapFile& file);

// Makes the file at least `bytes` long with its blocks allocated, so that no later write runs out
// of space. kNoSpace (path, needed, free) leaves the file at its former length. Where the
// filesystem cannot reserve, the file is only extended and `note` says so.
Status reserve_space(SwapFile& file, std::uint64_t bytes);

// One pread(2)/pwrite(2): bytes moved, or -errno. Short counts, EINTR and end of file are the
// caller's to handle.
[[nodiscard]] std::int64_t pread_some(int fd, std::byte* buffer, std::size_t nbytes,
                                      std::uint64_t offset);
[[nodiscard]] std::int64_t pwrite_some(int fd, const std::byte* buffer, std::size_t nbytes,
                                       std::uint64_t offset);

// The same for all of `bytes`: short transfers are continued, EINTR is retried. A file that ends
// within a read is kCorrupt. For what is not on a fast path.
Status read_all(const SwapFile& file, std::span<std::byte> bytes, std::uint64_t offset);
Status write_all(const SwapFile& file, std::span<const std::byte> bytes, std::uint64_t offset);

}  // namespace offload
