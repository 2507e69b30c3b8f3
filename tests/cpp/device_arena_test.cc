// DeviceArena: sizes, placement, and reuse that is ordered by streams.
#include "device/device_arena.h"

#include <cstdint>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "device_testing.h"
#include "doctest/doctest.h"
#include "mem/free_ranges.h"

namespace offload {
namespace {

constexpr std::uint64_t kUnit = DeviceArena::kLeaseBytes;

}  // namespace

TEST_CASE("Device leases are rounded to 512 bytes and no further, and counted") {
  const auto device = simulated(Pace::kEarliest);
  const auto arena = device_arena(device, 10 * kUnit + 100);
  CHECK(arena->capacity() == 10 * kUnit);
  auto one = must_lease(*arena, 1, "one");
  auto exact = must_lease(*arena, 3 * kUnit);
  CHECK(one->nbytes() == kUnit);
  CHECK(exact->nbytes() == 3 * kUnit);
  CHECK(one->label() == "one");
  CHECK(exact->data() == arena->base() + exact->offset());
  CHECK(arena->usage().in_use == 4 * kUnit);
  one.reset();
  CHECK(arena->usage().in_use == 3 * kUnit);
  CHECK(arena->usage().peak == 4 * kUnit);
  CHECK(arena->usage().allocations == 2);
  const auto refused = arena->allocate(8 * kUnit);
  CHECK(refused.status().code() == Code::kBudget);
  CHECK(mentions(refused.status().to_string(),
                 "4096 bytes are needed, 3584 are free, the longest "
                 "free range has 3072"));
  exact.reset();
  CHECK(must_lease(*arena, 10 * kUnit)->nbytes() == 10 * kUnit);  // neighbours coalesce
  CHECK(arena->allocate(0).status().code() == Code::kInvalid);
  CHECK(arena->allocate(~std::uint64_t{0}).status().code() == Code::kBudget);
  CHECK(DeviceArena::create(device, kUnit - 1).status().code() == Code::kInvalid);
  const auto too_much = DeviceArena::create(device, 2 * kSimulatedBytes);
  CHECK(too_much.status().code() == Code::kNoMemory);
  CHECK(mentions(too_much.status().to_string(), "lower Budget(device=...)"));
}

TEST_CASE("Planned leases go where they were planned, or are refused") {
  const auto arena = device_arena(simulated(Pace::kEarliest), 16 * kUnit);
  auto middle = must(arena->allocate_at(4 * kUnit, 2 * kUnit));
  CHECK(middle->offset() == 4 * kUnit);
  for (const std::uint64_t units : {3, 4, 5, 15}) {
    CAPTURE(units);
    CHECK(arena->allocate_at(units * kUnit, 2 * kUnit).status().code() == Code::kBudget);
  }
  CHECK(arena->allocate_at(100, kUnit).status().code() == Code::kInvalid);
  auto before = must(arena->allocate_at(0, 4 * kUnit));
  auto after = must(arena->allocate_at(6 * kUnit, 10 * kUnit));
  CHECK(arena->usage().largest_free == 0);
  middle.reset();
  CHECK(must(arena->allocate_at(5 * kUnit, kUnit))->offset() == 5 * kUnit);
}

TEST_CASE_TEMPLATE("A lease may be dropped under a copy: the next owner's stream waits", Kind,
                   OFFLOAD_DEVICES) {
  const auto device = Kind::make();
  if (!device) return;
  const auto host = pinned_arena(*device, kMiB);
  const auto arena = device_arena(device, 4 * kUnit);
  const Lease ones = must_allocate(*host, 4 * kUnit);
  const Lease twos = must_allocate(*host, 4 * kUnit);
  const Lease back = must_allocate(*host, 4 * kUnit);
  std::memset(ones.data(), 1, 4 * kUnit);
  std::memset(twos.data(), 2, 4 * kUnit);
  auto first = must_lease(*arena, 4 * kUnit, "first");
  must(first->acquire(StreamId::kH2d));
  must(device->copy_h2d(first->data(), ones.data(), 4 * kUnit, StreamId::kH2d, "first"));
  must(device->wait(StreamId::kD2h, must(device->record(StreamId::kH2d)), "arrival"));
  must(device->copy_d2h(back.data(), first->data(), 4 * kUnit, StreamId::kD2h, "first"));
  const Event read = must(device->record(StreamId::kD2h));
  first->note_use(read);
  first.reset();
  // Two parts of the range, of which each must wait.
  for (const std::uint64_t part : {0, 1}) {
    const auto next = must_lease(*arena, 2 * kUnit, "next");
    must(next->acquire(StreamId::kH2d));
    must(next->acquire(StreamId::kH2d));
    must(device->copy_h2d(next->data(), twos.data(), 2 * kUnit, StreamId::kH2d, "next"));
    next->note_use(must(device->record(StreamId::kH2d)));
    CHECK(device->stats().waits.at(DeviceArena::kReuse) >= part + 1);
  }
  CHECK(device->stats().host_waits == 0);
  must(device->synchronize(read));
  CHECK(all_bytes_are(back.data(), 4 * kUnit, 1));
  CHECK(device->conflicts() == 0);
}

TEST_CASE_TEMPLATE("Without the wait for former owners the checker names both leases", Kind,
                   EarliestDevice, LatestDevice) {
  const auto device = Kind::make();
  const auto host = pinned_arena(*device, kMiB);
  const auto arena = device_arena(device, 4 * kUnit);
  const Lease bytes = must_allocate(*host, kUnit);
  const auto read_then_overwrite = [&]() -> Status {
    auto first = must_lease(*arena, 4 * kUnit, "block.1 weights");
    must(first->acquire(StreamId::kD2h));
    OFFLOAD_RETURN_IF_ERROR(
        device->copy_d2h(bytes.data(), first->data(), kUnit, StreamId::kD2h, first->label()));
    first->note_use(must(device->record(StreamId::kD2h)));
    first.reset();
    auto second = must_lease(*arena, 4 * kUnit, "block.2 weights");
    must(second->acquire(StreamId::kCompute));
    return second->use(StreamId::kCompute, AccessKind::kWrite);
  };
  must(read_then_overwrite());
  must(device->drain());
  device->omit_waits(DeviceArena::kReuse);
  CHECK(names_both(read_then_overwrite(), "'block.1 weights'", "'block.2 weights'"));
  CHECK(device->conflicts() == 1);
}

TEST_CASE_TEMPLATE("What is given back is poisoned, after its last use", Kind, OFFLOAD_DEVICES) {
  const auto device = Kind::make();
  if (!device) return;
  const auto host = pinned_arena(*device, kMiB);
  const auto arena = device_arena(device, 8 * kUnit, true);
  const Lease ones = must_allocate(*host, kUnit);
  const Lease back = must_allocate(*host, 4 * kUnit);
  std::memset(ones.data(), 1, kUnit);
  const auto download = [&](DeviceLease& lease, std::uint64_t nbytes) {
    must(lease.acquire(StreamId::kD2h));
    must(device->copy_d2h(back.data(), lease.data(), nbytes, StreamId::kD2h, lease.label()));
    const Event event = must(device->record(StreamId::kD2h));
    lease.note_use(event);
    return event;
  };
  // Fresh memory is poison too.
  must(device->synchronize(download(*must_lease(*arena, 4 * kUnit), 4 * kUnit)));
  CHECK(all_bytes_are(back.data(), 4 * kUnit, 0xFF));
  auto lease = must_lease(*arena, kUnit);
  must(lease->acquire(StreamId::kH2d));
  must(device->copy_h2d(lease->data(), ones.data(), kUnit, StreamId::kH2d));
  const Event arrived = must(device->record(StreamId::kH2d));
  lease->note_use(arrived);
  must(device->wait(StreamId::kD2h, arrived, "arrival"));
  const Event read = download(*lease, kUnit);
  lease.reset();
  must(device->synchronize(read));
  CHECK(all_bytes_are(back.data(), kUnit, 1));  // the poison came after the copy
  must(device->synchronize(download(*must_lease(*arena, kUnit), kUnit)));
  CHECK(all_bytes_are(back.data(), kUnit, 0xFF));
  CHECK(device->conflicts() == 0);
}

TEST_CASE_TEMPLATE("An arena over memory of others keeps it until all is done", Kind,
                   OFFLOAD_DEVICES) {
  const auto device = Kind::make();
  if (!device) return;
  const auto host = pinned_arena(*device, kMiB);
  // Whose memory it is does not matter to who adopts it: a second device has allocated it.
  const auto other = Kind::make();
  auto memory = std::make_shared<DeviceMemory>(must(other->allocate(8 * kUnit + 100)));
  const std::weak_ptr<DeviceMemory> watched = memory;
  const Lease back = must_allocate(*host, kUnit);
  {
    std::byte* const data = memory->data();
    DeviceMemory part = must(device->adopt(data, 8 * kUnit + 100, std::move(memory)));
    must(device->fill(data, 0x11, kUnit, StreamId::kCompute));
    auto arena = must(DeviceArena::create_over(device, std::move(part)));
    CHECK(arena->capacity() == 8 * kUnit);
    CHECK(device->adopt(data + kUnit, kUnit, nullptr).status().code() == Code::kInvalid);
    auto lease = must_lease(*arena, kUnit, "first");
    CHECK(lease->data() == data);
    // Ordered after the fill, which came before there was an arena.
    must(lease->acquire(StreamId::kD2h));
    must(device->copy_d2h(back.data(), lease->data(), kUnit, StreamId::kD2h));
    lease->note_use(must(device->record(StreamId::kD2h)));
    arena.reset();
    CHECK_FALSE(watched.expired());  // the lease keeps it
  }
  CHECK(watched.expired());
  CHECK(device->conflicts() == 0);
  CHECK(all_bytes_are(back.data(), kUnit, 0x11));
  const DeviceMemory own = must(device->allocate(4 * kUnit));
  CHECK(device->adopt(own.data() + kUnit, kUnit, nullptr).status().code() == Code::kInvalid);
  CHECK(device->adopt(nullptr, kUnit, nullptr).status().code() == Code::kInvalid);
}

TEST_CASE("Memory of others must begin where leases may") {
  const auto device = simulated(Pace::kEarliest);
  const auto other = simulated(Pace::kEarliest);
  const DeviceMemory memory = must(other->allocate(4 * kUnit));
  const auto refused = [&](std::uint64_t offset, std::uint64_t nbytes) {
    auto part = must(device->adopt(memory.data() + offset, nbytes, nullptr));
    return DeviceArena::create_over(device, std::move(part)).status().code();
  };
  CHECK(refused(64, 2 * kUnit) == Code::kInvalid);
  CHECK(refused(0, kUnit - 1) == Code::kInvalid);
  CHECK(refused(kUnit, kUnit) == Code::kOk);
}

TEST_CASE("The order after what was done in memory of others is needed") {
  const auto device = simulated(Pace::kLatest);
  const auto other = simulated(Pace::kEarliest);
  const auto host = pinned_arena(*device, kMiB);
  const DeviceMemory memory = must(other->allocate(kUnit));
  device->omit_waits(DeviceArena::kReuse);
  auto part = must(device->adopt(memory.data(), kUnit, nullptr));
  must(device->use(StreamId::kCompute, {memory.data(), kUnit, AccessKind::kWrite}, "earlier"));
  const auto arena = must(DeviceArena::create_over(device, std::move(part)));
  const auto lease = must_lease(*arena, kUnit, "later");
  const Lease source = must_allocate(*host, kUnit);
  must(lease->acquire(StreamId::kH2d));
  CHECK(names_both(
      device->copy_h2d(lease->data(), source.data(), kUnit, StreamId::kH2d, lease->label()),
      "earlier", "later"));
}

TEST_CASE("A conflict that a dropped lease finds fails the next call") {
  const auto device = simulated(Pace::kLatest);
  const auto arena = device_arena(device, 8 * kUnit, true);
  auto lease = must_lease(*arena, kUnit, "weights");
  must(lease->acquire(StreamId::kCompute));
  must(lease->use(StreamId::kCompute, AccessKind::kRead));
  lease.reset();  // nobody noted the use, so the poison does not wait for it
  CHECK(
      names_both(device->record(StreamId::kH2d).status(), "fill of 'weights'", "use of 'weights'"));
  CHECK(device->record(StreamId::kH2d).is_ok());
}

TEST_CASE("A device arena that churns at random keeps every order, and no history for ever") {
  const auto device = simulated(Pace::kLatest);
  const auto arena = device_arena(device, 64 * kUnit, true);
  std::mt19937 random(5);
  std::vector<std::shared_ptr<DeviceLease>> held;
  for (int i = 0; i < 20'000; ++i) {
    if (random() % 2 == 0) {
      auto lease = arena->allocate(1 + random() % (8 * kUnit));
      if (lease.is_ok()) {
        const auto stream = static_cast<StreamId>(random() % kStreams);
        must(lease.value()->acquire(stream));
        must(device->fill(lease.value()->data(), 1, lease.value()->nbytes(), stream));
        lease.value()->note_use(must(device->record(stream)));
        held.push_back(lease.take());
      }
    } else if (!held.empty()) {
      std::swap(held[random() % held.size()], held.back());
      held.pop_back();
    }
  }
  held.clear();
  CHECK(arena->usage().in_use == 0);
  CHECK(arena->usage().largest_free == 64 * kUnit);
  CHECK(device->conflicts() == 0);
}

TEST_CASE("FreeRanges takes a range in the middle, against a bitmap") {
  constexpr std::uint64_t kSize = 64;
  std::mt19937 random(9);
  FreeRanges ranges(kSize);
  std::vector<bool> taken(kSize, false);
  std::vector<std::pair<std::uint64_t, std::uint64_t>> blocks;
  int refused = 0;
  for (int i = 0; i < 20'000; ++i) {
    const std::uint64_t offset = random() % (kSize + 2);
    const std::uint64_t nbytes = 1 + random() % 8;
    bool fits = offset + nbytes <= kSize;
    for (std::uint64_t at = offset; fits && at < offset + nbytes; ++at) fits = !taken[at];
    REQUIRE(ranges.take_at(offset, nbytes) == fits);
    if (fits) {
      blocks.emplace_back(offset, nbytes);
    } else {
      ++refused;
      if (blocks.empty()) continue;
      std::swap(blocks[random() % blocks.size()], blocks.back());
      const auto [from, length] = blocks.back();
      blocks.pop_back();
      ranges.give_back(from, length);
      for (std::uint64_t at = from; at < from + length; ++at) taken[at] = false;
    }
    if (fits) {
      for (std::uint64_t at = offset; at < offset + nbytes; ++at) taken[at] = true;
    }
  }
  CHECK(refused > 1000);
  for (const auto& [offset, length] : blocks) ranges.give_back(offset, length);
  CHECK(ranges.longest() == kSize);
  CHECK_FALSE(ranges.take_at(1, ~std::uint64_t{0}));
}

}  // namespace offload
