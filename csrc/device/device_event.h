// DeviceEvent: a point in a stream. An Event is shared, never recorded again, and never null where
// one is asked for.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "device/order_checker.h"
#include "device/stream_id.h"

namespace offload {

class Device;

class DeviceEvent {
 public:
  virtual ~DeviceEvent() = default;
  DeviceEvent(const DeviceEvent&) = delete;
  DeviceEvent& operator=(const DeviceEvent&) = delete;

  StreamId stream() const { return stream_; }
  // Of two events of one stream, the one with the larger number is the later.
  std::uint64_t number() const { return number_; }

 protected:
  DeviceEvent() = default;

 private:
  friend class Device;
  // Constant once Device::record() has returned.
  std::uint64_t device_ = 0;
  StreamId stream_ = StreamId::kCompute;
  std::uint64_t number_ = 0;
  OrderChecker::Clock clock_{};
  mutable std::atomic<bool> waited_{false};  // a caller's wait for it has been counted
};

using Event = std::shared_ptr<const DeviceEvent>;

}  // namespace offload
