#include "device/device.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "device/split_copy.h"

namespace offload {
namespace {

bool contains(const std::byte* base, std::uint64_t size, const std::byte* data,
              std::uint64_t nbytes) {
  const auto begin = reinterpret_cast<std::uintptr_t>(base);
  const auto at = reinterpret_cast<std::uintptr_t>(data);
  return at >= begin && nbytes <= size && at - begin <= size - nbytes;
}

// An address may be that of an earlier device.
std::uint64_t next_device_id() {
  static std::atomic<std::uint64_t> last{0};
  return ++last;
}

}  // namespace

Device::Device(bool check)
    : id_(next_device_id()), checker_(check ? std::make_unique<OrderChecker>() : nullptr) {}

// That of one device or several, which does not keep them: an arena may outlive them.
class Device::Registrar final : public MemoryRegistrar {
 public:
  void add(const std::shared_ptr<Device>& device) {
    devices_.push_back(device);
    std::shared_ptr<MemoryRegistrar> inner = device->do_registrar();
    if (std::find(inner_.begin(), inner_.end(), inner) == inner_.end()) {
      inner_.push_back(std::move(inner));
    }
  }

  Status register_range(std::byte* base, std::uint64_t nbytes) override {
    for (std::size_t i = 0; i < inner_.size(); ++i) {
      const Status registered = inner_[i]->register_range(base, nbytes);
      if (registered.is_ok()) continue;
      while (i > 0) OFFLOAD_RETURN_IF_ERROR(inner_[--i]->unregister_range(base, nbytes));
      return registered;
    }
    return Status::ok();
  }
  Status unregister_range(std::byte* base, std::uint64_t nbytes) override {
    for (const std::weak_ptr<Device>& each : devices_) {
      const std::shared_ptr<Device> device = each.lock();
      if (device != nullptr && device->in_owner_process()) {
        OFFLOAD_RETURN_IF_ERROR(device->do_drain());
      }
    }
    for (const std::shared_ptr<MemoryRegistrar>& inner : inner_) {
      OFFLOAD_RETURN_IF_ERROR(inner->unregister_range(base, nbytes));
    }
    return Status::ok();
  }

 private:
  std::vector<std::weak_ptr<Device>> devices_;
  std::vector<std::shared_ptr<MemoryRegistrar>> inner_;  // each of them once
};

std::shared_ptr<MemoryRegistrar> Device::registrar() {
  const std::shared_ptr<Device> self = shared_from_this();
  return registrar_of({&self, 1});
}

std::shared_ptr<MemoryRegistrar> Device::registrar_of(
    std::span<const std::shared_ptr<Device>> devices) {
  auto registrar = std::make_shared<Registrar>();
  for (const std::shared_ptr<Device>& device : devices) registrar->add(device);
  return registrar;
}

Status Device::check_owner(const char* op) const {
  if (owner_.is_current()) return Status::ok();
  return Status::error(Code::kInvalid,
                       std::string(op) +
                           ": this is a forked child, and a device belongs to the process that "
                           "opened it; start the child with spawn");
}

Result<Device::Lock> Device::enter(const char* op) {
  OFFLOAD_RETURN_IF_ERROR(check_owner(op));
  Lock lock(mutex_);
  if (!noted_.has_value()) return lock;
  return std::exchange(noted_, std::nullopt)->with_context("before this call");
}

void Device::note_error(const Status& status) {
  if (!owner_.is_current()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  if (!noted_.has_value()) noted_ = status;
}

Status Device::in_device(const std::byte* data, std::uint64_t nbytes) const {
  for (const Range& range : memory_) {
    if (contains(range.data, range.nbytes, data, nbytes)) return Status::ok();
  }
  return Status::error(Code::kInvalid,
                       std::to_string(nbytes) + " bytes of a copy are not memory of " + name());
}

Result<const Device::HostRange*> Device::in_host(const std::byte* data,
                                                 std::uint64_t nbytes) const {
  for (const HostRange& range : host_memory_) {
    if (contains(range.base, range.nbytes, data, nbytes) && !range.owner.expired()) return &range;
  }
  return Status::error(Code::kInvalid,
                       std::to_string(nbytes) +
                           " bytes of a copy are in no host memory that was registered with " +
                           name() + "; pin the HostArena for the device and add it");
}

Status Device::own_event(const Event& event) const {
  if (event != nullptr && event->device_ == id_) return Status::ok();
  return Status::error(Code::kInvalid, "this event was not recorded on " + name());
}

Status Device::found(Status status) {
  if (status.code() == Code::kUnordered) ++conflicts_;
  return status;
}

Status Device::checked(StreamId stream, std::span<const Access> accesses, const char* what,
                       std::string_view label) {
  if (checker_ == nullptr) return Status::ok();
  return found(checker_->operation(OrderChecker::agent_of(stream), accesses, what, label));
}

Result<Device::MemoryInfo> Device::memory_info() {
  const Result<Lock> lock = enter("memory info");
  if (!lock.is_ok()) return lock.status();
  return do_memory_info();
}

Status Device::copy_between(Direction direction, std::byte* dst, const std::byte* src,
                            std::uint64_t nbytes, StreamId stream, std::string_view label) {
  const bool to_device = direction == Direction::kToDevice;
  const Result<Lock> lock = enter("copy");
  if (!lock.is_ok()) return lock.status();
  OFFLOAD_RETURN_IF_ERROR(in_device(to_device ? dst : src, nbytes));
  const std::byte* host = to_device ? src : dst;
  const Result<const HostRange*> range = in_host(host, nbytes);
  if (!range.is_ok()) return range.status();
  const Access accesses[] = {{src, nbytes, AccessKind::kRead}, {dst, nbytes, AccessKind::kWrite}};
  const std::span<const Access> all(accesses);
  OFFLOAD_RETURN_IF_ERROR(checked(stream, all.first(src == dst ? 1 : 2),
                                  to_device ? "copy to the device" : "copy to the host", label));
  if (src == dst) return Status::ok();  // the memory of both
  const auto offset = static_cast<std::uint64_t>(host - range.value()->base);
  return split_copy(offset, nbytes, range.value()->step, [&](std::uint64_t at, std::uint64_t part) {
    OFFLOAD_RETURN_IF_ERROR(do_copy(direction, dst + at, src + at, part, stream));
    ++stats_.copies;
    (to_device ? stats_.h2d_bytes : stats_.d2h_bytes) += part;
    return Status::ok();
  });
}

Status Device::copy_h2d(std::byte* dst, const std::byte* src, std::uint64_t nbytes, StreamId stream,
                        std::string_view label) {
  return copy_between(Direction::kToDevice, dst, src, nbytes, stream, label);
}

Status Device::copy_d2h(std::byte* dst, const std::byte* src, std::uint64_t nbytes, StreamId stream,
                        std::string_view label) {
  return copy_between(Direction::kToHost, dst, src, nbytes, stream, label);
}

Status Device::copy_d2d(std::byte* dst, const std::byte* src, std::uint64_t nbytes, StreamId stream,
                        std::string_view label) {
  const Result<Lock> lock = enter("copy");
  if (!lock.is_ok()) return lock.status();
  OFFLOAD_RETURN_IF_ERROR(in_device(src, nbytes));
  OFFLOAD_RETURN_IF_ERROR(in_device(dst, nbytes));
  const Access accesses[] = {{src, nbytes, AccessKind::kRead}, {dst, nbytes, AccessKind::kWrite}};
  OFFLOAD_RETURN_IF_ERROR(checked(stream, accesses, "copy on the device", label));
  OFFLOAD_RETURN_IF_ERROR(do_copy(Direction::kOnDevice, dst, src, nbytes, stream));
  ++stats_.copies;
  stats_.d2d_bytes += nbytes;
  return Status::ok();
}

Status Device::fill(std::byte* dst, std::uint8_t value, std::uint64_t nbytes, StreamId stream,
                    std::string_view label) {
  const Result<Lock> lock = enter("fill");
  if (!lock.is_ok()) return lock.status();
  OFFLOAD_RETURN_IF_ERROR(in_device(dst, nbytes));
  const Access access{dst, nbytes, AccessKind::kWrite};
  OFFLOAD_RETURN_IF_ERROR(checked(stream, {&access, 1}, "fill", label));
  return do_fill(dst, value, nbytes, stream);
}

Status Device::launch(StreamId stream, std::span<const Access> accesses, const char* what,
                      std::string_view label,
                      const std::function<Status(std::uintptr_t stream)>& submit) {
  {
    const Result<Lock> lock = enter("launch");
    if (!lock.is_ok()) return lock.status();
    OFFLOAD_RETURN_IF_ERROR(checked(stream, accesses, what, label));
    if (!computes_on_host()) return do_launch(stream, submit);
  }
  return do_launch(stream, submit);  // the work itself, which the lock is not for
}

Result<Event> Device::record(StreamId stream) {
  const Result<Lock> lock = enter("record");
  if (!lock.is_ok()) return lock.status();
  return record_locked(stream);
}

Result<Event> Device::record_compute(std::uintptr_t used) {
  const Result<Lock> lock = enter("record");
  if (!lock.is_ok()) return lock.status();
  if (used != compute_stream_) OFFLOAD_RETURN_IF_ERROR(do_join_compute(used));
  return record_locked(StreamId::kCompute);
}

Result<Event> Device::record_locked(StreamId stream) {
  Result<std::shared_ptr<DeviceEvent>> recorded = do_record(stream);
  if (!recorded.is_ok()) return recorded.status();
  DeviceEvent& event = *recorded.value();
  event.device_ = id_;
  event.stream_ = stream;
  event.number_ = ++events_;
  if (checker_ != nullptr) event.clock_ = checker_->record(OrderChecker::agent_of(stream));
  ++stats_.events;
  return Event(recorded.take());
}

Status Device::wait(StreamId stream, const Event& event, std::string_view why) {
  OFFLOAD_RETURN_IF_ERROR(own_event(event));
  {
    const Result<Lock> lock = enter("wait");
    if (!lock.is_ok()) return lock.status();
    if (event->stream() == stream || (!omitted_.empty() && why == omitted_)) return Status::ok();
    OFFLOAD_RETURN_IF_ERROR(do_wait(stream, event));
    if (checker_ != nullptr) checker_->wait(OrderChecker::agent_of(stream), event->clock_);
    const auto count = stats_.waits.find(why);
    if (count != stats_.waits.end()) {
      ++count->second;
    } else {
      stats_.waits.emplace(why, 1);
    }
  }
  return block_for_wait(stream, event);
}

Result<bool> Device::wait_for(const Event& event, unsigned milliseconds, Waiter waiter) {
  OFFLOAD_RETURN_IF_ERROR(own_event(event));
  {
    const Result<Lock> lock = enter("wait");
    if (!lock.is_ok()) return lock.status();
  }
  Result<bool> complete = do_wait_for(event, 0, Waiter::kBackground);
  if (complete.is_ok() && !complete.value() && milliseconds > 0) {
    if (waiter == Waiter::kCaller && !event->waited_.exchange(true)) {
      std::lock_guard<std::mutex> lock(mutex_);
      ++stats_.host_waits;
    }
    complete = do_wait_for(event, milliseconds, waiter);
  }
  if (complete.is_ok() && complete.value() && waiter == Waiter::kCaller && checker_ != nullptr) {
    std::lock_guard<std::mutex> lock(mutex_);
    checker_->wait(OrderChecker::kHost, event->clock_);
  }
  return complete;
}

Result<bool> Device::query(const Event& event) {
  return wait_for(event, 0, Waiter::kCaller);
}

Status Device::synchronize(const Event& event) {
  while (true) {
    const Result<bool> complete = wait_for(event, 1000, Waiter::kCaller);
    if (!complete.is_ok()) return complete.status();
    if (complete.value()) return Status::ok();
  }
}

Status Device::drain() {
  for (const StreamId stream : {StreamId::kCompute, StreamId::kH2d, StreamId::kD2h}) {
    const Result<Event> end = record(stream);
    if (!end.is_ok()) return end.status();
    OFFLOAD_RETURN_IF_ERROR(synchronize(end.value()));
  }
  return Status::ok();
}

Status Device::use(StreamId stream, const Access& access, std::string_view label) {
  const Result<Lock> lock = enter("use");
  if (!lock.is_ok()) return lock.status();
  OFFLOAD_RETURN_IF_ERROR(in_device(access.data, access.nbytes));
  return checked(stream, {&access, 1}, "use", label);
}

Status Device::use_host(const Access& access, std::string_view label) {
  const Result<Lock> lock = enter("use");
  if (!lock.is_ok()) return lock.status();
  if (checker_ == nullptr) return Status::ok();
  return found(checker_->operation(OrderChecker::kHost, {&access, 1}, "use", label));
}

Status Device::hand_over_host(const std::byte* data, std::uint64_t nbytes, const Event& after,
                              std::string_view label) {
  const Result<Lock> lock = enter("use");
  if (!lock.is_ok()) return lock.status();
  if (checker_ == nullptr) return Status::ok();
  const OrderChecker::Clock known = after != nullptr ? after->clock_ : OrderChecker::Clock{};
  return found(checker_->hand_over(data, nbytes, known, "use by the host", label));
}

Status Device::end_host_reads(const std::byte* data, std::uint64_t nbytes, const Event& after,
                              std::string_view label) {
  if (after == nullptr) return hand_over_host(data, nbytes, after, label);
  const Result<Lock> lock = enter("use");
  if (!lock.is_ok()) return lock.status();
  if (checker_ != nullptr) checker_->forget_reads(data, nbytes, after->clock_);
  return Status::ok();
}

Status Device::set_compute_stream(std::uintptr_t handle) {
  const Result<Lock> lock = enter("change of the compute stream");
  if (!lock.is_ok()) return lock.status();
  if (handle == compute_stream_) return Status::ok();
  OFFLOAD_RETURN_IF_ERROR(do_set_compute_stream(handle));
  compute_stream_ = handle;
  return Status::ok();
}

Device::Stats Device::stats() const {
  if (!owner_.is_current()) return {};
  std::lock_guard<std::mutex> lock(mutex_);
  return stats_;
}

void Device::omit_waits(std::string_view why) {
  if (!owner_.is_current()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  omitted_ = why;
}

bool Device::omits_waits(std::string_view why) const {
  if (!owner_.is_current()) return false;
  std::lock_guard<std::mutex> lock(mutex_);
  return !omitted_.empty() && why == omitted_;
}

}  // namespace offload
