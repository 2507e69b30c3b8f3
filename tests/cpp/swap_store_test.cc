// SwapStore: round trips, versions, space, closing; on every engine.
#include "store/swap_store.h"

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "doctest/doctest.h"
#include "io_testing.h"
#include "store_testing.h"
#include "temp_dir.h"

namespace offload {
namespace {

using Range = SwapStore::Range;

}  // namespace

TEST_CASE_TEMPLATE("SwapStore gives back what was written, at every size", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_store<Engine>(dir, 16 * kBlock, 4 * kBlock);
  if (!store) return;
  CHECK(dir.empty());
  std::vector<std::pair<ObjectId, std::uint64_t>> objects;
  unsigned seed = 0;
  for (const std::uint64_t nbytes : {std::uint64_t{1}, std::uint64_t{4097}, kBlock - 1, kBlock,
                                     kBlock + 1, 3 * kBlock + 12345}) {
    CAPTURE(nbytes);
    objects.emplace_back(create_object(*store, nbytes), nbytes);
    for (const unsigned version : {100u, 200u}) {
      const auto bytes = random_bytes(nbytes, version + seed);
      must_write(*store, objects.back().first, *bytes, nbytes);
      CHECK(reads_as(*store, objects.back().first, *bytes, nbytes));
    }
    ++seed;
  }
  // Nothing overwrote anything of another object.
  for (unsigned i = 0; i < objects.size(); ++i) {
    const auto bytes = random_bytes(objects[i].second, 200 + i);
    CHECK(reads_as(*store, objects[i].first, *bytes, objects[i].second));
  }
  CHECK(store->stats().free_slots == 20 - 10);
  for (const auto& [object, nbytes] : objects) CHECK(store->remove(object).is_ok());
  CHECK(store->stats().free_slots == 20);
  CHECK(store->stats().objects == 0);
  CHECK(store->close().is_ok());
  CHECK(dir.empty());
}

TEST_CASE_TEMPLATE("SwapStore moves single blocks and several objects at once", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_store<Engine>(dir, 5 * kBlock, 5 * kBlock);
  if (!store) return;
  const ObjectId big = create_object(*store, 2 * kBlock + 10);
  const ObjectId small = create_object(*store, 100);
  const auto a = random_bytes(2 * kBlock + 10, 1);
  const auto b = random_bytes(100, 2);
  // The blocks in the wrong order, with another object between them.
  REQUIRE(write_now(*store, {{big, 2 * kBlock, a->get() + 2 * kBlock, 10},
                             {small, 0, b->get(), 100},
                             {big, 0, a->get(), 2 * kBlock}})
              .is_ok());
  CHECK(reads_as(*store, big, *a, 2 * kBlock + 10));
  CHECK(reads_as(*store, small, *b, 100));
  const auto middle = random_bytes(kBlock, 3);
  REQUIRE(write_now(*store, {{big, kBlock, middle->get(), kBlock}}).is_ok());
  std::memcpy(a->get() + kBlock, middle->get(), kBlock);
  CHECK(reads_as(*store, big, *a, 2 * kBlock + 10));
  const Buffer tail(10);
  CHECK(read_now(*store, {{big, 2 * kBlock, tail.get(), 10}}).is_ok());
  CHECK(std::memcmp(tail.get(), a->get() + 2 * kBlock, 10) == 0);
}

TEST_CASE_TEMPLATE("SwapStore refuses to read what was never written, and starts nothing", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_store<Engine>(dir, 3 * kBlock, kBlock);
  if (!store) return;
  const ObjectId object = create_object(*store, 2 * kBlock);
  const Buffer buffer(2 * kBlock);
  REQUIRE(write_now(*store, {{object, 0, buffer.get(), kBlock}}).is_ok());
  CHECK(store->written(object, kBlock - 1).value());
  CHECK_FALSE(store->written(object, kBlock).value());
  const IoCounters before = store->stats().io;
  Pending pending;
  const Status status =
      store->read(std::vector<SwapStore::Range>{{object, 0, buffer.get(), 2 * kBlock}},
                  IoPriority::kDemand, pending.completion());
  CHECK(status.code() == Code::kInvalid);
  CHECK(store->close().is_ok());
  CHECK(pending.calls() == 0);
  CHECK(store->stats().io.requests == before.requests);
}

TEST_CASE_TEMPLATE("SwapStore refuses ranges that are not whole blocks of an object", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_store<Engine>(dir, 4 * kBlock, 4 * kBlock);
  if (!store) return;
  constexpr std::uint64_t kNbytes = 2 * kBlock + 100;
  const ObjectId object = create_object(*store, kNbytes);
  const auto bytes = random_bytes(kNbytes, 1);
  must_write(*store, object, *bytes, kNbytes);
  const SwapStore::Stats before = store->stats();
  constexpr std::uint64_t kMost = std::numeric_limits<std::uint64_t>::max();
  std::byte* at = bytes->get();
  for (const Range& bad : std::vector<Range>{
           {object, 0, at, 0},                            // nothing
           {object, 4096, at, kBlock},                    // starts inside a block
           {object, 0, at, kBlock + 100},                 // ends inside a block
           {object, 2 * kBlock, at, 99},                  // likewise, the last one
           {object, 2 * kBlock, at, kBlock},              // beyond the end
           {object, 3 * kBlock, at, kBlock},              // wholly beyond it
           {object, kBlock, at, kMost - kBlock + 1},      // the end overflows to 0
           {object, 2 * kBlock, at, kMost - kBlock + 1},  // and to less than the offset
           {object, 0, at + 1, kNbytes},                  // not aligned
           {object, 0, nullptr, kNbytes},
           {object + 1, 0, at, kBlock},  // no such object
           {kNoObject, 0, at, kBlock},
       }) {
    CAPTURE(bad.offset);
    CAPTURE(bad.nbytes);
    // A good range ahead of a bad one is not started either.
    CHECK(write_now(*store, {{object, 0, at, kBlock}, bad}).code() == Code::kInvalid);
    CHECK(read_now(*store, {bad}).code() == Code::kInvalid);
  }
  CHECK(write_now(*store, {}).code() == Code::kInvalid);
  CHECK(read_now(*store, {}).code() == Code::kInvalid);
  CHECK(store->written(object, kNbytes).status().code() == Code::kInvalid);
  CHECK(store->written(object + 1, 0).status().code() == Code::kInvalid);
  CHECK(store->remove(object + 1).code() == Code::kInvalid);
  CHECK(store->create(0).status().code() == Code::kInvalid);
  CHECK(store->stats().free_slots == before.free_slots);
  CHECK(store->stats().io.requests == before.io.requests);
  CHECK(reads_as(*store, object, *bytes, kNbytes));
}

TEST_CASE_TEMPLATE("SwapStore refuses a second write of a block in flight, and its removal", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_store<Engine>(dir, 3 * kBlock, 3 * kBlock);
  if (!store) return;
  const ObjectId object = create_object(*store, 2 * kBlock);
  const auto first = random_bytes(2 * kBlock, 1);
  const auto second = random_bytes(2 * kBlock, 2);
  must_write(*store, object, *first, 2 * kBlock);
  Gate gate(IoOp::kWrite);
  Pending slow;
  REQUIRE(store
              ->write(std::vector<SwapStore::Range>{{object, 0, second->get(), 2 * kBlock}},
                      IoPriority::kBackground, slow.completion())
              .is_ok());
  gate.wait_for_operation();
  CHECK(write_now(*store, {{object, kBlock, first->get(), kBlock}}).code() == Code::kInvalid);
  CHECK(store->remove(object).code() == Code::kInvalid);
  CHECK(reads_as(*store, object, *first, 2 * kBlock));  // the old version while it is replaced
  CHECK(slow.calls() == 0);
  gate.open();
  CHECK(slow.wait().is_ok());
  CHECK(reads_as(*store, object, *second, 2 * kBlock));
  CHECK(store->remove(object).is_ok());
  CHECK(store->stats().free_slots == 6);
}

TEST_CASE_TEMPLATE("SwapStore refuses one block twice in one write", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_store<Engine>(dir, 3 * kBlock, 6 * kBlock);
  if (!store) return;
  const ObjectId object = create_object(*store, 3 * kBlock);
  const auto bytes = random_bytes(3 * kBlock, 1);
  const std::uint64_t free_slots = store->stats().free_slots;
  CHECK(write_now(*store, {{object, 2 * kBlock, bytes->get(), kBlock},
                           {object, 0, bytes->get(), kBlock},
                           {object, kBlock, bytes->get(), 2 * kBlock}})
            .code() == Code::kInvalid);
  CHECK(store->stats().free_slots == free_slots);
  CHECK_FALSE(store->written(object, 0).value());
  must_write(*store, object, *bytes, 3 * kBlock);  // nothing is left marked as being written
  // Reads may share a block.
  const Buffer a(kBlock);
  const Buffer b(kBlock);
  CHECK(read_now(*store, {{object, 0, a.get(), kBlock}, {object, 0, b.get(), kBlock}}).is_ok());
  CHECK(std::memcmp(a.get(), b.get(), kBlock) == 0);
}

TEST_CASE_TEMPLATE("SwapStore says needed and free when the disk is too small, and goes on", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_store<Engine>(dir, 2 * kBlock, kBlock);
  if (!store) return;
  const ObjectId object = create_object(*store, kBlock);
  const auto bytes = random_bytes(kBlock, 1);
  must_write(*store, object, *bytes, kBlock);
  const SwapStore::Stats before = store->stats();
  const Status refused = store->reserve(std::uint64_t{1} << 60, kBlock);
  CHECK(refused.code() == Code::kNoSpace);
  CHECK(refused.path() == dir.path());
  CHECK(contains(refused.to_string(), "needs 11529215046"));
  CHECK(contains(refused.to_string(), " free"));
  constexpr std::uint64_t kMost = std::numeric_limits<std::uint64_t>::max();
  CHECK_FALSE(store->reserve(kMost, 0).is_ok());
  CHECK_FALSE(store->reserve(0, kMost).is_ok());
  CHECK_FALSE(store->reserve(kMost / 2 + 1, kMost / 2 + 1).is_ok());
  CHECK(store->stats().slots == before.slots);
  CHECK(store->stats().free_slots == before.free_slots);
  CHECK(reads_as(*store, object, *bytes, kBlock));
  CHECK(create_object(*store, kBlock) != object);
  CHECK(store->create(1).status().code() == Code::kNoSpace);  // the refused promise is not kept
  CHECK(store->reserve(3 * kBlock, kBlock).is_ok());
  CHECK(store->stats().slots == 4);
  CHECK(store->create(1).is_ok());
  CHECK(store->reserve(kBlock, 0).is_ok());  // never shrinks
  CHECK(store->stats().slots == 4);
}

TEST_CASE_TEMPLATE("SwapStore creates nothing beyond what was reserved", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_store<Engine>(dir, 3 * kBlock, 2 * kBlock);
  if (!store) return;
  const ObjectId object = create_object(*store, kBlock + 1);
  const Status refused = store->create(kBlock + 1).status();  // the spare is not for objects
  CHECK(refused.code() == Code::kNoSpace);
  CHECK(contains(refused.to_string(), std::to_string(kBlock + 1) + " bytes are needed"));
  CHECK(contains(refused.to_string(), std::to_string(kBlock) + " of the reserved"));
  constexpr std::uint64_t kMost = std::numeric_limits<std::uint64_t>::max();
  CHECK(store->create(kMost).status().code() == Code::kNoSpace);
  CHECK(store->create(kMost / 2).status().code() == Code::kNoSpace);
  CHECK(store->remove(object).is_ok());
  CHECK(store->create(3 * kBlock).is_ok());
}

TEST_CASE_TEMPLATE("SwapStore refuses a write for which there are no free slots", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_store<Engine>(dir, 2 * kBlock, kBlock);
  if (!store) return;
  const ObjectId object = create_object(*store, 2 * kBlock);
  const auto bytes = random_bytes(2 * kBlock, 1);
  must_write(*store, object, *bytes, 2 * kBlock);
  const auto other = random_bytes(2 * kBlock, 2);
  CHECK(write_now(*store, {{object, 0, other->get(), 2 * kBlock}}).code() == Code::kNoSpace);
  CHECK(reads_as(*store, object, *bytes, 2 * kBlock));
  CHECK(write_now(*store, {{object, 0, other->get(), kBlock}}).is_ok());
}

TEST_CASE_TEMPLATE("A SwapStore read gets the version it started on, whole", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_store<Engine>(dir, kBlock, 2 * kBlock);
  if (!store) return;
  const ObjectId object = create_object(*store, kBlock);
  const auto first = random_bytes(kBlock, 0);
  must_write(*store, object, *first, kBlock);
  const Buffer buffer(kBlock);
  Pending slow;
  {
    Gate gate(IoOp::kRead);
    REQUIRE(store
                ->read(std::vector<SwapStore::Range>{{object, 0, buffer.get(), kBlock}},
                       IoPriority::kBackground, slow.completion())
                .is_ok());
    gate.wait_for_operation();
    // Enough writes to take every slot again, had the reader's been handed out. (The ring has
    // read the bytes before they are held up here, the threads have not.)
    for (unsigned version = 1; version <= 6; ++version) {
      must_write(*store, object, *random_bytes(kBlock, version), kBlock);
      CHECK(store->stats().free_slots == 1);
    }
    CHECK(slow.calls() == 0);
    CHECK(store->remove(object).code() == Code::kInvalid);
    gate.open();
    CHECK(slow.wait().is_ok());
  }
  CHECK(std::memcmp(buffer.get(), first->get(), kBlock) == 0);
  CHECK(reads_as(*store, object, *random_bytes(kBlock, 6), kBlock));
  CHECK(store->stats().free_slots == 2);
}

TEST_CASE_TEMPLATE("SwapStore::close waits, is idempotent and ends everything", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_store<Engine>(dir, 4 * kBlock, 4 * kBlock);
  if (!store) return;
  const ObjectId object = create_object(*store, 4 * kBlock);
  const auto bytes = random_bytes(4 * kBlock, 1);
  Pending pending;
  REQUIRE(store
              ->write(std::vector<SwapStore::Range>{{object, 0, bytes->get(), 4 * kBlock}},
                      IoPriority::kBackground, pending.completion())
              .is_ok());
  CHECK(store->close().is_ok());
  CHECK(pending.calls() == 1);  // done or cancelled, never forgotten
  const Status outcome = pending.wait();
  CHECK((outcome.is_ok() || outcome.code() == Code::kClosed));
  CHECK(store->close().is_ok());
  CHECK(write_now(*store, {{object, 0, bytes->get(), kBlock}}).code() == Code::kClosed);
  CHECK(read_now(*store, {{object, 0, bytes->get(), kBlock}}).code() == Code::kClosed);
  CHECK(store->reserve(8 * kBlock, 0).code() == Code::kClosed);
  CHECK(store->create(1).status().code() == Code::kClosed);
  CHECK(store->written(object, 0).status().code() == Code::kClosed);
  CHECK(store->remove(object).code() == Code::kClosed);
  CHECK(dir.empty());
}

TEST_CASE("SwapStore::open says what is wrong with its directory or its options") {
  TempDir dir;
  const auto missing = SwapStore::open({.dirs = {{dir.path() + "/none"}}, .engine = {}, .io = {}});
  REQUIRE_FALSE(missing.is_ok());
  CHECK(missing.status().os_errno() == ENOENT);
  const auto bad =
      SwapStore::open({.dirs = {{dir.path()}}, .engine = {}, .io = {.queue_depth = 0}});
  REQUIRE_FALSE(bad.is_ok());
  CHECK(bad.status().code() == Code::kInvalid);
  const auto threads =
      SwapStore::open({.dirs = {{dir.path()}}, .engine = EngineKind::kThreads, .io = {}});
  REQUIRE(threads.is_ok());
  CHECK(std::string(threads.value()->stripes()[0].engine->name()) == "threads");
  CHECK(threads.value()->stripes()[0].engine_reason == "threads: requested");
  CHECK(dir.empty());
}

TEST_CASE_TEMPLATE("SwapStore::write tells of each block that it is done with, then of the whole",
                   Engine, OFFLOAD_STORE_ENGINES) {
  constexpr std::uint64_t kBlocks = 5;
  TempDir dir;
  auto store = open_store<Engine>(dir, kBlocks * kBlock, kBlocks * kBlock);
  if (!store) return;
  const std::uint64_t nbytes = (kBlocks - 1) * kBlock + 100;
  const ObjectId object = create_object(*store, nbytes);
  const auto bytes = random_bytes(nbytes, 1);
  struct Seen {
    std::mutex mutex;
    std::vector<std::byte*> blocks;
    std::size_t before_done = 0;
    Pending pending;
  };
  for (const int err : {0, EIO}) {
    CAPTURE(err);
    Seen seen;
    OpFaults faults(IoOp::kWrite, [err](unsigned n) { return n == 2 ? err : 0; });
    const auto block_done = [](void* context, std::byte* block) {
      auto* to = static_cast<Seen*>(context);
      const std::lock_guard<std::mutex> lock(to->mutex);
      to->blocks.push_back(block);
    };
    const auto done = [&seen, completion = seen.pending.completion()](const Status& status) {
      seen.before_done = seen.blocks.size();
      completion(status);
    };
    const std::vector<SwapStore::Range> ranges = {{object, 0, bytes->get(), nbytes}};
    REQUIRE(store->write(ranges, IoPriority::kDemand, done, nullptr, {block_done, &seen}).is_ok());
    CHECK(seen.pending.wait().os_errno() == err);
    CHECK(seen.before_done == kBlocks);
    std::sort(seen.blocks.begin(), seen.blocks.end());
    for (std::uint64_t i = 0; i < kBlocks; ++i) CHECK(seen.blocks[i] == bytes->get() + i * kBlock);
  }
}

TEST_CASE("SwapStore::footprint counts whole blocks, of any size allowed") {
  TempDir dir;
  for (const std::uint64_t block : {std::uint64_t{64} << 10, kBlock, std::uint64_t{16} << 20}) {
    const auto store = SwapStore::open({.dirs = {{dir.path()}}, .io = {}, .block_bytes = block});
    REQUIRE(store.is_ok());
    CHECK(store.value()->footprint(0) == 0);
    CHECK(store.value()->footprint(1) == block);
    CHECK(store.value()->footprint(block) == block);
    CHECK(store.value()->footprint(block + 1) == 2 * block);
  }
  for (const std::uint64_t block : {std::uint64_t{0}, kBlock / 32, 3 * kBlock, 32 * kBlock}) {
    const auto store = SwapStore::open({.dirs = {{dir.path()}}, .io = {}, .block_bytes = block});
    CHECK(store.status().code() == Code::kInvalid);
  }
  CHECK(SwapStore::open({.dirs = {}, .io = {}}).status().code() == Code::kInvalid);
}

}  // namespace offload
