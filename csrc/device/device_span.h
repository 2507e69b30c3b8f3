// DeviceSpan: a range of device memory that copies go to or come from, whoever it belongs to.
//
// Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "base/status.h"
#include "device/device.h"

namespace offload {

class DeviceSpan {
 public:
  virtual ~DeviceSpan() = default;
  DeviceSpan(const DeviceSpan&) = delete;
  DeviceSpan& operator=(const DeviceSpan&) = delete;

  virtual std::byte* data() const = 0;
  virtual std::uint64_t nbytes() const = 0;
  virtual const std::string& label() const = 0;
  virtual const std::shared_ptr<Device>& device() const = 0;

  // Makes `stream` wait for all uses of the range by former owners. Once is enough, more do no
  // harm.
  virtual Status acquire(StreamId stream) = 0;
  // The range may not be used by anybody else before `event`.
  virtual void note_use(const Event& event) = 0;
  // Whether it must be kept until the work on it is complete; else it may go once that is noted.
  virtual bool kept_until_complete() const = 0;

  // Declares a use to the checker of the device.
  Status use(StreamId stream, AccessKind kind) const {
    return device()->use(stream, {data(), nbytes(), kind}, label());
  }

 protected:
  DeviceSpan() = default;
};

}  // namespace offload
