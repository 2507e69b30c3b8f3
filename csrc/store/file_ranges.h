// FileRanges: bytes that live in files of others, read to where they belong in one buffer.
//
// The counterpart of a swap object for what is never written: frozen weights in a checkpoint.
//  1. what a range is made of is read in blocks, exactly to its place: offsets in such files are
//     multiples of nothing, which direct I/O needs, so reads are buffered, and each block's page
//     cache is dropped when it was copied.
//  2. the first read of a block notes its CRC32C; each later one compares. A file that was changed
//     or cut short since is kCorrupt, naming it and the part.
// Thread-safe, but for reads of the same FileRanges at once, which are refused. REQUIRES: whoever
// made the engine closes it, and keeps it until then; a read may be what ends the last ranges, on a
// thread of the engine.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "io/io_engine.h"
#include "sys/read_only_file.h"

namespace offload {

class FileRanges : public std::enable_shared_from_this<FileRanges> {
 public:
  struct Part {
    std::shared_ptr<const ReadOnlyFile> file;
    std::uint64_t offset = 0;  // in the file
    std::uint64_t nbytes = 0;  // > 0
    std::uint64_t at = 0;      // in the buffer
    std::string name;          // for messages
  };
  // [begin, end) of the buffer.
  struct Span {
    std::uint64_t begin = 0;
    std::uint64_t end = 0;
  };
  // Called once, when all blocks of a read are done; the first error. On an engine thread.
  using Completion = std::function<void(const Status&)>;

  // kInvalid when there are no parts, or one ends beyond the end of its file.
  static Result<std::shared_ptr<FileRanges>> create(std::shared_ptr<IoEngine> engine,
                                                    std::vector<Part> parts,
                                                    std::uint64_t block_bytes);

  // Bytes that the buffer must have: where the last part ends.
  std::uint64_t buffer_bytes() const { return buffer_bytes_; }
  // Starts to read all parts; bytes between them stay as they are. When it fails, nothing was
  // started and `done` is not called.
  Status read(std::byte* buffer, IoPriority priority, Completion done,
              const std::atomic<bool>* cancel = nullptr);
  // Where the blocks lie that can be read by themselves.
  std::vector<Span> blocks() const;
  // The same as read() for the blocks within `spans` alone, which are ascending; kInvalid when
  // these do not begin and end with a block, or have none.
  Status read_blocks(std::byte* buffer, std::span<const Span> spans, IoPriority priority,
                     Completion done, const std::atomic<bool>* cancel = nullptr);

 private:
  struct Block {
    std::size_t part = 0;
    std::uint64_t first = 0;  // in the part
    std::uint64_t nbytes = 0;
    std::uint32_t crc = 0;
    bool is_known = false;  // crc
  };
  class Request;
  struct Group;

  FileRanges(std::shared_ptr<IoEngine> engine, std::vector<Part> parts, std::uint64_t block_bytes);
  Span span_of(const Block& block) const;
  Status start(std::byte* buffer, std::span<Block* const> blocks, IoPriority priority,
               Completion done, const std::atomic<bool>* cancel);
  Status verify(Block& block, const std::byte* data, const Status& read);

  const std::shared_ptr<IoEngine> engine_;
  const std::vector<Part> parts_;
  std::vector<Block> blocks_;  // by place in the buffer; one read at a time uses them
  std::uint64_t buffer_bytes_ = 0;
  std::atomic<bool> busy_{false};
};

}  // namespace offload
