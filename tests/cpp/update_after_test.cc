// Updates that follow transfers: they start when all have ended, and not at all when one failed.
#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "device_testing.h"
#include "doctest/doctest.h"
#include "store_testing.h"
#include "stream/device_transfer.h"
#include "stream/update_pipeline.h"
#include "temp_dir.h"
#include "update_testing.h"
#include "update_unit.h"

namespace offload {
namespace {

constexpr std::uint64_t kCapacity = 8 * kMiB;

std::shared_ptr<Transfer> submit_after(UpdatePipeline& pipeline, const Unit& unit,
                                       Prerequisites after) {
  return must(pipeline.submit(unit.job(), std::move(after)));
}

bool ends_within(const Transfer& transfer, unsigned milliseconds) {
  std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
  return transfer.done();  // nobody waits for it: that would have its copies end
}

// A unit whose gradients are on a device, and the way home.
struct OnDevice {
  OnDevice(std::shared_ptr<Device> on, std::uint64_t numel, SwapStore* store = nullptr)
      : device(std::move(on)),
        host(pinned_arena(*device, kCapacity)),
        arena(device_arena(device, kCapacity)),
        completions(must(DeviceCompletions::create(device))),
        unit(store, *host, UnitPlan::everywhere(Home::kMemory, numel), random),
        there(must_lease(*arena, nbytes(), "gradients")) {
    const auto fetched =
        must(DeviceTransfer::fetch(completions->events(), {}, grads(), there, nbytes()));
    while (!fetched->await(1000)) {
    }
    std::memset(grads()->data(), 0x7f, nbytes());
  }

  std::uint64_t nbytes() const { return unit.operand(kGrad).nbytes; }
  std::shared_ptr<Lease> grads() const {
    return std::static_pointer_cast<Lease>(unit.operand(kGrad).owner);
  }
  std::shared_ptr<DeviceTransfer> come_home(DiskEnd disk = {}) const {
    return must(DeviceTransfer::spill(completions->events(), std::move(disk), grads(), there,
                                      nbytes(), nullptr));
  }

  std::mt19937_64 random{11};
  std::shared_ptr<Device> device;
  std::shared_ptr<HostArena> host;
  std::shared_ptr<DeviceArena> arena;
  std::shared_ptr<DeviceCompletions> completions;
  Unit unit;
  std::shared_ptr<DeviceLease> there;
};

}  // namespace

TEST_CASE_TEMPLATE("An update starts when its gradients have come from the device", Kind,
                   OFFLOAD_SIMULATED_DEVICES) {
  for (const std::uint64_t numel : {1u, 1001u, 200'003u}) {
    CAPTURE(numel);
    OnDevice chain(Kind::make(), numel);
    const auto pipeline = make_pipeline(nullptr, chain.host, 0, 2);
    const auto update = submit_after(*pipeline, chain.unit, {chain.come_home()});
    must(update->wait());
    CHECK(chain.unit.memory_is_free());
    CHECK(same(chain.unit.now(), chain.unit.after));
    CHECK(chain.device->conflicts() == 0);
  }
}

TEST_CASE("Latest: an update is kept waiting until somebody waits for it") {
  OnDevice chain(simulated(Pace::kLatest), 5000);
  const auto pipeline = make_pipeline(nullptr, chain.host, 0, 1);
  const auto update = submit_after(*pipeline, chain.unit, {chain.come_home()});
  CHECK_FALSE(ends_within(*update, 50));
  CHECK(chain.device->stats().host_waits == 1);  // the one for the copy there
  must(update->wait());
  CHECK(chain.device->stats().host_waits == 2);
  CHECK(same(chain.unit.now(), chain.unit.after));
}

TEST_CASE("Timed: an update starts by itself, and the host waits for nothing") {
  OnDevice chain(simulated(Pace::kTimed, 0.01), 5000);
  const auto pipeline = make_pipeline(nullptr, chain.host, 0, 1);
  const std::uint64_t before = chain.device->stats().host_waits;
  const auto update = submit_after(*pipeline, chain.unit, {chain.come_home()});
  for (int i = 0; i < 1000 && !ends_within(*update, 10); ++i) {
  }
  CHECK(update->done());
  CHECK(chain.device->stats().host_waits == before);
  CHECK(same(chain.unit.now(), chain.unit.after));
}

TEST_CASE_TEMPLATE("UpdatePipeline::close sees jobs end that wait for a copy", Kind,
                   OFFLOAD_SIMULATED_DEVICES) {
  OnDevice chain(Kind::make(), 70'001);
  auto pipeline = make_pipeline(nullptr, chain.host, 0, 2);
  const auto update = submit_after(*pipeline, chain.unit, {chain.come_home()});
  CHECK(pipeline->close().is_ok());
  CHECK(update->done());
  CHECK(same(chain.unit.now(), chain.unit.after));
}

TEST_CASE_TEMPLATE("An update whose gradients do not come changes nothing", Kind,
                   OFFLOAD_SIMULATED_DEVICES) {
  TempDir dir;
  const auto store = open_store<StoreOnThreads>(dir, 16 * kBlock, 8 * kBlock);
  OnDevice chain(Kind::make(), 70'001);
  Unit other(nullptr, *chain.host, UnitPlan::everywhere(Home::kMemory, 3000), chain.random);
  const auto pipeline = make_pipeline(nullptr, chain.host, 0, 2);
  const ObjectId object = create_object(*store, chain.nbytes());
  {
    OpFaults faults(IoOp::kWrite, [](unsigned) { return EIO; });
    const auto update = submit_after(*pipeline, chain.unit,
                                     {chain.come_home({store, object, IoPriority::kDemand})});
    CHECK(update->wait().os_errno() == EIO);
  }
  CHECK(chain.unit.memory_is_free());
  CHECK(same(chain.unit.now(), chain.unit.before));
  must(submit_after(*pipeline, other, {})->wait());  // it is not the pipeline that failed
  CHECK(same(other.now(), other.after));
  CHECK(pipeline->close().is_ok());
}

TEST_CASE("An update starts after the last of what it follows, whatever others do") {
  const auto arena = make_arena();
  std::mt19937_64 random(3);
  const UnitPlan plan = UnitPlan::everywhere(Home::kMemory, 3 * UpdateLayout::kMemoryChunk + 7);
  Unit follower(nullptr, *arena, plan, random);
  Unit empty(nullptr, *arena, UnitPlan::everywhere(Home::kMemory, 1), random);
  Unit other(nullptr, *arena, plan, random);
  const auto pipeline = make_pipeline(nullptr, arena, 0, 2);
  const auto first = std::make_shared<Transfer>();
  const auto second = std::make_shared<Transfer>();
  UpdateJob nothing = empty.job();
  nothing.segments.clear();
  const auto update = submit_after(*pipeline, follower, {first, second, first});
  const auto none = must(pipeline->submit(nothing, {second}));
  must(submit_after(*pipeline, other, {})->wait());
  CHECK(same(other.now(), other.after));
  first->finish(Status::ok());
  CHECK_FALSE(ends_within(*update, 20));
  CHECK_FALSE(none->done());
  CHECK_FALSE(update->wait_for(5));
  CHECK(same(follower.now(), follower.before));
  std::jthread ender([&] { second->finish(Status::ok()); });
  must(update->wait());
  must(none->wait());
  CHECK(same(follower.now(), follower.after));
  must(submit_after(*pipeline, empty, {first, second})->wait());  // which have ended
  CHECK(same(empty.now(), empty.after));
}

TEST_CASE("The first failure of what an update follows is its own") {
  const auto arena = make_arena();
  std::mt19937_64 random(4);
  Unit unit(nullptr, *arena, UnitPlan::everywhere(Home::kMemory, 4097), random);
  const auto pipeline = make_pipeline(nullptr, arena, 0, 1);
  const auto first = std::make_shared<Transfer>();
  const auto second = std::make_shared<Transfer>();
  const auto update = submit_after(*pipeline, unit, {first, second});
  second->finish(Status::error(Code::kCancelled, "cancelled"));
  CHECK_FALSE(ends_within(*update, 20));  // its memory may be written to until the last has ended
  first->finish(Status::error(Code::kCorrupt, "corrupt"));
  CHECK(update->wait().code() == Code::kCancelled);
  CHECK(unit.memory_is_free());
  CHECK(same(unit.now(), unit.before));
  CHECK(pipeline->close().is_ok());
}

TEST_CASE_TEMPLATE("Jobs on disk that follow others take their turn by submission", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  const auto store = open_update_store<Engine>(dir);
  if (!store) return;
  const auto arena = make_arena();
  std::mt19937_64 random(5);
  const auto pipeline = make_pipeline(store, arena, UpdatePipeline::min_staging_bytes(1), 2);
  std::vector<std::unique_ptr<Unit>> units;
  std::vector<std::shared_ptr<Transfer>> firsts;
  std::vector<std::shared_ptr<Transfer>> updates;
  for (int i = 0; i < 8; ++i) {
    UnitPlan plan = UnitPlan::everywhere(kHomes[random() % 4], 3 * kUpdateBlock + random() % 999);
    units.push_back(std::make_unique<Unit>(store.get(), *arena, plan, random));
    firsts.push_back(std::make_shared<Transfer>());
    updates.push_back(submit_after(*pipeline, *units.back(), {firsts.back()}));
  }
  {
    std::vector<std::jthread> enders;
    for (int i = 7; i >= 0; --i) {
      enders.emplace_back([&, i] { firsts[i]->finish(Status::ok()); });
    }
  }
  for (std::size_t i = 0; i < updates.size(); ++i) {
    must(updates[i]->wait());
    CHECK(same(units[i]->now(), units[i]->after));
  }
  CHECK(pipeline->close().is_ok());
}

TEST_CASE("A copy that ends too early for an update is found: the wait is needed") {
  OnDevice chain(simulated(Pace::kLatest), 5000);
  const auto pipeline = make_pipeline(nullptr, chain.host, 0, 1);
  chain.device->omit_waits(DeviceEvents::kCompletion);
  const auto copy = chain.come_home();
  const Status ended = submit_after(*pipeline, chain.unit, {copy})->wait();
  CHECK(ended.code() == Code::kUnordered);
  CHECK(chain.unit.now().operands[kParam] == chain.unit.before.operands[kParam]);
}

}  // namespace offload
