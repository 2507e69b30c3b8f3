#include "store/swap_store.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "base/align.h"
#include "store/swap_store_transfer.h"
#include "sys/durable_file.h"

namespace offload {
namespace {

// What a file can hold; anything below it can be added up and turned into bytes without overflow.
constexpr std::uint64_t kMaxBytes = std::uint64_t{1} << 61;

Status missing(ObjectId id) {
  return Status::error(Code::kInvalid, "swap object " + std::to_string(id) + " does not exist");
}

Status twice() {
  return Status::error(Code::kInvalid, "two writes of one swap block at once");
}

Status check_options(const SwapStoreOptions& options) {
  if (options.dirs.empty()) return Status::error(Code::kInvalid, "no swap directory was given");
  const std::uint64_t block = options.block_bytes;
  if (!std::has_single_bit(block) || block < SwapStoreOptions::kMinBlockBytes ||
      block > SwapStoreOptions::kMaxBlockBytes) {
    return Status::error(Code::kInvalid, "a block of " + std::to_string(block) +
                                             " bytes: it must be a power of two from " +
                                             std::to_string(SwapStoreOptions::kMinBlockBytes) +
                                             " to " +
                                             std::to_string(SwapStoreOptions::kMaxBlockBytes));
  }
  return Status::ok();
}

}  // namespace

SwapStore::SwapStore(const SwapStoreOptions& options)
    : block_bytes_(options.block_bytes), stripes_(options.block_bytes) {}

Result<std::shared_ptr<SwapStore>> SwapStore::open(const SwapStoreOptions& options) {
  OFFLOAD_RETURN_IF_ERROR(check_options(options));
  std::shared_ptr<SwapStore> store(new SwapStore(options));
  for (std::size_t i = 0; i < options.dirs.size(); ++i) {
    Result<SwapFile> file = open_scratch(options.dirs[i].path);
    if (!file.is_ok()) return file.status();
    OFFLOAD_RETURN_IF_ERROR(store->add_stripe(file.take(), options, i));
  }
  if (options.encrypt) {
    Result<std::unique_ptr<BlockCipher>> cipher = BlockCipher::create();
    if (!cipher.is_ok()) return cipher.status();
    const std::uint64_t bytes =
        bounce_bytes_for(options.dirs.size(), options.io.queue_depth, options.block_bytes);
    Result<std::unique_ptr<BouncePool>> bounce =
        BouncePool::create(bytes / options.block_bytes, options.block_bytes);
    if (!bounce.is_ok()) return bounce.status();
    store->cipher_ = cipher.take();
    store->bounce_ = bounce.take();
  }
  return store;
}

Result<std::shared_ptr<SwapStore>> SwapStore::open_durable(const SwapStoreOptions& options,
                                                           const std::string& name, bool create) {
  OFFLOAD_RETURN_IF_ERROR(check_options(options));
  if (options.encrypt) {
    return Status::error(Code::kInvalid,
                         "a durable store cannot be encrypted: the key is only in memory, so "
                         "nobody could read it again");
  }
  if (name.empty() || name.find('/') != std::string::npos || name.front() == '.') {
    return Status::error(Code::kInvalid, "'" + name + "' cannot name a durable store: a name has " +
                                             "no '/', does not begin with '.' and is not empty");
  }
  std::shared_ptr<SwapStore> store(new SwapStore(options));
  store->is_named_ = true;
  OFFLOAD_RETURN_IF_ERROR(create ? store->create_durable(options, name)
                                 : store->reopen_durable(options, name));
  return store;
}

Status SwapStore::add_stripe(SwapFile file, const SwapStoreOptions& options, std::size_t i) {
  IoEngineOptions io = options.io;
  io.files = {file.fd.get()};
  io.phase_bytes = options.dirs[i].phase_bytes;
  return stripes_.add(std::move(file), options.engine, io, options.dirs[i].rate);
}

SwapStore::~SwapStore() {
  // A destructor cannot report; close() is there for that. Transfers are waited for either way,
  // because their buffers and completions refer to this object.
  static_cast<void>(close());
}

std::uint64_t SwapStore::blocks_of(std::uint64_t nbytes) const {
  return nbytes / block_bytes_ + (nbytes % block_bytes_ != 0 ? 1 : 0);
}

std::uint64_t SwapStore::footprint(std::uint64_t nbytes) const {
  return blocks_of(nbytes) * block_bytes_;
}

std::uint64_t SwapStore::bounce_bytes() const {
  return bounce_ == nullptr ? 0 : bounce_->buffers() * block_bytes_;
}

Status SwapStore::usable() const {
  return closed_ ? Status::error(Code::kClosed, "the swap store is closed") : Status::ok();
}

Result<SwapStore::Object*> SwapStore::object(ObjectId id) {
  OFFLOAD_RETURN_IF_ERROR(usable());
  const auto it = objects_.find(id);
  if (it == objects_.end()) return missing(id);
  return &it->second;
}

Status SwapStore::reserve(std::uint64_t bytes, std::uint64_t spare) {
  if (!owner_.is_current()) return forked_error("reserve");
  std::lock_guard<std::mutex> lock(mutex_);
  OFFLOAD_RETURN_IF_ERROR(usable());
  if (bytes > kMaxBytes || spare > kMaxBytes) {
    return Status::error(Code::kNoSpace, "no file holds the " + std::to_string(bytes) + " and " +
                                             std::to_string(spare) + " bytes to be reserved");
  }
  const std::uint64_t labels = is_named_ ? stripes_.count() : 0;
  OFFLOAD_RETURN_IF_ERROR(stripes_.reserve(blocks_of(bytes) + blocks_of(spare) + labels));
  object_slots_ = std::max(object_slots_, blocks_of(bytes));
  return Status::ok();
}

Result<ObjectId> SwapStore::create(std::uint64_t nbytes, std::string_view key) {
  if (!owner_.is_current()) return forked_error("create");
  if (nbytes == 0) return Status::error(Code::kInvalid, "a swap object of 0 bytes was asked for");
  const std::uint64_t blocks = blocks_of(nbytes);
  std::lock_guard<std::mutex> lock(mutex_);
  OFFLOAD_RETURN_IF_ERROR(usable());
  if (durable()) {
    OFFLOAD_RETURN_IF_ERROR(check_journal_object(key, nbytes, block_bytes_));
    if (by_key_.contains(std::string(key))) {
      return Status::error(Code::kInvalid,
                           "the swap store has an object '" + std::string(key) + "' already");
    }
  } else if (!key.empty()) {
    return Status::error(Code::kInvalid, "only objects of a durable swap store have a key");
  }
  if (blocks > object_slots_ || promised_slots_ > object_slots_ - blocks) {
    return Status::error(
        Code::kNoSpace,
        "swap file in " + stripes_[0].file.path + ": " + std::to_string(nbytes) +
            " bytes are needed, " +
            std::to_string((object_slots_ - std::min(promised_slots_, object_slots_)) *
                           block_bytes_) +
            " of the reserved " + std::to_string(object_slots_ * block_bytes_) + " are free");
  }
  const ObjectId id = next_id_++;
  Object& object = objects_[id];
  object.key = key;
  object.nbytes = nbytes;
  object.blocks.resize(blocks);
  promised_slots_ += blocks;
  if (durable()) {
    by_key_.emplace(key, id);
    uncommitted_.insert(id);
  }
  return id;
}

Status SwapStore::remove(ObjectId id) {
  if (!owner_.is_current()) return forked_error("remove");
  // A commit under way refers to the object's slots.
  std::unique_lock<std::mutex> no_commit(commit_mutex_, std::defer_lock);
  if (durable()) no_commit.lock();
  std::lock_guard<std::mutex> lock(mutex_);
  const Result<Object*> found = object(id);
  if (!found.is_ok()) return found.status();
  Object& object = *found.value();
  if (object.in_flight > 0) {
    return Status::error(Code::kInvalid,
                         "swap object " + std::to_string(id) + " has transfers in flight");
  }
  for (StoredBlock& block : object.blocks) {
    if (block.live.slot >= 0) drop_reference(std::exchange(block.live, Place{}));
  }
  promised_slots_ -= object.blocks.size();
  if (durable()) {
    by_key_.erase(object.key);
    uncommitted_.erase(id);
    // Its committed slots are needed until the removal is.
    if (object.committed) removed_.emplace(id, std::move(object));
  }
  objects_.erase(id);
  return Status::ok();
}

Result<bool> SwapStore::written(ObjectId id, std::uint64_t offset) {
  if (!owner_.is_current()) return forked_error("written");
  std::lock_guard<std::mutex> lock(mutex_);
  const Result<Object*> found = object(id);
  if (!found.is_ok()) return found.status();
  if (offset >= found.value()->nbytes) {
    return Status::error(Code::kInvalid, "swap object " + std::to_string(id) + " has no byte " +
                                             std::to_string(offset));
  }
  return found.value()->blocks[offset / block_bytes_].live.slot >= 0;
}

Result<std::uint64_t> SwapStore::nbytes(ObjectId id) {
  if (!owner_.is_current()) return forked_error("nbytes");
  std::lock_guard<std::mutex> lock(mutex_);
  const Result<Object*> found = object(id);
  if (!found.is_ok()) return found.status();
  return found.value()->nbytes;
}

Status SwapStore::check(const Range& range, IoOp op) const {
  const auto it = objects_.find(range.object);
  if (it == objects_.end()) return missing(range.object);
  const Object& object = it->second;
  const std::uint64_t end = range.offset + range.nbytes;
  if (range.nbytes == 0 || range.offset % block_bytes_ != 0 || range.offset > object.nbytes ||
      range.nbytes > object.nbytes - range.offset ||
      (range.nbytes % block_bytes_ != 0 && end != object.nbytes)) {
    return Status::error(Code::kInvalid, "bytes [" + std::to_string(range.offset) + ", " +
                                             std::to_string(end) + ") are not whole blocks of a " +
                                             "swap object of " + std::to_string(object.nbytes) +
                                             " bytes");
  }
  if (range.buffer == nullptr ||
      !is_aligned(reinterpret_cast<std::uintptr_t>(range.buffer), kPageBytes)) {
    return Status::error(Code::kInvalid, "a swap transfer needs a page-aligned buffer");
  }
  const std::size_t first = range.offset / block_bytes_;
  for (std::size_t i = first; i < first + blocks_of(range.nbytes); ++i) {
    if (op == IoOp::kWrite && object.blocks[i].writing) return twice();
    if (op == IoOp::kRead && object.blocks[i].live.slot < 0) {
      return Status::error(Code::kInvalid, "a swap block was read before it was ever written");
    }
  }
  return Status::ok();
}

Status SwapStore::check_disjoint(std::span<const Range> ranges) {
  sorted_.clear();
  for (const Range& range : ranges) sorted_.push_back(&range);
  std::sort(sorted_.begin(), sorted_.end(), [](const Range* a, const Range* b) {
    return std::pair(a->object, a->offset) < std::pair(b->object, b->offset);
  });
  for (std::size_t i = 1; i < sorted_.size(); ++i) {
    if (sorted_[i]->object == sorted_[i - 1]->object &&
        sorted_[i]->offset - sorted_[i - 1]->offset < sorted_[i - 1]->nbytes) {
      return twice();
    }
  }
  return Status::ok();
}

void SwapStore::drop_reference(const Place& place) {
  stripes_[place.stripe].slots.drop_reference(static_cast<std::uint64_t>(place.slot));
}

void SwapStore::add_memory(const MemoryRegion& region) {
  for (std::size_t i = 0; i < stripes_.count(); ++i) stripes_[i].engine->add_memory(region);
}

SwapStore::Stats SwapStore::stats() const {
  Stats stats;
  if (!owner_.is_current()) return stats;
  std::lock_guard<std::mutex> lock(mutex_);
  for (std::size_t i = 0; i < stripes_.count(); ++i) {
    const Stripe& stripe = stripes_[i];
    stats.files.push_back(
        {stripe.engine->counters(), stripe.slots.size(), stripe.slots.free_slots(), stripe.full});
    stats.io += stats.files.back().io;
    stats.slots += stripe.slots.size();
    stats.free_slots += stripe.slots.free_slots();
  }
  stats.objects = objects_.size();
  stats.logical_read = logical_read_;
  stats.logical_written = logical_written_;
  return stats;
}

Status SwapStore::close() {
  if (!owner_.is_current()) return forked_error("close");
  std::lock_guard<std::mutex> no_commit(commit_mutex_);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return Status::ok();
    closed_ = true;
  }
  Status first;
  const auto keep_first = [&first](const Status& status) {
    if (first.is_ok()) first = status;
  };
  for (std::size_t i = 0; i < stripes_.count(); ++i) keep_first(stripes_[i].engine->close());
  for (std::size_t i = 0; i < stripes_.count(); ++i) {
    // Explicitly: a ring that the kernel has not ended yet, and a forked child, still have the
    // file.
    if (is_named_) keep_first(unlock_file(stripes_[i].file));
    keep_first(stripes_[i].file.fd.close(stripes_[i].file.path));
  }
  if (journal_ != nullptr) keep_first(journal_->close());
  return first;
}

}  // namespace offload
