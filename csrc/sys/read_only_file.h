// A file that somebody else wrote and may change: a checkpoint.
#pragma once

#include <cstdint>
#include <string>

#include "base/status.h"
#include "sys/unique_fd.h"

namespace offload {

struct ReadOnlyFile {
  // What changes when the file is written to, or another one has taken its name.
  struct Version {
    std::uint64_t inode = 0;
    std::uint64_t bytes = 0;
    std::int64_t modified_ns = 0;

    bool operator==(const Version&) const = default;
  };

  UniqueFd fd;
  std::string path;  // for messages
  Version version;   // when it was opened

  // Opened buffered: what is read lies at any offset. Links are followed, as hubs make them; what
  // is no regular file is refused (kInvalid), without waiting for a writer as a FIFO would.
  static Result<ReadOnlyFile> open(const std::string& path);

  // Whether the open file is still of that version; its name may be gone.
  bool is_unchanged() const;

  // Gives up the page cache of a range, whole pages around it: it was copied to where it is used,
  // and would grow to the size of the file. Best effort: a cache is no result.
  void drop_cache(std::uint64_t offset, std::uint64_t nbytes) const;
};

}  // namespace offload
