// DeviceCompletions: calls back when copies of a device are complete. DeviceEvents, its queues, is
// what transfers hold.
//
// One thread for each copy stream waits for the events in the order in which they were recorded;
// it holds no lock of the device, and no device call is made from inside of one (as from a host
// function of CUDA's, where none is allowed). Destroying a DeviceCompletions waits for what is
// queued. What is queued after that is waited for by whoever queues it.
//
// Thread-safe. In a forked child nothing is called any more.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

#include "base/status.h"
#include "device/device.h"
#include "sys/at_fork.h"
#include "sys/engine_thread.h"

namespace offload {

class DeviceEvents {
 public:
  // The host must not touch the memory of a copy before it is complete: why a callback waits.
  static constexpr const char* kCompletion = "copy before the host's use";
  // On a thread of the core's, or inside when(). The event's failure, or ok, and what was waited
  // for: the event, or nothing where the wait was left out.
  using Callback = std::function<void(const Status&, const Event& waited)>;

  struct Stats {
    std::uint64_t stalls = 0;  // a caller had to wait for a copy to be submitted
    std::uint64_t stall_ns = 0;
  };

  explicit DeviceEvents(std::shared_ptr<Device> device) : device_(std::move(device)) {}

  const std::shared_ptr<Device>& device() const { return device_; }
  // REQUIRES: `event` is one of a copy stream.
  void when(Event event, Callback callback);

  void count_stall(bool first, std::uint64_t ns);  // `first`: of this transfer
  Stats stats() const;

 private:
  friend class DeviceCompletions;
  struct Entry {
    Event event;
    Callback callback;
  };
  struct Queue {
    std::deque<Entry> entries;  // in the order in which their events were recorded
    ForkSafeCondition changed;
  };

  void run(StreamId stream);
  void close();
  bool waits() const { return !device_->omits_waits(kCompletion); }
  Queue& queue(StreamId stream) { return queues_[static_cast<std::size_t>(stream)]; }

  const std::shared_ptr<Device> device_;
  mutable std::mutex mutex_;  // guards all below
  std::array<Queue, kStreams> queues_;
  bool closed_ = false;
  Stats stats_;
};

class DeviceCompletions {
 public:
  static Result<std::shared_ptr<DeviceCompletions>> create(std::shared_ptr<Device> device);
  ~DeviceCompletions();
  DeviceCompletions(const DeviceCompletions&) = delete;
  DeviceCompletions& operator=(const DeviceCompletions&) = delete;

  const std::shared_ptr<DeviceEvents>& events() const { return events_; }

 private:
  explicit DeviceCompletions(std::shared_ptr<Device> device)
      : events_(std::make_shared<DeviceEvents>(std::move(device))) {}

  const std::shared_ptr<DeviceEvents> events_;
  std::array<EngineThread, 2> threads_;
};

}  // namespace offload
