#include "store/swap_store_transfer.h"

#include <algorithm>
#include <string>

#include "base/align.h"
#include "base/crc32c.h"

namespace offload {

Status SwapStore::BlockRequest::prepare() {
  SwapStore& store = *group->store;
  if (op == IoOp::kRead) return Status::ok();
  place.crc = crc32c(data, nbytes, 0, CacheUse::kPass);
  if (store.cipher_ == nullptr) return Status::ok();
  std::byte* copy = store.bounce_->take();
  if (copy == nullptr) {
    return Status::error(Code::kInvalid, "more encrypted blocks in flight than there are places");
  }
  buffer = copy;
  place.nonce = store.next_nonce_.fetch_add(1, std::memory_order_relaxed);
  return store.cipher_->encrypt(0, place.nonce, data, copy, nbytes);
}

void SwapStore::BlockRequest::give_back_copy() {
  if (buffer == data) return;
  group->store->bounce_->give_back(buffer);
  buffer = data;
}

void SwapStore::BlockRequest::complete(Status status) {
  SwapStore& store = *group->store;
  give_back_copy();
  if (op == IoOp::kWrite) {
    store.stripes_[place.stripe].queued_bytes -= nbytes;
    if (status.code() == Code::kNoSpace && store.divert(*this, status)) return;
  } else if (status.is_ok()) {
    if (store.cipher_ != nullptr)
      status = store.cipher_->decrypt(0, place.nonce, data, data, nbytes);
    if (status.is_ok() && crc32c(data, nbytes, 0, group->use) != place.crc) {
      status = Status::error(Code::kCorrupt,
                             "checksum mismatch in " + std::string(path) + " at offset " +
                                 std::to_string(offset) + " (" + std::to_string(nbytes) +
                                 " bytes): the disk returned other bytes than were written there");
    }
  }
  group->block_done(data, status);
}

void SwapStore::Group::begin(SwapStore& owner, IoOp op_, std::size_t blocks, Completion done,
                             BlockDone block_done, CacheUse use_) {
  store = &owner;
  op = op_;
  use = use_;
  requests.clear();
  requests.reserve(blocks);
  batches.resize(owner.stripes_.count());
  for (auto& batch : batches) batch.clear();
  left_ = blocks;
  done_ = std::move(done);
  block_done_ = block_done;
  first_error_ = Status::ok();
}

void SwapStore::Group::block_done(std::byte* data, const Status& status) {
  if (!status.is_ok()) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (first_error_.is_ok()) first_error_ = status;
  }
  if (block_done_.call != nullptr) block_done_.call(block_done_.context, data);
  if (left_.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  Status outcome;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    outcome = first_error_;
  }
  store->finish(*this, outcome);
  const Completion done = take_completion();
  store->recycle(std::unique_ptr<Group>(this));
  done(outcome);
}

Status SwapStore::write(std::span<const Range> ranges, IoPriority priority, Completion done,
                        const std::atomic<bool>* cancel, BlockDone block_done) {
  return start(ranges, IoOp::kWrite, priority, std::move(done), cancel, block_done,
               CacheUse::kKeep);
}

Status SwapStore::read(std::span<const Range> ranges, IoPriority priority, Completion done,
                       const std::atomic<bool>* cancel, CacheUse use) {
  return start(ranges, IoOp::kRead, priority, std::move(done), cancel, {}, use);
}

Status SwapStore::start(std::span<const Range> ranges, IoOp op, IoPriority priority,
                        Completion done, const std::atomic<bool>* cancel, BlockDone block_done,
                        CacheUse use) {
  if (!owner_.is_current()) return forked_error(op == IoOp::kRead ? "read" : "write");
  std::unique_ptr<Group> group;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    OFFLOAD_RETURN_IF_ERROR(usable());
    // Everything is checked before anything changes: a refused transfer leaves no trace.
    if (op == IoOp::kWrite) OFFLOAD_RETURN_IF_ERROR(check_disjoint(ranges));
    std::uint64_t blocks = 0;
    for (const Range& range : ranges) {
      OFFLOAD_RETURN_IF_ERROR(check(range, op));
      blocks += blocks_of(range.nbytes);
    }
    if (blocks == 0) return Status::error(Code::kInvalid, "a swap transfer of no bytes");
    if (op == IoOp::kWrite && stripes_.free_slots() < blocks) stripes_.clear_full();
    if (op == IoOp::kWrite && stripes_.free_slots() < blocks) {
      return Status::error(Code::kNoSpace,
                           "swap file in " + stripes_[0].file.path + ": " +
                               std::to_string(blocks * block_bytes_) +
                               " bytes are needed for a new version, " +
                               std::to_string(stripes_.free_slots() * block_bytes_) + " are free");
    }
    group = take_group();
    group->begin(*this, op, blocks, std::move(done), block_done, use);
    for (const Range& range : ranges) add_blocks(range, *group);
    for (BlockRequest& request : group->requests) {
      request.priority = priority;
      request.cancel = cancel;
      group->batches[request.place.stripe].push_back(&request);
    }
  }
  return submit(std::move(group));
}

Status SwapStore::submit(std::unique_ptr<Group> owned) {
  Group& group = *owned;
  // The group ends with its last request, maybe before this function does; its batches are read
  // only while a request of them is left.
  std::size_t left = group.requests.size();
  bool any = false;
  for (std::size_t i = 0; left > 0; ++i) {
    std::vector<IoRequest*>& batch = group.batches[i];
    if (batch.empty()) continue;
    left -= batch.size();
    const bool is_last = left == 0;
    const Status submitted = stripes_[i].engine->submit(batch);
    if (submitted.is_ok()) {
      if (!any) static_cast<void>(owned.release());  // by its last request
      any = true;
      continue;
    }
    if (!any && is_last) {
      for (const BlockRequest& request : group.requests) {
        if (request.op == IoOp::kWrite) stripes_[i].queued_bytes -= request.nbytes;
      }
      finish(group, submitted);
      recycle(std::move(owned));
      return submitted;
    }
    if (!any) static_cast<void>(owned.release());
    any = true;
    // Others are, or will be, in flight: these end as a failed transfer does.
    const std::vector<IoRequest*> refused = batch;
    for (IoRequest* request : refused) request->complete(submitted);
  }
  return Status::ok();
}

std::unique_ptr<SwapStore::Group> SwapStore::take_group() {
  if (idle_groups_.empty()) return std::make_unique<Group>();
  std::unique_ptr<Group> group = std::move(idle_groups_.back());
  idle_groups_.pop_back();
  return group;
}

void SwapStore::recycle(std::unique_ptr<Group> group) {
  std::lock_guard<std::mutex> lock(mutex_);
  idle_groups_.push_back(std::move(group));
}

void SwapStore::aim(BlockRequest& request, std::uint32_t stripe, std::uint64_t slot) {
  SwapFile& file = stripes_[stripe].file;
  request.place.stripe = stripe;
  request.place.slot = static_cast<std::int64_t>(slot);
  request.fd = file.fd.get();
  request.path = file.path.c_str();
  request.offset = slot * block_bytes_;
  if (request.op == IoOp::kWrite) stripes_[stripe].queued_bytes += request.nbytes;
}

void SwapStore::add_blocks(const Range& range, Group& group) {
  Object& object = objects_.at(range.object);
  const std::size_t first = range.offset / block_bytes_;
  for (std::uint64_t position = 0; position < range.nbytes; position += block_bytes_) {
    BlockRequest& request = group.requests.emplace_back();
    request.group = &group;
    request.op = group.op;
    request.object = range.object;
    request.index = first + position / block_bytes_;
    request.data = request.buffer = range.buffer + position;
    request.nbytes = align_up(std::min(block_bytes_, range.nbytes - position), kPageBytes);
    StoredBlock& block = object.blocks[request.index];
    ++object.in_flight;
    if (group.op == IoOp::kWrite) {
      block.writing = true;
      const auto stripe = static_cast<std::uint32_t>(stripes_.pick());
      aim(request, stripe, stripes_[stripe].slots.take());
    } else {
      request.place = block.live;
      const auto slot = static_cast<std::uint64_t>(block.live.slot);
      stripes_[block.live.stripe].slots.add_reference(slot);
      aim(request, block.live.stripe, slot);
    }
  }
}

bool SwapStore::divert(BlockRequest& request, const Status& why) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    // To each other file once at the most; whoever fails for good has the files tried again.
    if (closed_ || ++request.diversions == stripes_.count() ||
        !stripes_.set_full(request.place.stripe, why)) {
      stripes_.clear_full();
      return false;
    }
    drop_reference(request.place);
    const auto stripe = static_cast<std::uint32_t>(stripes_.pick());
    aim(request, stripe, stripes_[stripe].slots.take());
  }
  Stripe& stripe = stripes_[request.place.stripe];
  const Status submitted = stripe.engine->submit({&request});
  if (!submitted.is_ok()) request.complete(submitted);
  return true;
}

void SwapStore::finish(Group& group, const Status& status) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const BlockRequest& request : group.requests) {
    // remove() refuses while transfers are in flight, so the object is there.
    Object& object = objects_.at(request.object);
    StoredBlock& block = object.blocks[request.index];
    --object.in_flight;
    if (group.op == IoOp::kRead) {
      drop_reference(request.place);
      if (status.is_ok()) logical_read_ += request.nbytes;
      continue;
    }
    block.writing = false;
    if (!status.is_ok()) {
      drop_reference(request.place);
      continue;
    }
    if (block.live.slot >= 0) drop_reference(block.live);
    block.live = request.place;
    logical_written_ += request.nbytes;
    if (durable()) uncommitted_.insert(request.object);
  }
}

}  // namespace offload
