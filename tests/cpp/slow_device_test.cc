// A device that takes half a minute for one operation, as a disk that resets its controller does:
// nothing times out, the transfer ends right, and the other directory's transfers go on meanwhile.
//
// By default the half minute is shorter; --no-skip runs the real one as well.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "doctest/doctest.h"
#include "fault_testing.h"
#include "store/swap_store.h"
#include "store_testing.h"
#include "temp_dir.h"

namespace offload {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kShort = std::chrono::seconds(1);
constexpr auto kReal = std::chrono::seconds(30);
constexpr std::uint64_t kObjects = 6;  // of one block, on the device that answers

// Object 0 is alone on the first device, all others are on the second one.
struct TwoDevices {
  explicit TwoDevices(EngineKind engine) {
    SwapStoreOptions options;
    options.dirs = {{first.path()}, {second.path()}};
    options.engine = engine;
    auto opened = SwapStore::open(options);
    if (!opened.is_ok()) {
      MESSAGE("skipped: ", opened.status().to_string());
      return;
    }
    auto made = opened.take();
    REQUIRE(made->reserve(2 * kBlock, 0).is_ok());
    REQUIRE(made->stats().files[0].slots == 1);
    {
      // The first device has no room for more than one slot.
      const int full = made->stripes()[0].file.fd.get();
      const CallFaults faults(CallKind::kReserve, [full](const SysCall& call, unsigned) {
        return CallFault{call.fd == full ? ENOSPC : 0};
      });
      REQUIRE(made->reserve((kObjects + 1) * kBlock, 2 * kBlock).is_ok());
    }
    REQUIRE(made->stats().files[0].slots == 1);
    for (std::uint64_t i = 0; i <= kObjects; ++i) objects.push_back(create_object(*made, kBlock));
    store = std::move(made);
  }
  int slow_fd() const { return store->stripes()[0].file.fd.get(); }

  TempDir first;
  TempDir second;
  std::shared_ptr<SwapStore> store;  // null: no ring here
  std::vector<ObjectId> objects;
};

// One write and one read of object 0 take `delay` each.
template <typename Engine>
void run(std::chrono::milliseconds delay) {
  TwoDevices devices(Engine::kKind);
  if (!devices.store) return;
  SwapStore& store = *devices.store;
  const auto slow_bytes = random_bytes(kBlock, 1);
  for (const CallKind kind : {CallKind::kWrite, CallKind::kRead}) {
    CAPTURE(static_cast<int>(kind));
    const int slow = devices.slow_fd();
    std::atomic<bool> is_held{false};
    std::atomic<unsigned> held{0};
    const CallFaults faults(kind, [&, slow](const SysCall& call, unsigned) {
      if (call.fd != slow) return CallFault{};
      is_held = true;
      return CallFault{0, false, held++ == 0 ? delay : std::chrono::milliseconds(0)};
    });
    const Buffer back(kBlock);
    Pending pending;
    const auto begin = Clock::now();
    const std::vector<SwapStore::Range> range = {
        {devices.objects[0], 0, kind == CallKind::kWrite ? slow_bytes->get() : back.get(), kBlock}};
    REQUIRE((kind == CallKind::kWrite
                 ? store.write(range, IoPriority::kDemand, pending.completion())
                 : store.read(range, IoPriority::kDemand, pending.completion()))
                .is_ok());
    while (!is_held) std::this_thread::sleep_for(std::chrono::milliseconds(1));

    unsigned round_trips = 0;
    auto slowest = std::chrono::nanoseconds(0);
    while (pending.calls() == 0 && Clock::now() - begin < delay / 3) {
      const ObjectId object = devices.objects[1 + round_trips % kObjects];
      const auto bytes = random_bytes(kBlock, 100 + round_trips % 7);
      const auto since = Clock::now();
      must_write(store, object, *bytes, kBlock);
      REQUIRE(reads_as(store, object, *bytes, kBlock));
      slowest = std::max<std::chrono::nanoseconds>(slowest, Clock::now() - since);
      ++round_trips;
    }
    CHECK(pending.calls() == 0);  // all of these while the first device was silent
    CHECK(round_trips > 3);
    CHECK(slowest < delay / 2);

    const Status status = pending.wait();
    CHECK_MESSAGE(status.is_ok(), status.to_string());
    CHECK(Clock::now() - begin >= delay);
    CHECK(pending.calls() == 1);
    if (kind == CallKind::kRead) CHECK(std::memcmp(back.get(), slow_bytes->get(), kBlock) == 0);
    MESSAGE(std::string(kind == CallKind::kWrite ? "write" : "read"), " took ",
            std::chrono::duration<double>(Clock::now() - begin).count(), " s; meanwhile ",
            round_trips, " round trips on the other device, the slowest ",
            std::chrono::duration<double>(slowest).count(), " s");
  }
  CHECK(reads_as(store, devices.objects[0], *slow_bytes, kBlock));
  CHECK(store.stats().io.failed == 0);
  CHECK(store.close().is_ok());
}

}  // namespace

TEST_CASE_TEMPLATE("A device that answers late delays its own transfers and fails none", Engine,
                   OFFLOAD_STORE_ENGINES) {
  run<Engine>(kShort);
}

TEST_CASE_TEMPLATE("A device that answers after 30 s" * doctest::skip(), Engine,
                   OFFLOAD_STORE_ENGINES) {
  run<Engine>(kReal);
}

TEST_CASE_TEMPLATE("close() waits for a device that answers late, and what it wrote is whole",
                   Engine, OFFLOAD_STORE_ENGINES) {
  TwoDevices devices(Engine::kKind);
  if (!devices.store) return;
  const int slow = devices.slow_fd();
  const auto bytes = random_bytes(kBlock, 1);
  std::atomic<bool> is_held{false};
  const CallFaults faults(CallKind::kWrite, [&, slow](const SysCall& call, unsigned) {
    if (call.fd != slow) return CallFault{};
    is_held = true;
    return CallFault{0, false, std::chrono::milliseconds(300)};
  });
  Pending pending;
  REQUIRE(devices.store
              ->write(std::vector<SwapStore::Range>{{devices.objects[0], 0, bytes->get(), kBlock}},
                      IoPriority::kDemand, pending.completion())
              .is_ok());
  while (!is_held) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  CHECK(devices.store->close().is_ok());
  REQUIRE(pending.calls() == 1);
  CHECK(pending.wait().is_ok());
}

}  // namespace offload
