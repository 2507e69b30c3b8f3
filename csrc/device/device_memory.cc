// Device's memory: what it has allocated, adopted or borrowed, and the host memory that it knows.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>

#include "device/device.h"

namespace offload {
namespace {

bool overlap(const std::byte* a, std::uint64_t a_bytes, const std::byte* b, std::uint64_t b_bytes) {
  const auto first = reinterpret_cast<std::uintptr_t>(a);
  const auto second = reinterpret_cast<std::uintptr_t>(b);
  return first < second + b_bytes && second < first + a_bytes;
}

}  // namespace

Result<DeviceMemory> Device::allocate(std::uint64_t nbytes) {
  if (nbytes == 0) return Status::error(Code::kInvalid, "0 bytes of device memory were asked for");
  const Result<Lock> lock = enter("allocation");
  if (!lock.is_ok()) return lock.status();
  const Result<std::byte*> data = do_allocate(nbytes);
  if (!data.is_ok()) return data.status();
  memory_.push_back({data.value(), nbytes, nullptr, Range::Of::kDevice});
  return DeviceMemory(shared_from_this(), data.value(), nbytes);
}

Result<DeviceMemory> Device::adopt(std::byte* data, std::uint64_t nbytes,
                                   std::shared_ptr<void> owner) {
  if (data == nullptr || nbytes == 0) {
    return Status::error(Code::kInvalid, "0 bytes of device memory were given");
  }
  const Result<Lock> lock = enter("use of another's memory");
  if (!lock.is_ok()) return lock.status();
  for (const Range& range : memory_) {
    if (overlap(range.data, range.nbytes, data, nbytes)) {
      return Status::error(Code::kInvalid, name() + " knows a part of these " +
                                               std::to_string(nbytes) + " bytes already");
    }
  }
  OFFLOAD_RETURN_IF_ERROR(do_adopt(data, nbytes));
  memory_.push_back({data, nbytes, std::move(owner), Range::Of::kAdopted});
  return DeviceMemory(shared_from_this(), data, nbytes);
}

Result<DeviceMemory> Device::adopt_host(const std::shared_ptr<HostMemory>& memory) {
  if (!host_access().unified()) {
    return Status::error(Code::kInvalid, name() + " has memory apart from the host's");
  }
  const Result<Lock> lock = enter("use of host memory");
  if (!lock.is_ok()) return lock.status();
  const Result<const HostRange*> range = in_host(memory->base(), memory->capacity());
  if (!range.is_ok()) return range.status();
  memory_.push_back({memory->base(), memory->capacity(), memory, Range::Of::kAdopted});
  return DeviceMemory(shared_from_this(), memory->base(), memory->capacity());
}

Result<DeviceMemory> Device::borrow(std::byte* data, std::uint64_t nbytes,
                                    std::shared_ptr<void> owner) {
  if (data == nullptr || nbytes == 0) {
    return Status::error(Code::kInvalid, "0 bytes of device memory were lent");
  }
  const Result<Lock> lock = enter("use of a tensor's memory");
  if (!lock.is_ok()) return lock.status();
  OFFLOAD_RETURN_IF_ERROR(do_adopt(data, nbytes));
  memory_.push_back({data, nbytes, std::move(owner), Range::Of::kBorrowed});
  // Who changes a tensor while an earlier copy of it is in flight has no use for that copy.
  if (checker_ != nullptr) checker_->forget(data, nbytes);
  return DeviceMemory(shared_from_this(), data, nbytes, true);
}

void Device::free(std::byte* data, std::uint64_t nbytes, bool borrowed) {
  if (!owner_.is_current()) return;
  const Status drained = borrowed ? Status::ok() : do_drain();
  std::shared_ptr<void> owner;  // goes after the lock
  std::lock_guard<std::mutex> lock(mutex_);
  const auto at = std::find_if(memory_.begin(), memory_.end(), [&](const Range& range) {
    return range.data == data && range.nbytes == nbytes &&
           (range.of == Range::Of::kBorrowed) == borrowed;
  });
  const Status freed = at->of == Range::Of::kDevice ? do_free(data, nbytes) : Status::ok();
  owner = std::move(at->owner);
  memory_.erase(at);
  if (checker_ != nullptr) checker_->forget(data, nbytes);
  for (const Status& status : {drained, freed}) {
    if (!status.is_ok() && !noted_.has_value()) noted_ = status;
  }
}

void Device::add_host_memory(const std::shared_ptr<HostMemory>& memory) {
  if (!owner_.is_current()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  std::erase_if(host_memory_, [](const HostRange& range) { return range.owner.expired(); });
  host_memory_.push_back({memory, memory->base(), memory->capacity(), memory->commit_step()});
}

DeviceMemory::DeviceMemory(std::shared_ptr<Device> device, std::byte* data, std::uint64_t nbytes,
                           bool borrowed)
    : device_(std::move(device)), data_(data), nbytes_(nbytes), borrowed_(borrowed) {}

DeviceMemory::DeviceMemory(DeviceMemory&& other) noexcept
    : device_(std::move(other.device_)),
      data_(std::exchange(other.data_, nullptr)),
      nbytes_(std::exchange(other.nbytes_, 0)),
      borrowed_(other.borrowed_) {}

DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  if (this != &other) {
    release();
    device_ = std::move(other.device_);
    data_ = std::exchange(other.data_, nullptr);
    nbytes_ = std::exchange(other.nbytes_, 0);
    borrowed_ = other.borrowed_;
  }
  return *this;
}

DeviceMemory::~DeviceMemory() {
  release();
}

void DeviceMemory::release() {
  if (data_ == nullptr) return;
  device_->free(std::exchange(data_, nullptr), nbytes_, borrowed_);
  device_.reset();
}

}  // namespace offload
