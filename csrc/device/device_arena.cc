#include "device/device_arena.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "base/align.h"

namespace offload {
namespace {

void keep_latest(StreamEvents& events, const Event& event) {
  Event& kept = events[static_cast<std::size_t>(event->stream())];
  if (kept == nullptr || kept->number() < event->number()) kept = event;
}

void keep_latest(StreamEvents& events, const StreamEvents& more) {
  for (const Event& event : more) {
    if (event != nullptr) keep_latest(events, event);
  }
}

Status wait_for_all(Device& device, StreamId stream, const StreamEvents& events) {
  for (const Event& event : events) {
    if (event == nullptr) continue;
    OFFLOAD_RETURN_IF_ERROR(device.wait(stream, event, DeviceArena::kReuse));
  }
  return Status::ok();
}

// A few sizes above what any memory has are not rounded: that would wrap around.
std::uint64_t lease_bytes(std::uint64_t nbytes) {
  return nbytes > ~std::uint64_t{0} - DeviceArena::kLeaseBytes
             ? nbytes
             : align_up(nbytes, DeviceArena::kLeaseBytes);
}

Status none_asked_for() {
  return Status::error(Code::kInvalid, "a device lease of 0 bytes was asked for");
}

}  // namespace

DeviceArena::DeviceArena(std::shared_ptr<Device> device, DeviceMemory memory,
                         std::uint64_t capacity, bool poison)
    : device_(std::move(device)),
      memory_(std::move(memory)),
      capacity_(capacity),
      poison_(poison),
      free_(capacity) {}

Result<std::shared_ptr<DeviceArena>> DeviceArena::create(std::shared_ptr<Device> device,
                                                         std::uint64_t capacity, bool poison) {
  capacity -= capacity % kLeaseBytes;
  if (capacity == 0) {
    return Status::error(Code::kInvalid, "a device budget must hold at least " +
                                             std::to_string(kLeaseBytes) + " bytes");
  }
  Result<DeviceMemory> memory = device->allocate(capacity);
  if (!memory.is_ok()) {
    return memory.status().with_context("a device budget of " + std::to_string(capacity) +
                                        " bytes cannot be had; lower Budget(device=...)");
  }
  return make(std::move(device), memory.take(), poison, {});
}

Result<std::shared_ptr<DeviceArena>> DeviceArena::create_over(std::shared_ptr<Device> device,
                                                              DeviceMemory memory, bool poison) {
  if (memory.nbytes() < kLeaseBytes ||
      !is_aligned(reinterpret_cast<std::uintptr_t>(memory.data()), kLeaseBytes)) {
    return Status::error(Code::kInvalid, std::to_string(memory.nbytes()) +
                                             " bytes of memory for a device arena are too few, or "
                                             "do not begin at a multiple of " +
                                             std::to_string(kLeaseBytes));
  }
  const Result<Event> before = device->record(StreamId::kCompute);
  if (!before.is_ok()) return before.status();
  StreamEvents former;
  keep_latest(former, before.value());
  return make(std::move(device), std::move(memory), poison, std::move(former));
}

Result<std::shared_ptr<DeviceArena>> DeviceArena::make(std::shared_ptr<Device> device,
                                                       DeviceMemory memory, bool poison,
                                                       StreamEvents former) {
  const std::uint64_t capacity = memory.nbytes() - memory.nbytes() % kLeaseBytes;
  std::shared_ptr<DeviceArena> arena(
      new DeviceArena(std::move(device), std::move(memory), capacity, poison));
  if (poison) OFFLOAD_RETURN_IF_ERROR(arena->poison(0, capacity, "unused memory", former));
  if (former != StreamEvents{}) arena->former_.emplace(0, Former{capacity, std::move(former)});
  return arena;
}

StreamEvents DeviceArena::take_former(std::uint64_t begin, std::uint64_t end) {
  StreamEvents uses;
  auto at = former_.upper_bound(begin);
  if (at != former_.begin() && std::prev(at)->second.end > begin) at = std::prev(at);
  while (at != former_.end() && at->first < end) {
    const std::uint64_t from = at->first;
    Former former = std::move(at->second);
    at = former_.erase(at);
    keep_latest(uses, former.uses);
    if (from < begin) former_.emplace(from, Former{begin, former.uses});
    if (former.end > end) former_.emplace(end, std::move(former));
  }
  return uses;
}

std::shared_ptr<DeviceLease> DeviceArena::lease_at(std::uint64_t offset, std::uint64_t nbytes,
                                                   std::string label) {
  in_use_ += nbytes;
  peak_ = std::max(peak_, in_use_);
  ++allocations_;
  return std::shared_ptr<DeviceLease>(new DeviceLease(
      shared_from_this(), offset, nbytes, std::move(label), take_former(offset, offset + nbytes)));
}

Result<std::shared_ptr<DeviceLease>> DeviceArena::allocate(std::uint64_t nbytes,
                                                           std::string label) {
  if (nbytes == 0) return none_asked_for();
  OFFLOAD_RETURN_IF_ERROR(device_->check_owner("device lease"));
  const std::uint64_t need = lease_bytes(nbytes);
  std::lock_guard<std::mutex> lock(mutex_);
  const std::optional<std::uint64_t> offset = free_.best_fit(need);
  if (!offset.has_value()) {
    return Status::error(Code::kBudget, "device arena of " + std::to_string(capacity()) +
                                            " bytes: " + std::to_string(need) +
                                            " bytes are needed, " + std::to_string(free_.total()) +
                                            " are free, the longest free range has " +
                                            std::to_string(free_.longest()));
  }
  free_.take(*offset, need);
  return lease_at(*offset, need, std::move(label));
}

Result<std::shared_ptr<DeviceLease>> DeviceArena::allocate_at(std::uint64_t offset,
                                                              std::uint64_t nbytes,
                                                              std::string label) {
  if (nbytes == 0) return none_asked_for();
  if (!is_aligned(offset, kLeaseBytes)) {
    return Status::error(Code::kInvalid, "a device lease starts at a multiple of " +
                                             std::to_string(kLeaseBytes) + " bytes, not at " +
                                             std::to_string(offset));
  }
  OFFLOAD_RETURN_IF_ERROR(device_->check_owner("device lease"));
  const std::uint64_t need = lease_bytes(nbytes);
  std::lock_guard<std::mutex> lock(mutex_);
  if (!free_.take_at(offset, need)) {
    return Status::error(Code::kBudget, "device arena of " + std::to_string(capacity()) +
                                            " bytes: the planned range of " + std::to_string(need) +
                                            " bytes at " + std::to_string(offset) +
                                            " is in use or outside");
  }
  return lease_at(offset, need, std::move(label));
}

Status DeviceArena::poison(std::uint64_t offset, std::uint64_t nbytes, const std::string& label,
                           StreamEvents& uses) {
  // On the stream of the last use, so that at best there is nothing to wait for.
  StreamId stream = StreamId::kH2d;
  std::uint64_t last = 0;
  for (const Event& event : uses) {
    if (event == nullptr || event->number() < last) continue;
    stream = event->stream();
    last = event->number();
  }
  OFFLOAD_RETURN_IF_ERROR(wait_for_all(*device_, stream, uses));
  OFFLOAD_RETURN_IF_ERROR(device_->fill(base() + offset, 0xFF, nbytes, stream, label));
  const Result<Event> filled = device_->record(stream);
  if (!filled.is_ok()) return filled.status();
  uses = {};
  keep_latest(uses, filled.value());
  return Status::ok();
}

void DeviceArena::give_back(std::uint64_t offset, std::uint64_t nbytes, const std::string& label,
                            StreamEvents uses) {
  if (!device_->in_owner_process()) return;
  if (poison_) {
    const Status poisoned = poison(offset, nbytes, label, uses);
    if (!poisoned.is_ok()) device_->note_error(poisoned);
  }
  std::lock_guard<std::mutex> lock(mutex_);
  free_.give_back(offset, nbytes);
  in_use_ -= nbytes;
  if (uses != StreamEvents{}) former_.emplace(offset, Former{offset + nbytes, std::move(uses)});
}

DeviceArena::Usage DeviceArena::usage() const {
  if (!device_->in_owner_process()) return {};
  std::lock_guard<std::mutex> lock(mutex_);
  return {.budget = capacity(),
          .in_use = in_use_,
          .peak = peak_,
          .largest_free = free_.longest(),
          .allocations = allocations_};
}

DeviceLease::DeviceLease(std::shared_ptr<DeviceArena> arena, std::uint64_t offset,
                         std::uint64_t nbytes, std::string label, StreamEvents former)
    : arena_(std::move(arena)),
      offset_(offset),
      nbytes_(nbytes),
      label_(std::move(label)),
      former_(std::move(former)) {}

DeviceLease::~DeviceLease() {
  // What was never used is still not free before the uses of its former owners.
  keep_latest(uses_, former_);
  arena_->give_back(offset_, nbytes_, label_, std::move(uses_));
}

Status DeviceLease::acquire(StreamId stream) {
  OFFLOAD_RETURN_IF_ERROR(device()->check_owner("device lease"));
  std::lock_guard<std::mutex> lock(mutex_);
  bool& acquired = acquired_[static_cast<std::size_t>(stream)];
  if (acquired) return Status::ok();
  OFFLOAD_RETURN_IF_ERROR(wait_for_all(*device(), stream, former_));
  acquired = true;
  return Status::ok();
}

void DeviceLease::note_use(const Event& event) {
  if (!device()->in_owner_process()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  keep_latest(uses_, event);
}

Result<bool> DeviceLease::wait_for_uses(unsigned milliseconds) {
  StreamEvents uses = former_;
  if (is_open()) {
    const Result<Event> so_far = device()->record(StreamId::kCompute);
    if (!so_far.is_ok()) return so_far.status();
    keep_latest(uses, so_far.value());
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    keep_latest(uses, uses_);
  }
  for (const Event& event : uses) {
    if (event == nullptr) continue;
    Result<bool> ended = device()->wait_for(event, milliseconds, Waiter::kCaller);
    if (!ended.is_ok() || !ended.value()) return ended;
  }
  return true;
}

}  // namespace offload
