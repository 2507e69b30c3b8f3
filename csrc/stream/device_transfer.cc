#include "stream/device_transfer.h"

#include <chrono>
#include <mutex>
#include <span>
#include <string>
#include <utility>

namespace offload {
namespace {

using std::chrono::steady_clock;

Status cancelled() {
  return Status::error(Code::kCancelled, "the transfer was cancelled before its next step");
}

}  // namespace

Status DeviceTransfer::check() const {
  const auto need = [&](std::uint64_t has, const char* what) {
    return nbytes_ <= has
               ? Status::ok()
               : Status::error(Code::kInvalid, "a transfer of " + std::to_string(nbytes_) +
                                                   " bytes does not fit a " + what + " lease of " +
                                                   std::to_string(has));
  };
  OFFLOAD_RETURN_IF_ERROR(need(host_->nbytes(), "host"));
  OFFLOAD_RETURN_IF_ERROR(need(device_->nbytes(), "device"));
  if (!has_disk()) return Status::ok();
  const Result<std::shared_ptr<SwapStore>> store = this->store();
  if (!store.is_ok()) return store.status();
  const Result<std::uint64_t> size = store.value()->nbytes(disk_.object);
  if (!size.is_ok()) return size.status();
  if (size.value() == nbytes_) return Status::ok();
  return Status::error(Code::kInvalid, "a transfer of " + std::to_string(nbytes_) +
                                           " bytes is not the whole of a swap object of " +
                                           std::to_string(size.value()));
}

Result<std::shared_ptr<SwapStore>> DeviceTransfer::store() const {
  std::shared_ptr<SwapStore> store = disk_.store.lock();
  if (store != nullptr) return store;
  return Status::error(Code::kClosed, "the swap store of a transfer is gone");
}

Status DeviceTransfer::end_fetch(const Status& copied, const Event& waited) {
  const Status ended = device().end_host_reads(host_->data(), nbytes_, waited, device_label_);
  return copied.is_ok() ? ended : copied;
}

Status DeviceTransfer::end_copy_to_host(const Status& copied, const Event& waited) {
  const Status free = device().hand_over_host(host_->data(), nbytes_, waited, device_label_);
  return copied.is_ok() ? free : copied;
}

Result<std::shared_ptr<DeviceTransfer>> DeviceTransfer::fetch(std::shared_ptr<DeviceEvents> events,
                                                              DiskEnd disk,
                                                              std::shared_ptr<Lease> host,
                                                              std::shared_ptr<DeviceSpan> device,
                                                              std::uint64_t nbytes) {
  std::shared_ptr<DeviceTransfer> transfer(new DeviceTransfer(
      std::move(events), std::move(disk), std::move(host), std::move(device), nbytes, kArrival));
  OFFLOAD_RETURN_IF_ERROR(transfer->check());
  OFFLOAD_RETURN_IF_ERROR(transfer->has_disk() ? transfer->read_disk()
                                               : transfer->copy_to_device());
  return transfer;
}

Status DeviceTransfer::read_disk() {
  const Result<std::shared_ptr<SwapStore>> store = this->store();
  if (!store.is_ok()) return store.status();
  OFFLOAD_RETURN_IF_ERROR(
      device().use_host({host_->data(), nbytes_, AccessKind::kWrite}, device_label_));
  const SwapStore::Range range{disk_.object, 0, host_->data(), nbytes_};
  return store.value()->read(
      {&range, 1}, disk_.priority,
      [self = shared_from_this()](const Status& read) {
        const Status copied = !read.is_ok()      ? read
                              : self->cancelled_ ? cancelled()
                                                 : self->copy_to_device();
        if (!copied.is_ok()) self->finish(copied);
      },
      &cancelled_);
}

Status DeviceTransfer::copy_to_device() {
  OFFLOAD_RETURN_IF_ERROR(device_->acquire(StreamId::kH2d));
  const Status submitted =
      device().copy_h2d(device_->data(), host_->data(), nbytes_, StreamId::kH2d, device_label_);
  if (!submitted.is_ok()) return abandon(submitted);
  Result<Event> copied = device().record(StreamId::kH2d);
  if (!copied.is_ok()) return abandon(copied.status());
  device_->note_use(copied.value());
  std::shared_ptr<DeviceSpan> lent = kept();
  set_issued(copied.value());
  events_->when(copied.take(), [self = shared_from_this(), lent = std::move(lent)](
                                   const Status& status, const Event& waited) mutable {
    lent.reset();
    self->finish(self->end_fetch(status, waited));
  });
  return Status::ok();
}

Result<std::shared_ptr<DeviceTransfer>> DeviceTransfer::spill(
    std::shared_ptr<DeviceEvents> events, DiskEnd disk, std::shared_ptr<Lease> host,
    std::shared_ptr<DeviceSpan> device, std::uint64_t nbytes, const Event& after) {
  std::shared_ptr<DeviceTransfer> transfer(new DeviceTransfer(
      std::move(events), std::move(disk), std::move(host), std::move(device), nbytes, kDeparture));
  OFFLOAD_RETURN_IF_ERROR(transfer->check());
  OFFLOAD_RETURN_IF_ERROR(transfer->copy_to_host(after));
  return transfer;
}

Status DeviceTransfer::copy_to_host(const Event& after) {
  if (after != nullptr) {
    OFFLOAD_RETURN_IF_ERROR(device().wait(StreamId::kD2h, after, kResult));
  }
  if (device_->kept_until_complete()) OFFLOAD_RETURN_IF_ERROR(device_->acquire(StreamId::kD2h));
  const Status submitted =
      device().copy_d2h(host_->data(), device_->data(), nbytes_, StreamId::kD2h, device_label_);
  if (!submitted.is_ok()) return abandon(submitted);
  Result<Event> copied = device().record(StreamId::kD2h);
  if (!copied.is_ok()) return abandon(copied.status());
  device_->note_use(copied.value());
  std::shared_ptr<DeviceSpan> lent = kept();
  set_issued(copied.value());
  events_->when(copied.take(), [self = shared_from_this(), lent = std::move(lent)](
                                   const Status& status, const Event& waited) mutable {
    lent.reset();
    self->copied_to_host(self->end_copy_to_host(status, waited));
  });
  return Status::ok();
}

void DeviceTransfer::copied_to_host(const Status& copied) {
  if (!copied.is_ok() || !has_disk()) {
    finish(copied);
    return;
  }
  const Status started = cancelled_ ? cancelled() : write_disk();
  if (!started.is_ok()) finish(started);
}

Status DeviceTransfer::write_disk() {
  const Result<std::shared_ptr<SwapStore>> store = this->store();
  if (!store.is_ok()) return store.status();
  const SwapStore::Range range{disk_.object, 0, host_->data(), nbytes_};
  return store.value()->write(
      {&range, 1}, disk_.priority,
      [self = shared_from_this()](const Status& written) { self->finish(written); }, &cancelled_);
}

Status DeviceTransfer::abandon(const Status& status) {
  const Status drained = device().drain();
  return drained.is_ok() ? status : status.with_context("then " + drained.to_string());
}

void DeviceTransfer::set_issued(Event event) {
  device_.reset();
  std::lock_guard<std::mutex> lock(mutex_);
  event_ = std::move(event);
  changed_.notify_all();
}

void DeviceTransfer::finish(const Status& status) {
  device_.reset();
  host_.reset();
  end(status);
}

bool DeviceTransfer::await(unsigned milliseconds) {
  const Result<bool> ended = wait_for(milliseconds);
  return ended.is_ok() && ended.value();
}

bool DeviceTransfer::issued() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return done_ || event_ != nullptr;
}

bool DeviceTransfer::wait_until_issued(unsigned milliseconds) {
  const auto is_issued = [this] { return done_ || event_ != nullptr; };
  std::unique_lock<std::mutex> lock(mutex_);
  if (is_issued()) return true;
  const steady_clock::time_point begin = steady_clock::now();
  const bool came = changed_.wait_for(lock, std::chrono::milliseconds(milliseconds), is_issued);
  const auto waited = std::chrono::nanoseconds(steady_clock::now() - begin).count();
  events_->count_stall(!std::exchange(stalled_, true), static_cast<std::uint64_t>(waited));
  return came;
}

Status DeviceTransfer::make_wait(StreamId stream) const {
  Event event;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (done_ && !status_.is_ok()) return status_;
    event = event_;
  }
  if (event == nullptr) {
    return Status::error(Code::kInvalid, "the copy to the device is not issued yet");
  }
  return device().wait(stream, event, why_);
}

Result<bool> DeviceTransfer::wait_for(unsigned milliseconds) {
  OFFLOAD_RETURN_IF_ERROR(device().check_owner("transfer"));
  const auto deadline = steady_clock::now() + std::chrono::milliseconds(milliseconds);
  std::unique_lock<std::mutex> lock(mutex_);
  if (!changed_.wait_for(lock, std::chrono::milliseconds(milliseconds),
                         [this] { return done_ || event_ != nullptr; })) {
    return false;
  }
  if (event_ == nullptr) return done_;
  const bool was_done = done_;
  const Event event = event_;
  lock.unlock();
  // Also where the transfer has ended: from now on the caller is ordered after the copy. An error
  // of the device ends the transfer too.
  const Result<bool> copied = device().wait_for(event, milliseconds, Waiter::kCaller);
  if (was_done) return true;
  lock.lock();
  if (copied.is_ok() && !copied.value()) return done_;
  return changed_.wait_for(lock, deadline - steady_clock::now(), [this] { return done_; });
}

Status DeviceTransfer::status() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return status_;
}

}  // namespace offload
