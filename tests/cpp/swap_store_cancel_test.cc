// Transfers that are cancelled, or whose store is closed, while requests of theirs wait and others
// are in flight.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/align.h"
#include "doctest/doctest.h"
#include "fault_testing.h"
#include "store/swap_store.h"
#include "store_testing.h"
#include "temp_dir.h"

namespace offload {
namespace {

// Small blocks and few places: most requests wait. Null when there is no ring here.
template <typename Engine>
std::shared_ptr<SwapStore> open_narrow(const TempDir& dir, unsigned places, bool durable = false,
                                       bool create = true) {
  SwapStoreOptions options;
  options.dirs = {{dir.path()}};
  options.engine = Engine::kKind;
  options.io.queue_depth = places;
  options.io.threads = places;
  options.block_bytes = kSmallBlock;
  auto store =
      durable ? SwapStore::open_durable(options, "model", create) : SwapStore::open(options);
  if (store.is_ok()) return store.take();
  MESSAGE("skipped: ", store.status().to_string());
  return nullptr;
}

Status start(SwapStore& store, IoOp op, const SwapStore::Range& range, Pending& pending,
             const std::atomic<bool>* cancel) {
  const std::vector<SwapStore::Range> ranges = {range};
  return op == IoOp::kWrite
             ? store.write(ranges, IoPriority::kBackground, pending.completion(), cancel)
             : store.read(ranges, IoPriority::kBackground, pending.completion(), cancel);
}

// One transfer of the random load, and what its object holds if it succeeds.
struct Load {
  IoOp op = IoOp::kRead;
  std::size_t object = 0;
  unsigned version = 0;
  std::unique_ptr<Buffer> buffer;
  Pending pending;
  std::atomic<bool> cancel{false};
};

// Cheap to make, and different in every page from any other version's.
std::unique_ptr<Buffer> stamped_bytes(std::uint64_t nbytes, unsigned version) {
  auto buffer = std::make_unique<Buffer>(nbytes);
  std::memset(buffer->get(), static_cast<int>(version % 256), nbytes);
  for (std::uint64_t at = 0; at + sizeof(version) <= nbytes; at += kPageBytes) {
    std::memcpy(buffer->get() + at, &version, sizeof(version));
  }
  return buffer;
}

struct Model {
  ObjectId id = kNoObject;
  std::uint64_t nbytes = 0;
  unsigned version = 0;
  bool busy = false;
};

}  // namespace

TEST_CASE_TEMPLATE("A cancelled transfer starts none of its waiting blocks", Engine,
                   OFFLOAD_STORE_ENGINES) {
  const TempDir dir;
  auto store = open_narrow<Engine>(dir, 1);
  if (!store) return;
  constexpr std::uint64_t kNbytes = 5 * kSmallBlock;
  REQUIRE(store->reserve(kNbytes, kNbytes).is_ok());
  const ObjectId object = create_object(*store, kNbytes);
  const auto former = random_bytes(kNbytes, 0);
  const auto later = random_bytes(kNbytes, 1);
  must_write(*store, object, *former, kNbytes);
  for (const IoOp op : {IoOp::kWrite, IoOp::kRead}) {
    CAPTURE(op == IoOp::kWrite);
    std::atomic<bool> answers{false};
    const CallFaults faults(op == IoOp::kWrite ? CallKind::kWrite : CallKind::kRead,
                            [&](const SysCall&, unsigned) {
                              while (!answers) std::this_thread::yield();
                              return CallFault{};
                            });
    std::atomic<bool> cancel{false};
    Pending pending;
    const Buffer back(kNbytes);
    std::byte* memory = op == IoOp::kWrite ? later->get() : back.get();
    REQUIRE(start(*store, op, {object, 0, memory, kNbytes}, pending, &cancel).is_ok());
    while (faults.count() == 0) std::this_thread::yield();
    cancel = true;
    CHECK(pending.calls() == 0);
    answers = true;
    const Status status = pending.wait();
    CHECK_MESSAGE(status.code() == Code::kCancelled, status.to_string());
    CHECK(faults.count() == 1);
    CHECK(pending.calls() == 1);
    CHECK(store->stats().free_slots == 5);
  }
  CHECK(reads_as(*store, object, *former, kNbytes));
  must_write(*store, object, *later, kNbytes);
  CHECK(reads_as(*store, object, *later, kNbytes));
}

TEST_CASE_TEMPLATE("Thousands of random cancels under load leave a store that agrees with a model",
                   Engine, OFFLOAD_STORE_ENGINES) {
  constexpr unsigned kTransfers = 4000;
  constexpr std::size_t kObjects = 24;
  constexpr std::size_t kInFlight = 12;
  constexpr std::uint64_t kMostBlocks = 3;
  const unsigned seed = 51;
  MESSAGE("seed ", seed);
  std::mt19937_64 random(seed);
  const TempDir dir;
  auto store = open_narrow<Engine>(dir, 2);
  if (!store) return;
  constexpr std::uint64_t kObjectBytes = kObjects * kMostBlocks * kSmallBlock;
  REQUIRE(store->reserve(kObjectBytes, (kInFlight + 1) * kMostBlocks * kSmallBlock).is_ok());
  std::vector<Model> models(kObjects);
  std::uint64_t blocks = 0;
  for (Model& model : models) {
    model.nbytes = 1 + random() % (kMostBlocks * kSmallBlock);
    model.id = create_object(*store, model.nbytes);
    must_write(*store, model.id, *stamped_bytes(model.nbytes, 0), model.nbytes);
    blocks += store->footprint(model.nbytes) / kSmallBlock;
  }
  const std::uint64_t free_slots = store->stats().slots - blocks;
  std::deque<std::unique_ptr<Load>> loads;
  unsigned cancelled[2] = {};
  unsigned done[2] = {};
  unsigned wrong = 0;
  unsigned cancels = 0;
  unsigned version = 0;
  const auto finish_oldest = [&] {
    const std::unique_ptr<Load> load = std::move(loads.front());
    loads.pop_front();
    Model& model = models[load->object];
    model.busy = false;
    const Status status = load->pending.wait();
    const auto which = static_cast<std::size_t>(load->op);
    if (status.code() == Code::kCancelled) {
      ++cancelled[which];
      if (!load->cancel) ++wrong;
    } else if (status.is_ok()) {
      ++done[which];
      if (load->op == IoOp::kWrite) {
        model.version = load->version;
      } else {
        const auto expected = stamped_bytes(model.nbytes, model.version);
        if (std::memcmp(load->buffer->get(), expected->get(), model.nbytes) != 0) ++wrong;
      }
    } else {
      ++wrong;
    }
  };
  for (unsigned i = 0; i < kTransfers; ++i) {
    auto load = std::make_unique<Load>();
    do {
      load->object = random() % kObjects;
    } while (models[load->object].busy);
    Model& model = models[load->object];
    load->op = random() % 2 == 0 ? IoOp::kWrite : IoOp::kRead;
    load->version = ++version;
    load->buffer = load->op == IoOp::kWrite ? stamped_bytes(model.nbytes, load->version)
                                            : std::make_unique<Buffer>(model.nbytes);
    load->cancel = random() % 40 == 0;  // before it begins
    const SwapStore::Range range = {model.id, 0, load->buffer->get(), model.nbytes};
    REQUIRE(start(*store, load->op, range, load->pending, &load->cancel).is_ok());
    model.busy = true;
    loads.push_back(std::move(load));
    if (random() % 2 == 0) {
      const std::size_t recent = std::min<std::size_t>(loads.size(), 3);
      loads[loads.size() - 1 - random() % recent]->cancel = true;
      ++cancels;
    }
    if (loads.size() >= kInFlight) finish_oldest();
    if (i % 500 == 0) {
      while (!loads.empty()) finish_oldest();
      CHECK(store->stats().free_slots == free_slots);
    }
  }
  while (!loads.empty()) finish_oldest();
  CHECK(wrong == 0);
  for (const std::size_t which : {0, 1}) {
    CHECK(cancelled[which] > kTransfers / 100);
    CHECK(done[which] > kTransfers / 10);
  }
  MESSAGE(cancels, " cancels; ", cancelled[0], " reads and ", cancelled[1], " writes ended so");
  CHECK(store->stats().free_slots == free_slots);
  for (const Model& model : models) {
    CHECK(reads_as(*store, model.id, *stamped_bytes(model.nbytes, model.version), model.nbytes));
    CHECK(store->remove(model.id).is_ok());
  }
  CHECK(store->stats().free_slots == store->stats().slots);
}

TEST_CASE_TEMPLATE("close() under load ends every transfer once, with ok or kClosed", Engine,
                   OFFLOAD_STORE_ENGINES) {
  constexpr std::uint64_t kNbytes = 3 * kSmallBlock;
  constexpr unsigned kTransfers = 32;
  unsigned ok = 0;
  unsigned closed = 0;
  for (unsigned round = 0; round < 16; ++round) {
    CAPTURE(round);
    const bool durable = round % 2 == 1;
    const TempDir dir;
    auto store = open_narrow<Engine>(dir, 2, durable);
    if (!store) return;
    REQUIRE(store->reserve(kTransfers * kNbytes, 2 * kTransfers * kNbytes).is_ok());
    const auto former = stamped_bytes(kNbytes, 0);
    const auto later = stamped_bytes(kNbytes, 1);
    std::vector<ObjectId> objects;
    for (unsigned i = 0; i < kTransfers; ++i) {
      const auto made = store->create(kNbytes, durable ? std::to_string(i) : "");
      REQUIRE(made.is_ok());
      objects.push_back(made.value());
      must_write(*store, objects.back(), *former, kNbytes);
    }
    if (durable) REQUIRE(store->commit().is_ok());

    const Buffer back(kTransfers * kNbytes);
    std::vector<Pending> pending(kTransfers);
    std::vector<Status> started(kTransfers);
    std::atomic<unsigned> submitted{0};
    std::thread closer([&] {
      while (submitted < round) std::this_thread::yield();
      std::this_thread::sleep_for(std::chrono::microseconds(150) * round);
      CHECK(store->close().is_ok());
    });
    for (unsigned i = 0; i < kTransfers; ++i) {
      const IoOp op = i % 2 == 0 ? IoOp::kWrite : IoOp::kRead;
      std::byte* memory = op == IoOp::kWrite ? later->get() : back.get() + i * kNbytes;
      started[i] = start(*store, op, {objects[i], 0, memory, kNbytes}, pending[i], nullptr);
      ++submitted;
    }
    closer.join();
    for (unsigned i = 0; i < kTransfers; ++i) {
      CHECK(pending[i].calls() == (started[i].is_ok() ? 1 : 0));
      const Status status = started[i].is_ok() ? pending[i].wait() : started[i];
      CHECK_MESSAGE((status.is_ok() || status.code() == Code::kClosed), status.to_string());
      ++(status.is_ok() ? ok : closed);
    }
    if (!durable) {
      CHECK(dir.empty());
      continue;
    }
    auto reopened = open_narrow<Engine>(dir, 2, true, false);
    REQUIRE(reopened);
    for (unsigned i = 0; i < kTransfers; ++i) {
      CHECK(reads_as(*reopened, reopened->find(std::to_string(i)).value(), *former, kNbytes));
    }
  }
  CHECK(ok > 0);
  CHECK(closed > 0);
}

}  // namespace offload
