// Device: what every device promises, on the simulated ones and, where there is one, on CUDA's.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "device/split_copy.h"
#include "device_testing.h"
#include "doctest/doctest.h"

namespace offload {
namespace {

constexpr std::uint64_t kBytes = 3 * kPageBytes + 24;

}  // namespace

TEST_CASE_TEMPLATE("Bytes go to the device and back, in stream order", Kind, OFFLOAD_DEVICES) {
  const auto device = Kind::make();
  if (!device) return;
  const auto host = pinned_arena(*device, kMiB);
  const DeviceMemory there = must(device->allocate(kMiB));
  const Lease out = must_allocate(*host, kBytes);
  const Lease back = must_allocate(*host, kBytes);
  std::mt19937_64 random(1);
  for (std::uint64_t i = 0; i < kBytes; ++i) out.data()[i] = static_cast<std::byte>(random());
  std::memset(back.data(), 0, kBytes);
  must(device->copy_h2d(there.data() + 256, out.data(), kBytes, StreamId::kH2d));
  must(device->copy_d2d(there.data() + 65536, there.data() + 256, kBytes, StreamId::kH2d));
  must(device->fill(there.data() + 65536, 0x5A, 8, StreamId::kH2d));
  const Event copied = must(device->record(StreamId::kH2d));
  must(device->wait(StreamId::kD2h, copied, "test"));
  must(device->copy_d2h(back.data(), there.data() + 65536, kBytes, StreamId::kD2h));
  const Event home = must(device->record(StreamId::kD2h));
  must(device->synchronize(home));
  CHECK(must(device->query(copied)));
  CHECK(all_bytes_are(back.data(), 8, 0x5A));
  CHECK(std::memcmp(back.data() + 8, out.data() + 8, kBytes - 8) == 0);
  const Device::Stats stats = device->stats();
  CHECK(stats.h2d_bytes == kBytes);
  CHECK(stats.d2h_bytes == kBytes);
  CHECK(stats.d2d_bytes == kBytes);
  CHECK(stats.copies == 3);
  CHECK(stats.events == 2);
  CHECK(stats.waits.at("test") == 1);
  CHECK(device->conflicts() == 0);
  CHECK(must(device->memory_info()).free <= must(device->memory_info()).total);
}

TEST_CASE_TEMPLATE("Copies on the compute stream, and waits of it, are in order", Kind,
                   OFFLOAD_DEVICES) {
  const auto device = Kind::make();
  if (!device) return;
  const auto host = pinned_arena(*device, kMiB);
  const DeviceMemory there = must(device->allocate(kMiB));
  const Lease lease = must_allocate(*host, kBytes);
  std::memset(lease.data(), 0x11, kBytes);
  must(device->copy_h2d(there.data(), lease.data(), kBytes, StreamId::kH2d));
  must(device->wait(StreamId::kCompute, must(device->record(StreamId::kH2d)), "test"));
  must(device->copy_d2d(there.data() + kMiB / 2, there.data(), kBytes, StreamId::kCompute));
  must(device->wait(StreamId::kD2h, must(device->record(StreamId::kCompute)), "test"));
  const Lease back = must_allocate(*host, kBytes);
  must(device->copy_d2h(back.data(), there.data() + kMiB / 2, kBytes, StreamId::kD2h));
  must(device->drain());
  CHECK(all_bytes_are(back.data(), kBytes, 0x11));
}

TEST_CASE_TEMPLATE("A hundred copies through one place keep their order", Kind, OFFLOAD_DEVICES) {
  const auto device = Kind::make();
  if (!device) return;
  const auto host = pinned_arena(*device, 4 * kMiB);
  const DeviceMemory there = must(device->allocate(kPageBytes));
  const Lease out = must_allocate(*host, 100 * kPageBytes);
  const Lease back = must_allocate(*host, 100 * kPageBytes);
  for (int i = 0; i < 100; ++i) {
    std::memset(out.data() + i * kPageBytes, i, kPageBytes);
  }
  Event free;
  for (std::uint64_t at = 0; at < 100 * kPageBytes; at += kPageBytes) {
    if (free != nullptr) must(device->wait(StreamId::kH2d, free, "reuse"));
    must(device->copy_h2d(there.data(), out.data() + at, kPageBytes, StreamId::kH2d));
    must(device->wait(StreamId::kD2h, must(device->record(StreamId::kH2d)), "arrival"));
    must(device->copy_d2h(back.data() + at, there.data(), kPageBytes, StreamId::kD2h));
    free = must(device->record(StreamId::kD2h));
  }
  CHECK(device->stats().host_waits == 0);
  must(device->synchronize(free));
  CHECK(std::memcmp(out.data(), back.data(), 100 * kPageBytes) == 0);
}

TEST_CASE_TEMPLATE("Copies are split where registered ranges of host memory end", Kind,
                   OFFLOAD_DEVICES) {
  const auto device = Kind::make();
  if (!device) return;
  constexpr std::uint64_t kStep = 4 * kPageBytes;
  const auto host = pinned_arena(*device, 64 * kPageBytes, kStep);
  std::vector<Lease> steps;  // each commits a step of its own
  for (int i = 0; i < 8; ++i) steps.push_back(must_allocate(*host, kStep));
  steps.clear();
  const Lease lease = must_allocate(*host, 8 * kStep);
  REQUIRE(lease.data() == host->base());
  std::mt19937_64 random(2);
  for (std::uint64_t i = 0; i < 8 * kStep; ++i) lease.data()[i] = static_cast<std::byte>(random());
  const DeviceMemory there = must(device->allocate(8 * kStep));
  const Lease back = must_allocate(*host, 8 * kStep);
  must(device->copy_h2d(there.data(), lease.data() + 100, 7 * kStep, StreamId::kH2d));
  CHECK(device->stats().copies == 8);
  must(device->wait(StreamId::kD2h, must(device->record(StreamId::kH2d)), "test"));
  must(device->copy_d2h(back.data(), there.data(), 7 * kStep, StreamId::kD2h));
  must(device->drain());
  CHECK(std::memcmp(lease.data() + 100, back.data(), 7 * kStep) == 0);
}

TEST_CASE_TEMPLATE("Memory that the device does not know is refused by name", Kind,
                   OFFLOAD_DEVICES) {
  const auto device = Kind::make();
  if (!device) return;
  const auto host = pinned_arena(*device, kMiB);
  const auto stranger = make_host_arena(kMiB);
  const DeviceMemory there = must(device->allocate(kPageBytes));
  const Lease known = must_allocate(*host, 2 * kPageBytes);
  const Lease unknown = must_allocate(*stranger, kPageBytes);
  const auto refused = [](const Status& status, const char* part) {
    INFO(status.to_string());
    return status.code() == Code::kInvalid && mentions(status.to_string(), part);
  };
  CHECK(refused(device->copy_h2d(there.data(), unknown.data(), kPageBytes, StreamId::kH2d),
                "pin the HostArena"));
  CHECK(refused(device->copy_h2d(there.data(), known.data(), 2 * kPageBytes, StreamId::kH2d),
                "are not memory of"));
  CHECK(refused(device->copy_d2h(known.data(), there.data() + 1, kPageBytes, StreamId::kD2h),
                "are not memory of"));
  CHECK(refused(device->fill(known.data(), 0, kPageBytes, StreamId::kH2d), "are not memory of"));
  CHECK(refused(device->wait(StreamId::kH2d, nullptr, "test"), "was not recorded on"));
  CHECK(device->allocate(0).status().code() == Code::kInvalid);
  CHECK(device->stats().copies == 0);
}

TEST_CASE_TEMPLATE("A host arena may go under a copy, and may outlive the device", Kind,
                   OFFLOAD_DEVICES) {
  auto device = Kind::make();
  if (!device) return;
  const DeviceMemory there = must(device->allocate(kMiB));
  {
    const auto host = pinned_arena(*device, kMiB);
    const Lease lease = must_allocate(*host, kMiB / 2);
    std::memset(lease.data(), 0x77, kMiB / 2);
    must(device->copy_h2d(there.data(), lease.data(), kMiB / 2, StreamId::kH2d));
  }
  const Event copied = must(device->record(StreamId::kH2d));
  const auto host = pinned_arena(*device, kMiB);
  const Lease back = must_allocate(*host, kMiB / 2);
  must(device->wait(StreamId::kD2h, copied, "test"));
  must(device->copy_d2h(back.data(), there.data(), kMiB / 2, StreamId::kD2h));
  must(device->drain());
  CHECK(all_bytes_are(back.data(), kMiB / 2, 0x77));
  device.reset();
}

TEST_CASE_TEMPLATE("More memory than the device has is refused", Kind, OFFLOAD_DEVICES) {
  const auto device = Kind::make();
  if (!device) return;
  const std::uint64_t total = must(device->memory_info()).total;
  const auto refused = device->allocate(2 * total);
  REQUIRE_FALSE(refused.is_ok());
  CHECK(refused.status().code() == Code::kNoMemory);
  // Nothing pending is left for the next call to stumble on.
  CHECK(device->allocate(kPageBytes).is_ok());
  CHECK(device->record(StreamId::kCompute).is_ok());
}

TEST_CASE_TEMPLATE("Waits of the host are counted once an event, those of streams never", Kind,
                   OFFLOAD_DEVICES) {
  const auto device = Kind::make();
  if (!device) return;
  const auto host = pinned_arena(*device, kMiB);
  const DeviceMemory there = must(device->allocate(kBytes));
  const Lease lease = must_allocate(*host, kBytes);
  must(device->copy_h2d(there.data(), lease.data(), kBytes, StreamId::kH2d));
  const Event event = must(device->record(StreamId::kH2d));
  must(device->wait(StreamId::kCompute, event, "test"));
  CHECK(device->stats().host_waits == 0);
  must(device->synchronize(event));
  must(device->synchronize(event));
  CHECK(device->stats().host_waits <= 1);  // it may have been complete already
}

TEST_CASE_TEMPLATE("A forked child is refused, and its copy of the device goes quietly", Kind,
                   OFFLOAD_DEVICES) {
  auto device = Kind::make();
  if (!device) return;
  auto host = pinned_arena(*device, kMiB);
  auto arena = device_arena(device, kMiB, true);
  auto lease = must_lease(*arena, kPageBytes);
  Event event = must(device->record(StreamId::kH2d));
  std::fflush(nullptr);
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    bool refused = !device->record(StreamId::kH2d).is_ok() && !arena->allocate(1).is_ok() &&
                   !device->wait(StreamId::kD2h, event, "test").is_ok() &&
                   !lease->acquire(StreamId::kH2d).is_ok() && !device->query(event).is_ok() &&
                   mentions(device->drain().to_string(), "forked child");
    lease.reset();
    arena.reset();
    event.reset();
    device.reset();
    ::_exit(refused ? 0 : 1);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
  CHECK(device->drain().is_ok());
}

TEST_CASE("Copies are split at multiples of the step from the arena's base") {
  struct Piece {
    std::uint64_t at;
    std::uint64_t nbytes;
    bool operator==(const Piece&) const = default;
  };
  const auto pieces = [](std::uint64_t offset, std::uint64_t nbytes, std::uint64_t step) {
    std::vector<Piece> all;
    must(split_copy(offset, nbytes, step, [&](std::uint64_t at, std::uint64_t part) {
      all.push_back({at, part});
      return Status::ok();
    }));
    return all;
  };
  CHECK(pieces(0, 0, 64).empty());
  CHECK(pieces(0, 64, 64) == std::vector<Piece>{{0, 64}});
  CHECK(pieces(60, 4, 64) == std::vector<Piece>{{0, 4}});
  CHECK(pieces(60, 5, 64) == std::vector<Piece>{{0, 4}, {4, 1}});
  CHECK(pieces(10, 150, 64) == std::vector<Piece>{{0, 54}, {54, 64}, {118, 32}});
  int calls = 0;
  const Status failed = split_copy(0, 200, 64, [&](std::uint64_t, std::uint64_t) {
    return ++calls == 2 ? Status::error(Code::kDevice, "no") : Status::ok();
  });
  CHECK_FALSE(failed.is_ok());
  CHECK(calls == 2);
}

}  // namespace offload
