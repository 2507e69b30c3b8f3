// What the kinds of files in sys share: opening and describing them. For sys only.
//
// Free functions, safe from any thread unless they share a SwapFile.
#pragma once

#include <cstdint>
#include <string>

#include "base/status.h"
#include "sys/file.h"

namespace offload::internal {

void add_note(std::string& note, const std::string& text);

// openat(2) with mode 0600, retried on EINTR: a descriptor, or -errno.
int open_at(int dir_fd, const char* name, int flags);

// True when `result` of an open is a filesystem that does not know one of its flags.
bool is_refusal(int result);

// Why `dir` cannot be used for swap files, and what to do.
Status dir_error(int err, const std::string& dir);

// ftruncate(2), retried on EINTR: 0 or errno.
int ftruncate_retried(int fd, std::uint64_t bytes);

// Fills in all but the descriptor, the path and `direct`, which may be taken back. `name` stands
// for the file in notes and errors; one note says so where `want_direct` and there is none.
Status describe_file(SwapFile& file, const std::string& name, bool want_direct);

}  // namespace offload::internal
