// Device::adopt_host: host memory that is the device's too.
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

#include "device_testing.h"
#include "doctest/doctest.h"

namespace offload {
namespace {

constexpr std::uint64_t kBytes = 2 * kPageBytes;

std::shared_ptr<Device> unified(Pace pace) {
  return must(make_simulated_device({.memory_bytes = kSimulatedBytes,
                                     .pace = pace,
                                     .delay_s = 0.0005,
                                     .bytes_per_s = 0,
                                     .check = true,
                                     .unified = true}));
}

struct TimedUnified {
  static std::shared_ptr<Device> make() { return unified(Pace::kTimed); }
};
struct EarliestUnified {
  static std::shared_ptr<Device> make() { return unified(Pace::kEarliest); }
};
struct LatestUnified {
  static std::shared_ptr<Device> make() { return unified(Pace::kLatest); }
};
#define OFFLOAD_UNIFIED_DEVICES TimedUnified, EarliestUnified, LatestUnified

bool refused(const Status& status, const char* part) {
  INFO(status.to_string());
  return status.code() == Code::kInvalid && mentions(status.to_string(), part);
}

}  // namespace

TEST_CASE("Host memory is the device's where it is registered, and nothing is apart") {
  const auto apart = simulated(Pace::kEarliest);
  CHECK(refused(apart->adopt_host(pinned_arena(*apart, kMiB)).status(), "apart from the host's"));
  const auto device = unified(Pace::kEarliest);
  CHECK(refused(device->adopt_host(make_host_arena(kMiB)).status(), "pin the HostArena"));
  const auto host = pinned_arena(*device, kMiB);
  const DeviceMemory memory = must(device->adopt_host(host));
  CHECK(memory.data() == host->base());
  CHECK(memory.nbytes() == host->capacity());
}

TEST_CASE_TEMPLATE("A copy of host memory to itself moves nothing, and is a read in its stream",
                   Kind, OFFLOAD_UNIFIED_DEVICES) {
  const auto device = Kind::make();
  const auto host = pinned_arena(*device, kMiB);
  const DeviceMemory memory = must(device->adopt_host(host));
  const Lease lease = must_allocate(*host, kBytes);
  std::memset(lease.data(), 0x11, kBytes);
  const Access written{lease.data(), kBytes, AccessKind::kWrite};
  must(device->copy_d2h(lease.data(), lease.data(), kBytes, StreamId::kD2h, "copy"));
  CHECK(all_bytes_are(lease.data(), kBytes, 0x11));
  CHECK(device->stats().copies == 0);
  CHECK(device->stats().d2h_bytes == 0);
  CHECK(names_both(device->use_host(written, "host"), "host", "copy"));
  CHECK(names_both(device->use(StreamId::kCompute, written, "update"), "update", "copy"));
  must(device->use(StreamId::kCompute, {lease.data(), kBytes, AccessKind::kRead}, "forward"));
  const Event read = must(device->record(StreamId::kD2h));
  const Event computed = must(device->record(StreamId::kCompute));
  must(device->synchronize(read));
  CHECK(names_both(device->use_host(written, "host"), "host", "forward"));
  must(device->synchronize(computed));
  must(device->use_host(written, "host"));
}

TEST_CASE_TEMPLATE("Copies between places of one host memory do move, in order", Kind,
                   OFFLOAD_UNIFIED_DEVICES) {
  const auto device = Kind::make();
  const auto host = pinned_arena(*device, kMiB);
  const DeviceMemory memory = must(device->adopt_host(host));
  const Lease from = must_allocate(*host, kBytes);
  const Lease to = must_allocate(*host, kBytes);
  std::memset(from.data(), 0x11, kBytes);
  std::memset(to.data(), 0x22, kBytes);
  must(device->copy_h2d(to.data(), from.data(), kBytes, StreamId::kH2d, "there"));
  CHECK(names_both(device->fill(to.data(), 0x33, kBytes, StreamId::kCompute, "fill"), "fill",
                   "there"));
  must(device->wait(StreamId::kCompute, must(device->record(StreamId::kH2d)), "test"));
  CHECK(all_bytes_are(to.data(), kBytes, 0x11));  // this thread is the compute stream
  must(device->fill(to.data(), 0x33, kBytes, StreamId::kCompute, "fill"));
  CHECK(all_bytes_are(to.data(), kBytes, 0x33));
  CHECK(device->stats().h2d_bytes == kBytes);
}

TEST_CASE("An arena over host memory poisons what is given back") {
  const auto device = unified(Pace::kLatest);
  const auto host = pinned_arena(*device, kMiB);
  (void)must_allocate(*host, kMiB);  // all of it is there from now on
  const auto arena = must(DeviceArena::create_over(device, must(device->adopt_host(host)), true));
  auto lease = must_lease(*arena, kBytes, "lease");
  CHECK(lease->data() >= host->base());
  must(lease->acquire(StreamId::kCompute));
  CHECK(all_bytes_are(lease->data(), kBytes, 0xFF));
  must(device->fill(lease->data(), 0x11, kBytes, StreamId::kCompute, "lease"));
  lease->note_use(must(device->record(StreamId::kCompute)));
  const std::byte* const data = lease->data();
  CHECK(all_bytes_are(data, kBytes, 0x11));
  lease.reset();
  must(device->drain());
  CHECK(all_bytes_are(data, kBytes, 0xFF));
  CHECK(device->conflicts() == 0);
}

TEST_CASE_TEMPLATE("The device keeps host memory until its own is gone and all work is done", Kind,
                   OFFLOAD_UNIFIED_DEVICES) {
  auto device = Kind::make();
  auto host = pinned_arena(*device, kMiB);
  const std::weak_ptr<HostArena> known = host;
  DeviceMemory memory = must(device->adopt_host(host));
  {
    const Lease from = must_allocate(*host, kBytes);
    std::memset(from.data(), 0x11, kBytes);
    must(device->copy_h2d(from.data() + kMiB / 2, from.data(), kBytes, StreamId::kH2d));
  }
  const Event copied = must(device->record(StreamId::kH2d));
  host.reset();
  REQUIRE_FALSE(known.expired());
  DeviceMemory moved = std::move(memory);
  REQUIRE_FALSE(known.expired());
  moved = {};
  CHECK(known.expired());
  CHECK(must(device->query(copied)));
  memory = must(device->adopt_host(pinned_arena(*device, kMiB)));
  device.reset();  // the memory keeps it
  CHECK(memory.nbytes() == kMiB);
}

}  // namespace offload
