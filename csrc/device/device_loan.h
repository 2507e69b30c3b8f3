// DeviceLoan: memory of somebody else's (a tensor's) for one copy to or from it.
//
// Protocol:
//  1. the owner is kept, so its allocator gives the memory to nobody. What the compute stream was
//     given before counts as a use of the range: whoever copies calls acquire() first.
//  2. whoever has submitted work on it keeps the loan until that is complete. It ends without a
//     wait.
//
// Thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "device/device_span.h"

namespace offload {

class DeviceLoan final : public DeviceSpan {
 public:
  static constexpr const char* kBefore = "work on a tensor before a copy of it";

  // kInvalid when it is no memory of the device. Errors of the checker: see Device.
  static Result<std::shared_ptr<DeviceLoan>> take(std::shared_ptr<Device> device, std::byte* data,
                                                  std::uint64_t nbytes, std::shared_ptr<void> owner,
                                                  std::string label);

  std::byte* data() const override { return memory_.data(); }
  std::uint64_t nbytes() const override { return memory_.nbytes(); }
  const std::string& label() const override { return label_; }
  const std::shared_ptr<Device>& device() const override { return device_; }
  Status acquire(StreamId stream) override { return device_->wait(stream, before_, kBefore); }
  void note_use(const Event&) override {}
  bool kept_until_complete() const override { return true; }

 private:
  DeviceLoan(std::shared_ptr<Device> device, DeviceMemory memory, std::string label)
      : device_(std::move(device)), memory_(std::move(memory)), label_(std::move(label)) {}

  const std::shared_ptr<Device> device_;
  const DeviceMemory memory_;
  const std::string label_;
  Event before_;
};

}  // namespace offload
