#include "store/file_ranges.h"

#include <algorithm>
#include <mutex>
#include <utility>

#include "base/crc32c.h"

namespace offload {

class FileRanges::Request final : public IoRequest {
 public:
  void complete(Status status) override;

  Group* group = nullptr;
  Block* block = nullptr;
};

// One read; ends with the last of its requests.
struct FileRanges::Group {
  void block_done(const Status& status);

  std::shared_ptr<FileRanges> owner;
  std::vector<Request> requests;
  Completion done;
  std::atomic<std::size_t> left{0};
  std::mutex mutex;
  Status first_error;  // guarded by mutex
};

void FileRanges::Request::complete(Status status) {
  const Part& part = group->owner->parts_[block->part];
  part.file->drop_cache(offset, nbytes);
  group->block_done(group->owner->verify(*block, buffer, status));
}

void FileRanges::Group::block_done(const Status& status) {
  if (!status.is_ok()) {
    std::lock_guard<std::mutex> lock(mutex);
    if (first_error.is_ok()) first_error = status;
  }
  if (left.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  const std::unique_ptr<Group> ended(this);
  Status outcome;
  {
    std::lock_guard<std::mutex> lock(mutex);
    outcome = first_error;
  }
  owner->busy_ = false;
  done(outcome);
}

FileRanges::FileRanges(std::shared_ptr<IoEngine> engine, std::vector<Part> parts,
                       std::uint64_t block_bytes)
    : engine_(std::move(engine)), parts_(std::move(parts)) {
  for (std::size_t i = 0; i < parts_.size(); ++i) {
    for (std::uint64_t first = 0; first < parts_[i].nbytes; first += block_bytes) {
      blocks_.push_back({i, first, std::min(block_bytes, parts_[i].nbytes - first)});
    }
    buffer_bytes_ = std::max(buffer_bytes_, parts_[i].at + parts_[i].nbytes);
  }
  std::sort(blocks_.begin(), blocks_.end(),
            [this](const Block& a, const Block& b) { return span_of(a).begin < span_of(b).begin; });
}

FileRanges::Span FileRanges::span_of(const Block& block) const {
  const std::uint64_t begin = parts_[block.part].at + block.first;
  return {begin, begin + block.nbytes};
}

std::vector<FileRanges::Span> FileRanges::blocks() const {
  std::vector<Span> spans;
  spans.reserve(blocks_.size());
  for (const Block& block : blocks_) spans.push_back(span_of(block));
  return spans;
}

Result<std::shared_ptr<FileRanges>> FileRanges::create(std::shared_ptr<IoEngine> engine,
                                                       std::vector<Part> parts,
                                                       std::uint64_t block_bytes) {
  if (parts.empty() || block_bytes == 0) {
    return Status::error(Code::kInvalid, "ranges of files need parts and a block size");
  }
  for (const Part& part : parts) {
    const std::uint64_t size = part.file->version.bytes;
    if (part.nbytes == 0 || part.offset > size || part.nbytes > size - part.offset) {
      return Status::error(Code::kInvalid, part.name + " does not lie within " + part.file->path +
                                               ", which has " + std::to_string(size) + " bytes");
    }
  }
  return std::shared_ptr<FileRanges>(
      new FileRanges(std::move(engine), std::move(parts), block_bytes));
}

Status FileRanges::read(std::byte* buffer, IoPriority priority, Completion done,
                        const std::atomic<bool>* cancel) {
  std::vector<Block*> blocks;
  blocks.reserve(blocks_.size());
  for (Block& block : blocks_) blocks.push_back(&block);
  return start(buffer, blocks, priority, std::move(done), cancel);
}

Status FileRanges::read_blocks(std::byte* buffer, std::span<const Span> spans, IoPriority priority,
                               Completion done, const std::atomic<bool>* cancel) {
  std::vector<Block*> blocks;
  auto next = blocks_.begin();
  for (const Span& span : spans) {
    while (next != blocks_.end() && span_of(*next).begin < span.begin) ++next;
    const std::size_t before = blocks.size();
    for (; next != blocks_.end() && span_of(*next).end <= span.end; ++next) {
      blocks.push_back(&*next);
    }
    if (blocks.size() == before || span_of(*blocks[before]).begin != span.begin ||
        span_of(*blocks.back()).end != span.end) {
      return Status::error(Code::kInvalid, "[" + std::to_string(span.begin) + ", " +
                                               std::to_string(span.end) +
                                               ") are not whole blocks of ranges of files");
    }
  }
  if (blocks.empty()) return Status::error(Code::kInvalid, "a read of no blocks");
  return start(buffer, blocks, priority, std::move(done), cancel);
}

Status FileRanges::start(std::byte* buffer, std::span<Block* const> blocks, IoPriority priority,
                         Completion done, const std::atomic<bool>* cancel) {
  if (busy_.exchange(true)) {
    return Status::error(Code::kInvalid, "a read of the same ranges of files is in flight");
  }
  auto group = std::make_unique<Group>();
  group->owner = shared_from_this();
  group->requests.resize(blocks.size());
  group->done = std::move(done);
  group->left = blocks.size();
  std::vector<IoRequest*> batch;
  batch.reserve(blocks.size());
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    Block& block = *blocks[i];
    const Part& part = parts_[block.part];
    Request& request = group->requests[i];
    request.group = group.get();
    request.block = &block;
    request.op = IoOp::kRead;
    request.priority = priority;
    request.fd = part.file->fd.get();
    request.path = part.file->path.c_str();
    request.buffer = buffer + part.at + block.first;
    request.nbytes = block.nbytes;
    request.offset = part.offset + block.first;
    request.cancel = cancel;
    batch.push_back(&request);
  }
  const Status submitted = engine_->submit(batch);
  if (!submitted.is_ok()) {
    busy_ = false;
    return submitted;
  }
  static_cast<void>(group.release());  // by its last request
  return Status::ok();
}

Status FileRanges::verify(Block& block, const std::byte* data, const Status& read) {
  const Part& part = parts_[block.part];
  const std::string what = part.name + " in " + part.file->path;
  if (!read.is_ok()) {
    if (read.code() != Code::kCorrupt) return read;
    return Status::error(Code::kCorrupt, what + ": the file was cut short since it was opened");
  }
  const std::uint32_t crc = crc32c(data, block.nbytes);
  if (!block.is_known) {
    if (!part.file->is_unchanged()) {
      return Status::error(Code::kCorrupt, what + ": the file was changed since it was opened");
    }
    block.crc = crc;
    block.is_known = true;
    return Status::ok();
  }
  if (crc == block.crc) return Status::ok();
  return Status::error(
      Code::kCorrupt,
      what + ": other bytes than when it was first read (checksum mismatch at " + "offset " +
          std::to_string(part.offset + block.first) + "); " +
          (part.file->is_unchanged() ? "the disk returned them" : "the file was changed since"));
}

}  // namespace offload
