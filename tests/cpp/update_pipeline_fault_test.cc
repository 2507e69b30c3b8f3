// UpdatePipeline when the disk fails: whole chunks or none, and no further ones.
#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "doctest/doctest.h"
#include "store_testing.h"
#include "stream/update_pipeline.h"
#include "temp_dir.h"
#include "update_testing.h"

namespace offload {
namespace {

struct Setup {
  unsigned on_disk;  // a bit per operand
  unsigned staging_sets;
};

// How many chunks of the unit are updated; fails the test when one is neither old nor new.
std::uint64_t updated_chunks(Unit& unit) {
  const Arrays now = unit.now();
  std::uint64_t updated = 0;
  for (std::uint64_t first = 0; first < unit.job().numel; first += kChunk) {
    const std::uint64_t last = std::min(unit.job().numel, first + kChunk);
    bool is_old = true;
    bool is_new = true;
    for (int k = 0; k < kOperands; ++k) {
      is_old = is_old && same_bits(now[k], unit.before[k], first, last);
      is_new = is_new && same_bits(now[k], unit.after[k], first, last);
    }
    CAPTURE(first);
    CHECK((is_old || is_new));
    if (is_new && !is_old) ++updated;
  }
  return updated;
}

}  // namespace

TEST_CASE_TEMPLATE("UpdatePipeline leaves whole chunks when the disk fails, and stops", Engine,
                   OFFLOAD_STORE_ENGINES) {
  constexpr std::uint64_t kNumel = 2 * kChunk + 5;
  std::mt19937_64 random(3);
  for (const IoOp op : {IoOp::kRead, IoOp::kWrite}) {
    for (const Setup& setup : std::vector<Setup>{{0b1111, 1}, {0b1111, 4}, {0b0101, 4}}) {
      const unsigned bad = static_cast<unsigned>(random() % 3);
      const unsigned on_disk = setup.on_disk;
      const unsigned staging_sets = setup.staging_sets;
      CAPTURE(on_disk);
      CAPTURE(staging_sets);
      CAPTURE(bad);
      TempDir dir;
      auto store = open_store<Engine>(dir, 32 * kBlock, 16 * kBlock);
      if (!store) return;
      auto arena = make_arena();
      auto pipeline = make_pipeline(store, arena, staging_sets, 1 + on_disk % 3);
      std::vector<std::unique_ptr<Unit>> units;
      for (int i = 0; i < 2; ++i) {
        units.push_back(
            std::make_unique<Unit>(store.get(), *arena, kNumel, on_disk, false, random));
      }
      const SwapStore::Stats before = store->stats();
      {
        OpFaults faults(op, [bad](unsigned n) { return n == bad ? EIO : 0; });
        std::vector<std::shared_ptr<Transfer>> transfers;
        for (const auto& unit : units) {
          auto transfer = pipeline->submit(unit->job());
          // The first may have failed by now.
          if (transfer.is_ok()) transfers.push_back(transfer.take());
        }
        REQUIRE(!transfers.empty());
        int failed = 0;
        for (std::size_t i = 0; i < transfers.size(); ++i) {
          const Status status = transfers[i]->wait();
          CHECK(units[i]->leases_are_free());
          if (status.is_ok()) continue;
          ++failed;
          CHECK(status.os_errno() == EIO);
          CHECK(status.to_string().find("optimizer update") != std::string::npos);
        }
        // With one chunk in flight the first job meets the error and no other gets anywhere.
        if (staging_sets == 1) CHECK(failed == static_cast<int>(transfers.size()));
        CHECK(failed >= 1);
        const auto refused = pipeline->submit(units[0]->job());
        CHECK(refused.status().os_errno() == EIO);
        CHECK(pipeline->close().os_errno() == EIO);
      }
      std::uint64_t updated = 0;
      for (const auto& unit : units) updated += updated_chunks(*unit);
      CHECK(updated < 6);
      if (staging_sets == 1) CHECK(updated <= bad);
      CHECK(store->stats().free_slots == before.free_slots);
    }
  }
}

TEST_CASE_TEMPLATE("UpdatePipeline passes on what it cannot read", Engine, OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_store<Engine>(dir, 8 * kBlock, 8 * kBlock);
  if (!store) return;
  auto arena = make_arena();
  std::mt19937_64 random(4);
  Unit unit(store.get(), *arena, kChunk, 0b1100, false, random);
  for (const int k : {kParam, kGrad}) {
    CAPTURE(k);
    auto pipeline = make_pipeline(store, arena, 1, 1);
    UpdateJob job = unit.job();
    UpdateOperand& unwritten = k == kParam ? job.param : job.grad;
    unwritten = {nullptr, create_object(*store, kBlock), kBlock};
    auto transfer = pipeline->submit(job);
    REQUIRE(transfer.is_ok());
    const Status status = transfer.value()->wait();
    CHECK(status.code() == Code::kInvalid);
    CHECK(status.to_string().find("never written") != std::string::npos);
  }
  CHECK(equal(unit.now(), unit.before));
}

}  // namespace offload
