// DeviceTransfer: disk, host and device and back, on every kind of device.
#include "stream/device_transfer.h"

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "device_testing.h"
#include "doctest/doctest.h"
#include "store_testing.h"
#include "temp_dir.h"

namespace offload {
namespace {

constexpr std::uint64_t kNbytes = kBlock + 1536;

struct Chain {
  explicit Chain(std::shared_ptr<Device> on)
      : device(std::move(on)),
        host(pinned_arena(*device, 16 * kBlock)),
        arena(device_arena(device, 4 * kBlock)),
        completions(must(DeviceCompletions::create(device))),
        store(open_store<StoreOnThreads>(dir, 16 * kBlock, 8 * kBlock)) {}

  std::shared_ptr<Lease> lease(int value = 0) {
    auto lease = std::make_shared<Lease>(must_allocate(*host, kNbytes));
    std::memset(lease->data(), value, lease->nbytes());
    return lease;
  }
  // An object of which every byte is `value`.
  ObjectId object(int value) {
    const ObjectId object = create_object(*store, kNbytes);
    const Buffer bytes(kNbytes);
    std::memset(bytes.get(), value, kNbytes);
    must_write(*store, object, bytes, kNbytes);
    return object;
  }
  DiskEnd disk(ObjectId object) const { return {store, object, IoPriority::kDemand}; }
  auto fetch(ObjectId object, std::shared_ptr<DeviceLease> to) {
    return DeviceTransfer::fetch(completions->events(), disk(object), lease(), std::move(to),
                                 kNbytes);
  }
  auto spill(ObjectId object, std::shared_ptr<DeviceLease> from, const Event& after) {
    return DeviceTransfer::spill(completions->events(), disk(object), lease(), std::move(from),
                                 kNbytes, after);
  }
  bool object_is(ObjectId object, int value) {
    const Buffer expected(kNbytes);
    std::memset(expected.get(), value, kNbytes);
    return reads_as(*store, object, expected, kNbytes);
  }
  // What compute does: all bytes of the lease become `value`.
  Event compute(DeviceLease& lease, std::uint8_t value) {
    must(device->fill(lease.data(), value, kNbytes, StreamId::kCompute, lease.label()));
    const Event done = must(device->record(StreamId::kCompute));
    lease.note_use(done);
    return done;
  }

  TempDir dir;
  std::shared_ptr<Device> device;
  std::shared_ptr<HostArena> host;
  std::shared_ptr<DeviceArena> arena;
  std::shared_ptr<DeviceCompletions> completions;
  std::shared_ptr<SwapStore> store;
};

Status end_of(DeviceTransfer& transfer) {
  for (int i = 0; i < 600; ++i) {
    const Result<bool> done = transfer.wait_for(100);
    if (!done.is_ok()) return done.status();
    if (done.value()) return transfer.status();
  }
  return Status::error(Code::kInvalid, "never ended");
}

void until_issued(DeviceTransfer& transfer) {
  for (int i = 0; i < 600 && !transfer.wait_until_issued(100); ++i) {
  }
  REQUIRE(transfer.issued());
}

}  // namespace

TEST_CASE("An event that comes after a later one of its stream is not kept waiting by it") {
  const std::shared_ptr<Device> device = simulated(Pace::kLatest);
  const auto host = pinned_arena(*device, kBlock);
  const auto arena = device_arena(device, 2 * kBlock);
  std::atomic<bool> first_came{false};
  std::atomic<bool> second_came{false};
  const auto completions = must(DeviceCompletions::create(device));
  const Lease source = must_allocate(*host, kBlock);
  std::memset(source.data(), 1, kBlock);
  std::vector<Event> events;
  std::vector<std::shared_ptr<DeviceLease>> leases;
  for (int k = 0; k < 2; ++k) {
    leases.push_back(must_lease(*arena, kBlock));
    must(device->copy_h2d(leases[k]->data(), source.data(), kBlock, StreamId::kH2d));
    events.push_back(must(device->record(StreamId::kH2d)));
  }
  completions->events()->when(events[1], [&](const Status&, const Event&) { second_came = true; });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // its thread waits for it now
  completions->events()->when(events[0], [&](const Status&, const Event&) { first_came = true; });
  must(device->synchronize(events[0]));  // nobody hurries the second
  for (int k = 0; k < 500 && !first_came; ++k) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  CHECK(first_came);
  CHECK_FALSE(second_came);
  must(device->drain());
}

TEST_CASE_TEMPLATE("From disk to the device, through compute, and back, without a host wait", Kind,
                   OFFLOAD_DEVICES) {
  const auto device = Kind::make();
  if (!device) return;
  Chain chain(device);
  const ObjectId object = chain.object(7);
  auto lease = must_lease(*chain.arena, kNbytes, "weights");
  const auto fetch = must(chain.fetch(object, lease));
  until_issued(*fetch);
  must(fetch->make_wait(StreamId::kCompute));
  must(device->use(StreamId::kCompute, {lease->data(), kNbytes, AccessKind::kRead}, "weights"));
  if (device->computes_on_host()) CHECK(all_bytes_are(lease->data(), kNbytes, 7));
  const Event computed = chain.compute(*lease, 8);
  const auto spill = must(chain.spill(object, std::move(lease), computed));
  CHECK(device->stats().host_waits == 0);
  must(end_of(*spill));
  must(end_of(*fetch));
  CHECK(chain.object_is(object, 8));
  CHECK(chain.host->usage().in_use == 0);
  CHECK(chain.arena->usage().in_use == 0);
  CHECK(device->conflicts() == 0);
  CHECK(device->stats().waits.at(DeviceTransfer::kArrival) == 1);
  CHECK(device->stats().waits.at(DeviceTransfer::kResult) == 1);
}

TEST_CASE_TEMPLATE("Many units through little device memory, all in flight at once", Kind,
                   OFFLOAD_DEVICES) {
  const auto device = Kind::make();
  if (!device) return;
  Chain chain(device);
  std::vector<ObjectId> objects;
  for (int i = 0; i < 6; ++i) objects.push_back(chain.object(i));
  std::vector<std::shared_ptr<DeviceTransfer>> spills;
  for (int i = 0; i < 6; ++i) {
    // Room for two; the third lease reuses memory that is still being copied from.
    auto lease = must_lease(*chain.arena, kNbytes, "unit " + std::to_string(i));
    const auto fetch = must(chain.fetch(objects[static_cast<std::size_t>(i)], lease));
    until_issued(*fetch);
    must(fetch->make_wait(StreamId::kCompute));
    const Event computed = chain.compute(*lease, static_cast<std::uint8_t>(i + 100));
    spills.push_back(
        must(chain.spill(objects[static_cast<std::size_t>(i)], std::move(lease), computed)));
  }
  CHECK(device->stats().host_waits == 0);
  CHECK(device->stats().waits.at(DeviceArena::kReuse) > 0);
  for (const auto& spill : spills) must(end_of(*spill));
  for (int i = 0; i < 6; ++i) {
    CHECK(chain.object_is(objects[static_cast<std::size_t>(i)], i + 100));
  }
  CHECK(device->conflicts() == 0);
}

TEST_CASE_TEMPLATE("Without a disk a transfer begins and ends in host memory", Kind,
                   OFFLOAD_DEVICES) {
  const auto device = Kind::make();
  if (!device) return;
  Chain chain(device);
  auto lease = must_lease(*chain.arena, kNbytes);
  const auto fetch =
      must(DeviceTransfer::fetch(chain.completions->events(), {}, chain.lease(9), lease, kNbytes));
  CHECK(fetch->issued());
  must(fetch->make_wait(StreamId::kD2h));
  const auto back = chain.lease();
  const auto spill =
      must(DeviceTransfer::spill(chain.completions->events(), {}, back, lease, kNbytes, nullptr));
  must(end_of(*spill));
  CHECK(all_bytes_are(back->data(), kNbytes, 9));
  CHECK(back.use_count() == 1);
  CHECK(device->use_host({back->data(), kNbytes, AccessKind::kWrite}, "reuse").is_ok());
}

TEST_CASE("Latest: the host lease of a copy is kept until somebody waits for it") {
  Chain chain(simulated(Pace::kLatest));
  std::weak_ptr<Lease> watch;
  auto lease = must_lease(*chain.arena, kNbytes);
  auto bytes = chain.lease(5);
  watch = bytes;
  const auto fetch = must(
      DeviceTransfer::fetch(chain.completions->events(), {}, std::move(bytes), lease, kNbytes));
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  CHECK_FALSE(watch.expired());
  CHECK_FALSE(fetch->done());
  CHECK(all_bytes_are(lease->data(), kNbytes, 0xFF));
  must(end_of(*fetch));
  CHECK(watch.expired());
  CHECK(all_bytes_are(lease->data(), kNbytes, 5));
}

TEST_CASE("Waiting for a copy that is not issued yet is a stall, counted once") {
  Chain chain(simulated(Pace::kTimed));
  const ObjectId object = chain.object(3);
  auto lease = must_lease(*chain.arena, kNbytes);
  std::shared_ptr<DeviceTransfer> fetch;
  {
    Gate gate(IoOp::kRead);
    fetch = must(chain.fetch(object, lease));
    gate.wait_for_operation();
    CHECK_FALSE(fetch->issued());
    CHECK(fetch->make_wait(StreamId::kCompute).code() == Code::kInvalid);
    CHECK_FALSE(fetch->wait_until_issued(5));
    CHECK_FALSE(fetch->wait_until_issued(5));
    CHECK_FALSE(must(fetch->wait_for(5)));
    gate.open();
    until_issued(*fetch);
  }
  const DeviceEvents::Stats stats = chain.completions->events()->stats();
  CHECK(stats.stalls == 1);
  CHECK(stats.stall_ns >= 10'000'000);
  must(fetch->make_wait(StreamId::kCompute));
  CHECK(all_bytes_are(lease->data(), kNbytes, 3));
  must(end_of(*fetch));
}

TEST_CASE_TEMPLATE("The disk's errors end a transfer, and everything is let go", Kind,
                   OFFLOAD_SIMULATED_DEVICES) {
  Chain chain(Kind::make());
  const ObjectId object = chain.object(1);
  auto lease = must_lease(*chain.arena, kNbytes);
  {
    OpFaults faults(IoOp::kRead, [](unsigned) { return EIO; });
    const auto fetch = must(chain.fetch(object, lease));
    CHECK(end_of(*fetch).os_errno() == EIO);
    CHECK(fetch->issued());
    CHECK(fetch->make_wait(StreamId::kCompute).os_errno() == EIO);
  }
  CHECK(lease.use_count() == 1);
  CHECK(chain.host->usage().in_use == 0);
  const Event computed = chain.compute(*lease, 2);
  {
    OpFaults faults(IoOp::kWrite, [](unsigned) { return EIO; });
    const auto spill = must(chain.spill(object, std::move(lease), computed));
    CHECK(end_of(*spill).os_errno() == EIO);
  }
  CHECK(chain.host->usage().in_use == 0);
  CHECK(chain.object_is(object, 1));  // the former version
}

TEST_CASE("A cancelled transfer does not take its next step") {
  Chain chain(simulated(Pace::kLatest));
  const ObjectId object = chain.object(1);
  auto lease = must_lease(*chain.arena, kNbytes);
  {
    Gate gate(IoOp::kRead);
    const auto fetch = must(chain.fetch(object, lease));
    gate.wait_for_operation();
    fetch->cancel();
    gate.open();
    CHECK(end_of(*fetch).code() == Code::kCancelled);
    CHECK(fetch->make_wait(StreamId::kCompute).code() == Code::kCancelled);
    CHECK(chain.device->stats().h2d_bytes == 0);
  }
  const auto spill = must(chain.spill(object, lease, chain.compute(*lease, 2)));
  spill->cancel();
  CHECK(end_of(*spill).code() == Code::kCancelled);
  CHECK(chain.object_is(object, 1));
}

TEST_CASE("Sizes that do not fit, and a store that is gone, are refused") {
  Chain chain(simulated(Pace::kEarliest));
  const ObjectId object = chain.object(1);
  const auto lease = must_lease(*chain.arena, kNbytes);
  const auto small = must_lease(*chain.arena, 512);
  const auto& events = chain.completions->events();
  const auto refused = [](const Result<std::shared_ptr<DeviceTransfer>>& result, const char* part) {
    INFO(result.status().to_string());
    return result.status().code() == Code::kInvalid && mentions(result.status().to_string(), part);
  };
  CHECK(refused(DeviceTransfer::fetch(events, {}, chain.lease(), small, kNbytes),
                "does not fit a device lease of 512"));
  CHECK(refused(DeviceTransfer::fetch(events, {}, std::make_shared<Lease>(), lease, kNbytes),
                "does not fit a host lease of 0"));
  CHECK(
      refused(DeviceTransfer::spill(events, chain.disk(object), chain.lease(), lease, 512, nullptr),
              "not the whole of a swap object"));
  const DiskEnd gone = chain.disk(object);
  const auto spill = must(chain.spill(object, lease, chain.compute(*lease, 2)));
  must(end_of(*spill));
  chain.store.reset();
  CHECK(DeviceTransfer::fetch(events, gone, chain.lease(), lease, kNbytes).status().code() ==
        Code::kClosed);
}

TEST_CASE_TEMPLATE("What is in flight when its owner goes is finished", Kind,
                   OFFLOAD_SIMULATED_DEVICES) {
  Chain chain(Kind::make());
  const ObjectId object = chain.object(1);
  auto lease = must_lease(*chain.arena, kNbytes);
  const Event computed = chain.compute(*lease, 2);
  const auto spill = must(chain.spill(object, std::move(lease), computed));
  const auto events = chain.completions->events();
  chain.completions.reset();
  must(end_of(*spill));
  CHECK(chain.object_is(object, 2));
  // Later ones wait on the caller's thread.
  lease = must_lease(*chain.arena, kNbytes);
  const auto late = must(DeviceTransfer::fetch(events, {}, chain.lease(), lease, kNbytes));
  CHECK(late->done());
}

TEST_CASE_TEMPLATE("Each wait of a transfer is needed: left out, the checker finds it", Kind,
                   EarliestDevice, LatestDevice) {
  // Each owner of the device memory comes while its former's copy to the host is in flight.
  const auto round_trips = [](Chain& chain) -> Status {
    std::vector<std::shared_ptr<DeviceTransfer>> spills;
    for (int i = 0; i < 4; ++i) {
      const ObjectId object = create_object(*chain.store, kNbytes);
      auto lease = must_lease(*chain.arena, 4 * kBlock, "unit");
      auto fetch =
          DeviceTransfer::fetch(chain.completions->events(), {}, chain.lease(i), lease, kNbytes);
      if (!fetch.is_ok()) return fetch.status();
      OFFLOAD_RETURN_IF_ERROR(fetch.value()->make_wait(StreamId::kCompute));
      OFFLOAD_RETURN_IF_ERROR(chain.device->fill(lease->data(), 1, kNbytes, StreamId::kCompute));
      Result<Event> computed = chain.device->record(StreamId::kCompute);
      if (!computed.is_ok()) return computed.status();
      auto spill = chain.spill(object, std::move(lease), computed.value());
      if (!spill.is_ok()) return spill.status();
      spills.push_back(spill.take());
    }
    for (const auto& spill : spills) OFFLOAD_RETURN_IF_ERROR(end_of(*spill));
    return Status::ok();
  };
  {
    Chain chain(Kind::make());
    must(round_trips(chain));
    CHECK(chain.device->conflicts() == 0);
  }
  for (const char* why : {DeviceTransfer::kArrival, DeviceTransfer::kResult, DeviceArena::kReuse,
                          DeviceEvents::kCompletion}) {
    CAPTURE(std::string(why));
    Chain chain(Kind::make());
    chain.device->omit_waits(why);
    CHECK(round_trips(chain).code() == Code::kUnordered);
  }
}

}  // namespace offload
