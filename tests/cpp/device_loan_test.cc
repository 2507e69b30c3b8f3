// Device::borrow and DeviceLoan: memory of somebody else's, for one copy to or from it.
#include "device/device_loan.h"

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "device_testing.h"
#include "doctest/doctest.h"
#include "stream/device_transfer.h"

namespace offload {
namespace {

constexpr std::uint64_t kBytes = 2 * kPageBytes;

using Bytes = std::vector<std::byte>;

// Memory of a tensor, as its owner has it.
std::shared_ptr<Bytes> tensor(int value) {
  return std::make_shared<Bytes>(kBytes, std::byte(value));
}

bool refused(const Status& status, const char* part) {
  INFO(status.to_string());
  return status.code() == Code::kInvalid && mentions(status.to_string(), part);
}

// A device with registered host memory, of which one lease holds `value`.
struct Setup {
  explicit Setup(std::shared_ptr<Device> on, int value = 0x11)
      : device(std::move(on)),
        host(pinned_arena(*device, kMiB)),
        lease(must_allocate(*host, kBytes)) {
    std::memset(lease.data(), value, kBytes);
  }
  std::shared_ptr<DeviceLoan> lend(const std::shared_ptr<Bytes>& owner) {
    return must(DeviceLoan::take(device, owner->data(), kBytes, owner, "tensor"));
  }

  std::shared_ptr<Device> device;
  std::shared_ptr<HostArena> host;
  Lease lease;
};

}  // namespace

TEST_CASE_TEMPLATE("Copies may name what is lent until it is given back", Kind,
                   OFFLOAD_SIMULATED_DEVICES) {
  const Setup setup(Kind::make());
  Device& device = *setup.device;
  const auto owner = tensor(0x22);
  std::byte* const data = owner->data();
  const auto copy = [&](std::uint64_t nbytes) {
    return device.copy_h2d(data, setup.lease.data(), nbytes, StreamId::kH2d);
  };
  CHECK(refused(copy(kBytes), "are not memory of"));
  CHECK(refused(device.borrow(nullptr, kBytes, owner).status(), "0 bytes of device memory"));
  CHECK(refused(device.borrow(data, 0, owner).status(), "0 bytes of device memory"));
  DeviceMemory lent = must(device.borrow(data, kBytes - 8, owner));
  CHECK(lent.data() == data);
  CHECK(lent.nbytes() == kBytes - 8);
  CHECK(refused(copy(kBytes), "are not memory of"));  // 8 bytes more
  must(copy(kBytes - 8));
  must(device.synchronize(must(device.record(StreamId::kH2d))));
  CHECK(all_bytes_are(data, kBytes - 8, 0x11));
  CHECK(all_bytes_are(data + kBytes - 8, 8, 0x22));
  lent = {};
  CHECK(refused(copy(kBytes - 8), "are not memory of"));
  CHECK(owner.use_count() == 1);
}

TEST_CASE("What is lent is given back without a wait, what was adopted after what is in flight") {
  const Setup setup(simulated(Pace::kLatest));
  Device& device = *setup.device;
  const auto owner = tensor(0x22);
  for (const bool borrowed : {true, false}) {
    CAPTURE(borrowed);
    DeviceMemory memory = must(borrowed ? device.borrow(owner->data(), kBytes, owner)
                                        : device.adopt(owner->data(), kBytes, owner));
    CHECK(owner.use_count() == 2);
    must(device.copy_h2d(owner->data(), setup.lease.data(), kBytes, StreamId::kH2d));
    const Event arrived = must(device.record(StreamId::kH2d));
    CHECK_FALSE(must(device.query(arrived)));
    memory = {};
    CHECK(owner.use_count() == 1);
    CHECK(must(device.query(arrived)) == !borrowed);
    must(device.synchronize(arrived));
    CHECK(all_bytes_are(owner->data(), kBytes, 0x11));
  }
}

TEST_CASE("Parts of what is known may be lent, each until it is given back itself") {
  const Setup setup(simulated(Pace::kEarliest));
  Device& device = *setup.device;
  const auto owner = tensor(0);
  const auto copy = [&](std::byte* to) {
    return device.copy_h2d(to, setup.lease.data(), kPageBytes, StreamId::kH2d);
  };
  DeviceMemory whole = must(device.borrow(owner->data(), kBytes, owner));
  DeviceMemory again = must(device.borrow(owner->data(), kBytes, owner));
  DeviceMemory part = must(device.borrow(owner->data() + kPageBytes, kPageBytes, owner));
  CHECK(refused(device.adopt(owner->data(), kBytes, owner).status(), "knows a part"));
  whole = {};
  must(copy(owner->data()));
  again = {};
  CHECK(refused(copy(owner->data()), "are not memory of"));
  must(copy(part.data()));

  const DeviceMemory own = must(device.allocate(kBytes));
  DeviceMemory lent = must(device.borrow(own.data(), kBytes, nullptr));
  lent = {};  // which frees nothing
  must(copy(own.data()));
}

TEST_CASE("An owner may call the device as it goes") {
  const auto device = simulated(Pace::kEarliest);
  Bytes bytes(kBytes);
  bool gone = false;
  std::shared_ptr<void> owner(bytes.data(), [&](void*) {
    gone = device->record(StreamId::kCompute).is_ok();  // with no lock of the device held
  });
  DeviceMemory lent = must(device->borrow(bytes.data(), kBytes, std::move(owner)));
  CHECK_FALSE(gone);
  lent = {};
  CHECK(gone);
}

TEST_CASE_TEMPLATE("A copy of a loan comes after what the compute did before", Kind,
                   OFFLOAD_SIMULATED_DEVICES) {
  Setup setup(Kind::make());
  Device& device = *setup.device;
  const auto owner = tensor(0x22);
  const auto copy = [&] {
    return device.copy_d2h(setup.lease.data(), owner->data(), kBytes, StreamId::kD2h, "copy");
  };
  auto loan = setup.lend(owner);
  CHECK(loan->data() == owner->data());
  CHECK(loan->nbytes() == kBytes);
  CHECK(loan->label() == "tensor");
  CHECK(loan->kept_until_complete());
  CHECK(names_both(copy(), "copy", "tensor"));  // it did not acquire
  device.omit_waits(DeviceLoan::kBefore);
  must(loan->acquire(StreamId::kD2h));
  CHECK(names_both(copy(), "copy", "tensor"));
  device.omit_waits("");
  must(loan->acquire(StreamId::kD2h));
  CHECK(device.stats().waits.at(DeviceLoan::kBefore) >= 1);
  must(copy());
  // The compute changes the tensor: after the copy, or with no use for it.
  const Event copied = must(device.record(StreamId::kD2h));
  CHECK(names_both(loan->use(StreamId::kCompute, AccessKind::kWrite), "copy", "tensor"));
  must(device.wait(StreamId::kCompute, copied, "test"));
  must(loan->use(StreamId::kCompute, AccessKind::kWrite));
  std::memset(owner->data(), 0x33, kBytes);
  must(device.synchronize(copied));
  CHECK(all_bytes_are(setup.lease.data(), kBytes, 0x22));
}

TEST_CASE(
    "Memory that is lent anew has no history: who changed it has no use for the former copy") {
  Setup setup(simulated(Pace::kLatest));
  Device& device = *setup.device;
  const auto owner = tensor(0x22);
  const auto first = setup.lend(owner);
  must(first->acquire(StreamId::kD2h));
  must(device.copy_d2h(setup.lease.data(), owner->data(), kBytes, StreamId::kD2h, "first"));
  CHECK_FALSE(first->use(StreamId::kCompute, AccessKind::kWrite).is_ok());
  const std::uint64_t conflicts = device.conflicts();
  const auto second = setup.lend(owner);
  must(second->use(StreamId::kCompute, AccessKind::kWrite));
  CHECK(device.conflicts() == conflicts);
  must(device.drain());
}

TEST_CASE("A loan is refused where its memory or its device cannot be used") {
  const auto device = simulated(Pace::kEarliest);
  const auto owner = tensor(0);
  CHECK(refused(DeviceLoan::take(device, owner->data(), 0, owner, "none").status(),
                "0 bytes of device memory"));
  must(device->use_host({owner->data(), kBytes, AccessKind::kWrite}, "host"));
  device->note_error(Status::error(Code::kDevice, "lost"));
  const auto lost = DeviceLoan::take(device, owner->data(), kBytes, owner, "tensor");
  CHECK(mentions(lost.status().to_string(), "lost"));
  CHECK(owner.use_count() == 1);
}

TEST_CASE("A transfer keeps a loan until its copy is complete, and no longer") {
  Setup setup(simulated(Pace::kLatest));
  Device& device = *setup.device;
  const auto completions = must(DeviceCompletions::create(setup.device));
  for (const bool to_device : {true, false}) {
    CAPTURE(to_device);
    auto owner = tensor(0x22);
    const std::weak_ptr<Bytes> known = owner;
    const auto via = std::make_shared<Lease>(must_allocate(*setup.host, kBytes));
    std::memset(via->data(), 0x11, kBytes);
    std::shared_ptr<DeviceSpan> loan = setup.lend(std::exchange(owner, nullptr));
    const std::byte* const data = loan->data();
    const auto transfer = must(
        to_device ? DeviceTransfer::fetch(completions->events(), {}, via, std::move(loan), kBytes)
                  : DeviceTransfer::spill(completions->events(), {}, via, std::move(loan), kBytes,
                                          nullptr));
    CHECK_FALSE(transfer->done());
    const std::shared_ptr<Bytes> there = known.lock();
    REQUIRE(there != nullptr);
    must(device.drain());
    while (!must(transfer->wait_for(100))) {
    }
    must(transfer->status());
    CHECK(there.use_count() == 1);
    CHECK(all_bytes_are(data, kBytes, to_device ? 0x11 : 0x22));
    CHECK(all_bytes_are(via->data(), kBytes, to_device ? 0x11 : 0x22));
  }
  CHECK(device.conflicts() == 0);
}

TEST_CASE("Threads lend, copy and give back at once") {
  const auto device = simulated(Pace::kTimed, 0.0001);
  const auto host = pinned_arena(*device, kMiB);
  std::vector<Lease> leases;
  for (int i = 0; i < 4; ++i) leases.push_back(must_allocate(*host, kBytes));
  std::vector<int> wrong(4);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      std::memset(leases[i].data(), i + 1, kBytes);
      for (int round = 0; round < 20; ++round) {
        const auto owner = tensor(0);
        const auto loan = DeviceLoan::take(device, owner->data(), kBytes, owner, "tensor");
        Status done = loan.status();
        if (done.is_ok()) done = loan.value()->acquire(StreamId::kH2d);
        if (done.is_ok()) {
          done = device->copy_h2d(owner->data(), leases[i].data(), kBytes, StreamId::kH2d);
        }
        const Result<Event> arrived = device->record(StreamId::kH2d);
        if (done.is_ok() && arrived.is_ok()) done = device->synchronize(arrived.value());
        wrong[i] += !done.is_ok() || !all_bytes_are(owner->data(), kBytes, i + 1);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == std::vector<int>(4));
}

}  // namespace offload
