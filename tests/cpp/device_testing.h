// What the tests of devices share: every kind of device that this machine can have, and memory of
// it and of the host.
//
// A kind is one of OFFLOAD_DEVICES, for TEST_CASE_TEMPLATE. The simulated ones come with the
// checker; the CUDA one is skipped, with a message, where there is none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "device/cuda_device.h"
#include "device/device.h"
#include "device/device_arena.h"
#include "device/simulated_device.h"
#include "doctest/doctest.h"
#include "mem/host_arena.h"
#include "memory_testing.h"

namespace offload {

using Pace = SimulatedDeviceOptions::Pace;

inline constexpr std::uint64_t kSimulatedBytes = 16 * kMiB;

inline std::shared_ptr<Device> simulated(Pace pace, double delay_s = 0, bool check = true) {
  auto device = make_simulated_device({.memory_bytes = kSimulatedBytes,
                                       .pace = pace,
                                       .delay_s = delay_s,
                                       .bytes_per_s = 0,
                                       .check = check});
  REQUIRE_MESSAGE(device.is_ok(), device.status().to_string());
  return device.take();
}

struct TimedDevice {
  static std::shared_ptr<Device> make() { return simulated(Pace::kTimed, 0.0005); }
};
struct EarliestDevice {
  static std::shared_ptr<Device> make() { return simulated(Pace::kEarliest); }
};
struct LatestDevice {
  static std::shared_ptr<Device> make() { return simulated(Pace::kLatest); }
};
struct RealDevice {
  static std::shared_ptr<Device> make() {
    auto device = make_cuda_device(0, true);
    if (device.is_ok()) return device.take();
    REQUIRE_MESSAGE(device.status().code() == Code::kUnsupported, device.status().to_string());
    MESSAGE("skipped: ", device.status().to_string());
    return nullptr;
  }
};
#define OFFLOAD_SIMULATED_DEVICES TimedDevice, EarliestDevice, LatestDevice
#define OFFLOAD_DEVICES OFFLOAD_SIMULATED_DEVICES, RealDevice

// A host arena that the device may copy from and to.
inline std::shared_ptr<HostArena> pinned_arena(Device& device, std::uint64_t capacity,
                                               std::uint64_t commit_step = 0) {
  HostArenaOptions options;
  options.registrar = device.registrar();
  options.commit_step = commit_step;
  std::shared_ptr<HostArena> arena = make_host_arena(capacity, options);
  device.add_host_memory(arena);
  return arena;
}

inline std::shared_ptr<DeviceArena> device_arena(std::shared_ptr<Device> device,
                                                 std::uint64_t capacity, bool poison = false) {
  auto arena = DeviceArena::create(std::move(device), capacity, poison);
  REQUIRE_MESSAGE(arena.is_ok(), arena.status().to_string());
  return arena.take();
}

inline std::shared_ptr<DeviceLease> must_lease(DeviceArena& arena, std::uint64_t nbytes,
                                               std::string label = {}) {
  auto lease = arena.allocate(nbytes, std::move(label));
  REQUIRE_MESSAGE(lease.is_ok(), lease.status().to_string());
  return lease.take();
}

inline void must(const Status& status) {
  REQUIRE_MESSAGE(status.is_ok(), status.to_string());
}

template <typename T>
T must(Result<T> result) {
  REQUIRE_MESSAGE(result.is_ok(), result.status().to_string());
  return result.take();
}

// That a call failed as unordered, naming both.
inline bool names_both(const Status& status, const std::string& one, const std::string& other) {
  const std::string text = status.to_string();
  INFO(text);
  CHECK(status.code() == Code::kUnordered);
  return mentions(text, one) && mentions(text, other);
}

}  // namespace offload
