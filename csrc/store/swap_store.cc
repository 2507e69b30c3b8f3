#include "store/swap_store.h"

#include <algorithm>
#include <utility>

#include "base/align.h"
#include "base/crc32c.h"

namespace offload {

namespace {

// What a file can hold; anything below it can be added up and turned into bytes without overflow.
constexpr std::uint64_t kMaxSlots = (std::uint64_t{1} << 62) / SwapStore::kBlockBytes;

std::uint64_t blocks_of(std::uint64_t nbytes) {
  return nbytes / SwapStore::kBlockBytes + (nbytes % SwapStore::kBlockBytes != 0 ? 1 : 0);
}

Status closed_error() {
  return Status::error(Code::kClosed, "the swap store is closed");
}

}  // namespace

class SwapStore::BlockRequest : public IoRequest {
 public:
  BlockRequest(Group& group, ObjectId object, std::size_t index, std::int64_t slot,
               std::uint32_t crc)
      : object(object), index(index), slot(slot), crc(crc), group_(group) {}

  void prepare() override {
    if (op == IoOp::kWrite) crc = crc32c(buffer, nbytes);
  }
  void complete(Status status) override;

  const ObjectId object;
  const std::size_t index;  // of the block in the object
  const std::int64_t slot;
  std::uint32_t crc;  // of what was, or is to be, stored

 private:
  Group& group_;
};

class SwapStore::Group {
 public:
  Group(SwapStore& store, IoOp op, Completion done)
      : op(op), store_(store), done_(std::move(done)) {}

  const IoOp op;
  std::vector<std::unique_ptr<BlockRequest>> requests;

  void arm() { left_ = requests.size(); }  // before the first request is submitted

  // Engine thread. The last block publishes the transfer, calls the completion and ends `this`.
  void block_done(const Status& status) {
    Status first_error;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!status.is_ok() && status_.is_ok()) status_ = status;
      if (--left_ > 0) return;
      first_error = status_;
    }
    std::unique_ptr<Group> self(this);
    store_.finish(*this, first_error);
    const Completion done = std::move(done_);
    self.reset();
    done(first_error);
  }

 private:
  SwapStore& store_;
  Completion done_;
  std::mutex mutex_;
  std::size_t left_ = 0;
  Status status_;
};

void SwapStore::BlockRequest::complete(Status status) {
  if (status.is_ok() && op == IoOp::kRead && crc32c(buffer, nbytes) != crc) {
    status = Status::error(Code::kCorrupt,
                           "checksum mismatch in " + std::string(path) + " at offset " +
                               std::to_string(offset) + " (" + std::to_string(nbytes) +
                               " bytes): the disk returned other bytes than were written there");
  }
  group_.block_done(status);
}

SwapStore::SwapStore(SwapFile file, EngineChoice choice)
    : file_(std::move(file)),
      engine_(std::move(choice.engine)),
      engine_reason_(std::move(choice.reason)) {}

Result<std::shared_ptr<SwapStore>> SwapStore::open(const Options& options) {
  Result<SwapFile> file = open_scratch(options.dir);
  if (!file.is_ok()) return file.status();
  Result<EngineChoice> choice = make_engine(options.engine, options.io);
  if (!choice.is_ok()) return choice.status();
  return std::shared_ptr<SwapStore>(new SwapStore(file.take(), choice.take()));
}

SwapStore::~SwapStore() {
  // A destructor cannot report; close() is there for that. Transfers are waited for either way,
  // because their buffers and completions refer to this object.
  static_cast<void>(close());
}

std::uint64_t SwapStore::footprint(std::uint64_t nbytes) {
  return align_up(nbytes, kBlockBytes);
}

Status SwapStore::reserve(std::uint64_t bytes, std::uint64_t spare) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return closed_error();
  const std::uint64_t wanted = blocks_of(bytes) + blocks_of(spare);
  if (wanted > kMaxSlots) {
    return Status::error(Code::kNoSpace, "no file holds the " + std::to_string(bytes) + " and " +
                                             std::to_string(spare) + " bytes to be reserved");
  }
  if (wanted > slot_refs_.size()) {
    OFFLOAD_RETURN_IF_ERROR(reserve_space(file_, wanted * kBlockBytes));
    for (std::uint64_t slot = wanted; slot-- > slot_refs_.size();) {
      free_slots_.push_back(static_cast<std::int64_t>(slot));
    }
    slot_refs_.resize(wanted, 0);
  }
  object_slots_ = std::max(object_slots_, blocks_of(bytes));
  return Status::ok();
}

Result<ObjectId> SwapStore::create(std::uint64_t nbytes) {
  if (nbytes == 0) return Status::error(Code::kInvalid, "a swap object of 0 bytes was asked for");
  const std::uint64_t blocks = blocks_of(nbytes);
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return closed_error();
  if (promised_slots_ + blocks > object_slots_) {
    return Status::error(
        Code::kNoSpace,
        "swap file in " + file_.path + ": " + std::to_string(nbytes) + " bytes are needed, " +
            std::to_string((object_slots_ - promised_slots_) * kBlockBytes) + " of the reserved " +
            std::to_string(object_slots_ * kBlockBytes) + " are free");
  }
  const ObjectId id = next_id_++;
  Object object;
  object.nbytes = nbytes;
  object.blocks.resize(blocks);
  objects_.emplace(id, std::move(object));
  promised_slots_ += blocks;
  return id;
}

Status SwapStore::remove(ObjectId id) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return closed_error();
  const auto it = objects_.find(id);
  if (it == objects_.end()) {
    return Status::error(Code::kInvalid, "swap object " + std::to_string(id) + " does not exist");
  }
  if (it->second.in_flight > 0) {
    return Status::error(Code::kInvalid,
                         "swap object " + std::to_string(id) + " has transfers in flight");
  }
  for (const Block& block : it->second.blocks) {
    if (block.slot >= 0) drop_reference(block.slot);
  }
  promised_slots_ -= it->second.blocks.size();
  objects_.erase(it);
  return Status::ok();
}

Result<bool> SwapStore::written(ObjectId id, std::uint64_t offset) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return closed_error();
  const auto it = objects_.find(id);
  if (it == objects_.end() || offset >= it->second.nbytes) {
    return Status::error(Code::kInvalid, "swap object " + std::to_string(id) + " has no byte " +
                                             std::to_string(offset));
  }
  return it->second.blocks[offset / kBlockBytes].slot >= 0;
}

Status SwapStore::check(const Range& range, IoOp op) {
  const auto it = objects_.find(range.object);
  if (it == objects_.end()) {
    return Status::error(Code::kInvalid,
                         "swap object " + std::to_string(range.object) + " does not exist");
  }
  const Object& object = it->second;
  const std::uint64_t end = range.offset + range.nbytes;
  if (range.nbytes == 0 || range.offset % kBlockBytes != 0 || range.offset > object.nbytes ||
      range.nbytes > object.nbytes - range.offset ||
      (range.nbytes % kBlockBytes != 0 && end != object.nbytes)) {
    return Status::error(Code::kInvalid, "bytes [" + std::to_string(range.offset) + ", " +
                                             std::to_string(end) + ") are not whole blocks of a " +
                                             "swap object of " + std::to_string(object.nbytes) +
                                             " bytes");
  }
  if (!is_aligned(reinterpret_cast<std::uintptr_t>(range.buffer), kPageBytes)) {
    return Status::error(Code::kInvalid, "a swap transfer needs a page-aligned buffer");
  }
  const std::size_t first = range.offset / kBlockBytes;
  for (std::size_t i = first; i < first + footprint(range.nbytes) / kBlockBytes; ++i) {
    if (op == IoOp::kWrite && object.blocks[i].writing) {
      return Status::error(Code::kInvalid, "two writes of one swap block at once");
    }
    if (op == IoOp::kRead && object.blocks[i].slot < 0) {
      return Status::error(Code::kInvalid, "a swap block was read before it was ever written");
    }
  }
  return Status::ok();
}

Status SwapStore::check_disjoint(const std::vector<Range>& ranges) {
  std::vector<const Range*> sorted;
  sorted.reserve(ranges.size());
  for (const Range& range : ranges) sorted.push_back(&range);
  std::sort(sorted.begin(), sorted.end(), [](const Range* a, const Range* b) {
    return std::pair(a->object, a->offset) < std::pair(b->object, b->offset);
  });
  for (std::size_t i = 1; i < sorted.size(); ++i) {
    if (sorted[i]->object == sorted[i - 1]->object &&
        sorted[i]->offset - sorted[i - 1]->offset < sorted[i - 1]->nbytes) {
      return Status::error(Code::kInvalid, "two writes of one swap block at once");
    }
  }
  return Status::ok();
}

void SwapStore::add_blocks(const Range& range, IoOp op, IoPriority priority, Group& group) {
  Object& object = objects_.at(range.object);
  const std::size_t first = range.offset / kBlockBytes;
  for (std::uint64_t position = 0; position < range.nbytes; position += kBlockBytes) {
    const std::size_t index = first + position / kBlockBytes;
    Block& block = object.blocks[index];
    std::int64_t slot = block.slot;
    if (op == IoOp::kWrite) {
      slot = free_slots_.back();
      free_slots_.pop_back();
      block.writing = true;
    }
    ++slot_refs_[static_cast<std::size_t>(slot)];
    ++object.in_flight;
    auto request = std::make_unique<BlockRequest>(group, range.object, index, slot, block.crc);
    request->op = op;
    request->priority = priority;
    request->fd = file_.fd.get();
    request->path = file_.path.c_str();
    request->buffer = range.buffer + position;
    request->nbytes = align_up(std::min(kBlockBytes, range.nbytes - position), kPageBytes);
    request->offset = static_cast<std::uint64_t>(slot) * kBlockBytes;
    group.requests.push_back(std::move(request));
  }
}

Status SwapStore::write(const std::vector<Range>& ranges, IoPriority priority, Completion done) {
  return start(ranges, IoOp::kWrite, priority, std::move(done));
}

Status SwapStore::read(const std::vector<Range>& ranges, IoPriority priority, Completion done) {
  return start(ranges, IoOp::kRead, priority, std::move(done));
}

Status SwapStore::start(const std::vector<Range>& ranges, IoOp op, IoPriority priority,
                        Completion done) {
  auto group = std::make_unique<Group>(*this, op, std::move(done));
  std::vector<IoRequest*> batch;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return closed_error();
    // Everything is checked before anything changes: a refused transfer leaves no trace.
    if (op == IoOp::kWrite) OFFLOAD_RETURN_IF_ERROR(check_disjoint(ranges));
    std::uint64_t blocks = 0;
    for (const Range& range : ranges) {
      OFFLOAD_RETURN_IF_ERROR(check(range, op));
      blocks += footprint(range.nbytes) / kBlockBytes;
    }
    if (blocks == 0) return Status::error(Code::kInvalid, "a swap transfer of no bytes");
    if (op == IoOp::kWrite && free_slots_.size() < blocks) {
      return Status::error(Code::kNoSpace, "swap file in " + file_.path + ": " +
                                               std::to_string(blocks * kBlockBytes) +
                                               " bytes are needed for a new version, " +
                                               std::to_string(free_slots_.size() * kBlockBytes) +
                                               " are free");
    }
    group->requests.reserve(blocks);
    for (const Range& range : ranges) add_blocks(range, op, priority, *group);
    batch.reserve(blocks);
    for (const auto& request : group->requests) batch.push_back(request.get());
    group->arm();
  }
  Group& owned = *group.release();  // by its last request, unless submit() took none
  const Status submitted = engine_->submit(batch);
  if (!submitted.is_ok()) {
    group.reset(&owned);
    finish(owned, submitted);
  }
  return submitted;
}

void SwapStore::finish(Group& group, const Status& status) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& request : group.requests) {
    // remove() refuses while transfers are in flight, so the object is there.
    Object& object = objects_.at(request->object);
    Block& block = object.blocks[request->index];
    --object.in_flight;
    if (group.op == IoOp::kRead) {
      drop_reference(request->slot);
      if (status.is_ok()) logical_read_ += request->nbytes;
      continue;
    }
    block.writing = false;
    if (!status.is_ok()) {
      drop_reference(request->slot);
      continue;
    }
    if (block.slot >= 0) drop_reference(block.slot);
    block.slot = request->slot;
    block.crc = request->crc;
    logical_written_ += request->nbytes;
  }
}

void SwapStore::drop_reference(std::int64_t slot) {
  if (--slot_refs_[static_cast<std::size_t>(slot)] == 0) free_slots_.push_back(slot);
}

SwapStore::Stats SwapStore::stats() const {
  Stats stats;
  stats.io = engine_->counters();
  std::lock_guard<std::mutex> lock(mutex_);
  stats.slots = slot_refs_.size();
  stats.free_slots = free_slots_.size();
  stats.objects = objects_.size();
  stats.logical_read = logical_read_;
  stats.logical_written = logical_written_;
  return stats;
}

Status SwapStore::close() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return Status::ok();
    closed_ = true;
  }
  const Status engine_closed = engine_->close();
  const Status file_closed = file_.fd.close();
  return engine_closed.is_ok() ? file_closed : engine_closed;
}

}  // namespace offload
