// Files with a name, for what must outlive the process: checked when opened, locked against other
// processes, and the syscalls that make bytes and names durable.
//
// Contract: a name is durable once fsync_dir() of its directory succeeded after it was made, a
// file's bytes once fdatasync_file() did. After either failed nothing may be assumed of what it
// covered, not even by calling it again (the kernel reports a lost write once). Every function
// retries EINTR and goes through the syscall hooks. Free functions, safe from any thread unless
// they share an object that one of them changes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "base/status.h"
#include "sys/file.h"
#include "sys/unique_fd.h"

namespace offload {

struct Directory {
  UniqueFd fd;
  std::string path;
};

// An existing directory. Errors as open_scratch's.
Result<Directory> open_directory(const std::string& path);

enum class DurableOpen : std::uint8_t {
  kCreate,    // EEXIST when the name is taken, by whatever
  kExisting,  // ENOENT when there is none
};
enum class DurableIo : std::uint8_t {
  kDirect,  // O_DIRECT where the filesystem has it; SwapFile::note says where not
  kBuffered,
};

// The regular file `name` in `dir`, locked: until the descriptor is closed (by whatever ends the
// process, and in every child that was forked with it) no other open_durable() of it succeeds, in
// this process or another. `path` of the result is the file's. A created file has mode 0600; its
// name is not durable yet. Refused, with a sentence that says what to do: a symbolic link, anything
// but a regular file, a file of another user, one that others may read or write, one with a second
// name (kInvalid); a file that is locked or was replaced meanwhile (kOsError, EWOULDBLOCK: "in use
// by another process"). After a failure the directory is as it was, save that an empty file may be
// left by kCreate.
Result<SwapFile> open_durable(const Directory& dir, const std::string& name, DurableOpen how,
                              DurableIo io);

// Gives the lock up now, whoever else still has the descriptor (a forked child, the kernel).
Status unlock_file(const SwapFile& file);

// Whether `dir` has an entry `name`, of whatever kind.
Result<bool> exists_in_dir(const Directory& dir, const std::string& name);

// `path` is for the message only.
Status fdatasync_file(int fd, const std::string& path);
Status fsync_dir(const Directory& dir);
// Replaces `to` where it exists. Neither this nor unlink_in_dir() is durable before fsync_dir().
Status rename_in_dir(const Directory& dir, const std::string& from, const std::string& to);
// ENOENT is an error.
Status unlink_in_dir(const Directory& dir, const std::string& name);
// Shortens or extends (by zeros) to `bytes`.
Status truncate_file(const SwapFile& file, std::uint64_t bytes);
// Length in bytes.
Result<std::uint64_t> file_size(const SwapFile& file);

// 16 bytes from the system's random source, to tell one store from every other.
using Uuid = std::array<std::uint8_t, 16>;
Result<Uuid> random_uuid();

}  // namespace offload
