// SimulatedDevice: that it is as unkind as CUDA may be.
#include "device/simulated_device.h"

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <thread>

#include "device_testing.h"
#include "doctest/doctest.h"

namespace offload {
namespace {

// Without the checker: these do what it forbids.
struct Fixture {
  explicit Fixture(Pace pace)
      : device(simulated(pace, 0, false)),
        host(pinned_arena(*device, kMiB)),
        there(must(device->allocate(kMiB))),
        lease(must_allocate(*host, kPageBytes)) {
    std::memset(there.data(), 0x22, kMiB);
    std::memset(lease.data(), 0x33, kPageBytes);
  }
  Status upload() {
    return device->copy_h2d(there.data(), lease.data(), kPageBytes, StreamId::kH2d);
  }
  bool there_is(int value) const { return all_bytes_are(there.data(), kPageBytes, value); }

  std::shared_ptr<Device> device;
  std::shared_ptr<HostArena> host;
  DeviceMemory there;
  Lease lease;
};

}  // namespace

TEST_CASE("Latest: the destination is poison until somebody waits, the source is read then") {
  Fixture f(Pace::kLatest);
  must(f.upload());
  CHECK(f.there_is(0xFF));
  const Event event = must(f.device->record(StreamId::kH2d));
  CHECK_FALSE(must(f.device->query(event)));
  CHECK_FALSE(must(f.device->wait_for(event, 5, Waiter::kBackground)));
  CHECK(f.there_is(0xFF));
  std::memset(f.lease.data(), 0x44, kPageBytes);  // too early
  must(f.device->wait(StreamId::kCompute, event, "test"));
  CHECK(f.there_is(0x44));
  CHECK(must(f.device->query(event)));
}

TEST_CASE("Latest: a copy starts, and spoils its destination, as early as it may") {
  Fixture f(Pace::kLatest);
  const Lease back = must_allocate(*f.host, kPageBytes);
  must(f.device->copy_d2h(back.data(), f.there.data() + kPageBytes, kPageBytes, StreamId::kD2h));
  const Event read = must(f.device->record(StreamId::kD2h));
  must(f.device->wait(StreamId::kH2d, read, "test"));
  must(f.upload());
  CHECK(f.there_is(0x22));  // it has to wait for the other stream
  const Event written = must(f.device->record(StreamId::kH2d));
  must(f.device->synchronize(read));
  CHECK(f.there_is(0xFF));  // and does no longer
  must(f.device->synchronize(written));
  CHECK(f.there_is(0x33));
  CHECK(all_bytes_are(back.data(), kPageBytes, 0x22));
}

TEST_CASE("Latest: waiting for an event does what its stream must do before, and no more") {
  Fixture f(Pace::kLatest);
  must(f.upload());
  const Event first = must(f.device->record(StreamId::kH2d));
  must(f.device->copy_h2d(f.there.data() + kPageBytes, f.lease.data(), kPageBytes, StreamId::kH2d));
  const Event second = must(f.device->record(StreamId::kH2d));
  must(f.device->synchronize(first));
  CHECK(f.there_is(0x33));
  CHECK(all_bytes_are(f.there.data() + kPageBytes, kPageBytes, 0xFF));
  CHECK_FALSE(must(f.device->query(second)));
  must(f.device->drain());
  CHECK(all_bytes_are(f.there.data() + kPageBytes, kPageBytes, 0x33));
}

TEST_CASE("Earliest: a copy is done as it is submitted") {
  Fixture f(Pace::kEarliest);
  must(f.upload());
  CHECK(f.there_is(0x33));
  CHECK(must(f.device->query(must(f.device->record(StreamId::kH2d)))));
}

TEST_CASE("Timed: a copy takes its time, and a wait of the compute stream with it") {
  using namespace std::chrono;
  auto device = must(make_simulated_device(
      {.memory_bytes = kMiB, .delay_s = 0.02, .bytes_per_s = 1e6, .check = true}));
  const auto host = pinned_arena(*device, kMiB);
  const DeviceMemory there = must(device->allocate(kMiB));
  const Lease lease = must_allocate(*host, 5 * kPageBytes);
  std::memset(lease.data(), 0x33, 5 * kPageBytes);
  const auto begin = steady_clock::now();
  must(device->copy_h2d(there.data(), lease.data(), 5 * kPageBytes, StreamId::kH2d));
  const Event event = must(device->record(StreamId::kH2d));
  CHECK_FALSE(must(device->query(event)));
  must(device->wait(StreamId::kCompute, event, "test"));
  CHECK(steady_clock::now() - begin >= milliseconds(40));  // 20 ms and 20 KiB at 1 MB/s
  CHECK(all_bytes_are(there.data(), 5 * kPageBytes, 0x33));
  CHECK(device->stats().host_waits == 0);
}

TEST_CASE("Timed: a wait that nothing ends does not keep the device from going") {
  auto device = simulated(Pace::kTimed, 0.05);
  const auto host = pinned_arena(*device, kMiB);
  const Lease lease = must_allocate(*host, kPageBytes);
  {
    const DeviceMemory there = must(device->allocate(kMiB));
    must(device->copy_h2d(there.data(), lease.data(), kPageBytes, StreamId::kH2d));
    must(device->wait(StreamId::kD2h, must(device->record(StreamId::kH2d)), "test"));
  }  // freed after the copy, not under it
  device.reset();
}

TEST_CASE("A copy across registered ranges is refused, as CUDA does") {
  const auto device = simulated(Pace::kEarliest);
  HostArenaOptions options;
  options.registrar = device->registrar();
  options.commit_step = kPageBytes;
  const auto host = make_host_arena(kMiB, options);
  // Known to the device with another step than it has, so that nothing is split.
  struct Misnamed final : MemoryWrapper {
    explicit Misnamed(std::shared_ptr<HostMemory> inner) : MemoryWrapper(std::move(inner)) {}
    std::uint64_t commit_step() const override { return kMiB; }
  };
  const std::shared_ptr<HostMemory> misnamed = std::make_shared<Misnamed>(host);
  device->add_host_memory(misnamed);
  static_cast<void>(must_allocate(*host, kPageBytes));
  const Lease lease = must_allocate(*host, 2 * kPageBytes);
  const DeviceMemory there = must(device->allocate(kMiB));
  const Status refused =
      device->copy_h2d(there.data(), lease.data(), 2 * kPageBytes, StreamId::kH2d);
  CHECK(refused.code() == Code::kInvalid);
  CHECK(mentions(refused.to_string(), "one registered range"));
}

TEST_CASE("Options that make no sense are refused") {
  for (const SimulatedDeviceOptions& options :
       {SimulatedDeviceOptions{.memory_bytes = 0},
        SimulatedDeviceOptions{.memory_bytes = 1, .delay_s = -1},
        SimulatedDeviceOptions{.memory_bytes = 1, .bytes_per_s = -1},
        SimulatedDeviceOptions{.memory_bytes = 1,
                               .delay_s = std::numeric_limits<double>::quiet_NaN()}}) {
    CHECK(make_simulated_device(options).status().code() == Code::kInvalid);
  }
  const auto device = simulated(Pace::kEarliest);
  CHECK(device->set_compute_stream(0).is_ok());
  CHECK(device->set_compute_stream(1).code() == Code::kInvalid);
}

}  // namespace offload
