#include "io/engine_inbox.h"

#ifdef OFFLOAD_HAVE_LIBURING

#include <utility>

namespace offload {

Status EngineInbox::wait_for_start() {
  std::unique_lock lock(mutex_);
  started_cv_.wait(lock, [this] { return started_; });
  return sticky_;
}

Status EngineInbox::submit(std::span<IoRequest* const> requests) {
  std::lock_guard lock(mutex_);
  if (!sticky_.is_ok()) return sticky_;
  if (closing_) return Status::error(Code::kClosed, "submit: the I/O engine is closed");
  if (sleeping_ && !requests.empty()) {
    // Before the requests are queued: a failed submit() must leave none behind.
    OFFLOAD_RETURN_IF_ERROR(wake_.signal());
    sleeping_ = false;
  }
  for (IoRequest* request : requests) scheduler_.push(request);
  return Status::ok();
}

void EngineInbox::add_memory(MemoryRegion region) {
  std::lock_guard lock(mutex_);
  if (!closing_) new_regions_.push_back(std::move(region));
}

void EngineInbox::close() {
  std::lock_guard lock(mutex_);
  closing_ = true;
  const Status woken = wake_.signal();
  if (sticky_.is_ok()) sticky_ = woken;
}

Status EngineInbox::error() const {
  std::lock_guard lock(mutex_);
  return sticky_;
}

void EngineInbox::unpin_memory() {
  std::unique_lock lock(mutex_);
  forking_ = true;
  if (!running_) return;
  unpin_ = true;
  // A failure is out of reach; a child would then have a copy, which is right but large.
  if (!wake_.signal().is_ok()) return;
  unpinned_cv_.wait(lock, [this] { return !unpin_ || !running_; });
}

void EngineInbox::allow_pinning() {
  std::lock_guard lock(mutex_);
  forking_ = false;
}

void EngineInbox::started(const Status& status) {
  {
    std::lock_guard lock(mutex_);
    started_ = true;
    running_ = status.is_ok();
    sticky_ = status;
  }
  started_cv_.notify_all();
}

void EngineInbox::ended() {
  {
    std::lock_guard lock(mutex_);
    running_ = false;
  }
  unpinned_cv_.notify_all();
}

void EngineInbox::take_orders(RegisteredMemory& memory) {
  std::lock_guard lock(mutex_);
  for (MemoryRegion& region : new_regions_) memory.add(std::move(region));
  new_regions_.clear();
  memory.hold(forking_);
  if (unpin_) {
    memory.drop_chunks();
    unpin_ = false;
    unpinned_cv_.notify_all();
  }
}

bool EngineInbox::is_closing() const {
  std::lock_guard lock(mutex_);
  return closing_;
}

IoRequest* EngineInbox::next() {
  std::lock_guard lock(mutex_);
  return closing_ ? nullptr : scheduler_.next();
}

IoRequest* EngineInbox::upcoming() {
  std::lock_guard lock(mutex_);
  return closing_ ? nullptr : scheduler_.upcoming();
}

IoRequest* EngineInbox::cancel_one() {
  std::lock_guard lock(mutex_);
  return scheduler_.cancel_one();
}

void EngineInbox::finished(const IoRequest& request) {
  std::lock_guard lock(mutex_);
  scheduler_.finished(request);
}

bool EngineInbox::may_sleep(bool has_place, bool knows_of_closing) {
  std::lock_guard lock(mutex_);
  if (unpin_ || closing_ != knows_of_closing || (has_place && scheduler_.can_start())) return false;
  sleeping_ = has_place;
  return true;
}

void EngineInbox::woke() {
  std::lock_guard lock(mutex_);
  sleeping_ = false;
}

void EngineInbox::fail(const Status& status) {
  std::lock_guard lock(mutex_);
  if (sticky_.is_ok()) sticky_ = status;
}

}  // namespace offload

#endif  // OFFLOAD_HAVE_LIBURING
