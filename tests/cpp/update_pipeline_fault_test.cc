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
#include "update_unit.h"

namespace offload {
namespace {

bool same_range(const Bytes& a, const Bytes& b, std::uint64_t from, std::uint64_t to) {
  return std::equal(a.begin() + static_cast<long>(from), a.begin() + static_cast<long>(to),
                    b.begin() + static_cast<long>(from));
}

// Whether all of the elements [first, last), scales included, are those of `expected`.
bool chunk_is(const Unit& unit, const Arrays& now, const Arrays& expected, std::uint64_t first,
              std::uint64_t last) {
  for (unsigned role = 0; role < kUpdateRoles; ++role) {
    const std::uint64_t width = unit.width(role);
    if (!same_range(now.operands[role], expected.operands[role], first * width, last * width)) {
      return false;
    }
  }
  for (unsigned k = 0; k < kMaxStates; ++k) {
    if (now.scales[k].empty()) continue;
    const std::uint64_t to = (last + kQuantBlock - 1) / kQuantBlock * sizeof(float);
    const std::uint64_t from = first / kQuantBlock * sizeof(float);
    if (!same_range(now.scales[k], expected.scales[k], from, to)) return false;
  }
  return true;
}

// How many chunks of the unit are updated; fails the test when one is neither old nor new.
std::uint64_t updated_chunks(Unit& unit) {
  const UpdateLayout layout = UpdateLayout::of(unit.job(), kUpdateBlock).take();
  const Arrays now = unit.now();
  std::uint64_t updated = 0;
  for (std::uint64_t i = 0; i < layout.chunks; ++i) {
    const bool is_old = chunk_is(unit, now, unit.before, layout.first(i), layout.last(i));
    const bool is_new = chunk_is(unit, now, unit.after, layout.first(i), layout.last(i));
    CAPTURE(i);
    CHECK((is_old || is_new));
    if (is_new && !is_old) ++updated;
  }
  return updated;
}

UnitPlan plan_of(const UpdateFormat& format, std::array<Home, kUpdateRoles> homes) {
  UnitPlan plan;
  plan.format = format;
  plan.homes = homes;
  plan.whole = true;
  // Some more than two chunks of the widest kind.
  plan.numel = 2 * kUpdateBlock + 5;
  return plan;
}

std::vector<UnitPlan> plans() {
  constexpr Home kM = Home::kMemory, kB = Home::kBorrowed, kD = Home::kDisk, kL = Home::kLoaded;
  const UpdateFormat plain;
  const UpdateFormat mixed{ElementType::kBfloat16, StateFormat::kInt8};
  return {
      plan_of(plain, {kD, kD, kD, kD, kD, kD}), plan_of(plain, {kD, kB, kD, kD, kM, kM}),
      plan_of(plain, {kL, kD, kD, kD, kD, kD}), plan_of(mixed, {kD, kD, kD, kD, kD, kD}),
      plan_of(mixed, {kB, kB, kM, kD, kD, kD}), plan_of(mixed, {kL, kM, kD, kM, kD, kM}),
  };
}

}  // namespace

TEST_CASE_TEMPLATE("UpdatePipeline leaves whole chunks when the disk fails, and stops", Engine,
                   OFFLOAD_STORE_ENGINES) {
  std::mt19937_64 random(3);
  for (const IoOp op : {IoOp::kRead, IoOp::kWrite}) {
    for (const UnitPlan& plan : plans()) {
      for (const bool one_chunk : {true, false}) {
        const unsigned bad = static_cast<unsigned>(random() % 3);
        CAPTURE(one_chunk);
        CAPTURE(bad);
        TempDir dir;
        auto store = open_update_store<Engine>(dir);
        if (!store) return;
        auto arena = make_arena();
        std::vector<std::unique_ptr<Unit>> units;
        for (int i = 0; i < 2; ++i) {
          units.push_back(std::make_unique<Unit>(store.get(), *arena, plan, random));
        }
        const UpdateLayout layout = UpdateLayout::of(units[0]->job(), kUpdateBlock).take();
        const std::uint64_t blocks = layout.staging_blocks(0) * (one_chunk ? 1 : 4);
        auto pipeline = make_pipeline(store, arena, blocks, one_chunk ? 1 : 3);
        const SwapStore::Stats before = store->stats();
        // Loaded operands take no staging: only without them is one chunk in flight.
        const bool is_alone = one_chunk && !layout.any_loaded;
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
            CHECK(units[i]->memory_is_free());
            if (status.is_ok()) continue;
            ++failed;
            CHECK(status.os_errno() == EIO);
            CHECK(status.to_string().find("optimizer update") != std::string::npos);
          }
          // The first job meets the error, and no other gets anywhere.
          if (is_alone) CHECK(failed == static_cast<int>(transfers.size()));
          CHECK(failed >= 1);
          const auto refused = pipeline->submit(units[0]->job());
          CHECK(refused.status().os_errno() == EIO);
          CHECK(pipeline->close().os_errno() == EIO);
        }
        std::uint64_t updated = 0;
        for (const auto& unit : units) updated += updated_chunks(*unit);
        CHECK(updated < 2 * layout.chunks);
        if (is_alone) CHECK(updated <= bad);
        CHECK(store->stats().free_slots == before.free_slots);
      }
    }
  }
}

TEST_CASE_TEMPLATE("UpdatePipeline updates nothing in memory either once the disk failed", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_update_store<Engine>(dir);
  if (!store) return;
  auto arena = make_arena();
  std::mt19937_64 random(5);
  Unit on_disk(store.get(), *arena, UnitPlan::everywhere(Home::kDisk, 5000), random);
  Unit in_memory(nullptr, *arena, UnitPlan::everywhere(Home::kMemory, 5000), random);
  auto pipeline = make_pipeline(store, arena, 5, 1);
  {
    OpFaults faults(IoOp::kRead, [](unsigned) { return EIO; });
    CHECK(submit(*pipeline, on_disk)->wait().os_errno() == EIO);
  }
  CHECK(pipeline->submit(in_memory.job()).status().os_errno() == EIO);
  CHECK(pipeline->close().os_errno() == EIO);
  CHECK(same(on_disk.now(), on_disk.before));
  CHECK(same(in_memory.now(), in_memory.before));
}

TEST_CASE_TEMPLATE("UpdatePipeline updates in memory while other jobs wait for the disk", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_update_store<Engine>(dir);
  if (!store) return;
  auto arena = make_arena();
  std::mt19937_64 random(7);
  Unit on_disk(store.get(), *arena, UnitPlan::everywhere(Home::kDisk, kUpdateBlock), random);
  Unit in_memory(nullptr, *arena, UnitPlan::everywhere(Home::kMemory, 5000), random);
  auto pipeline = make_pipeline(store, arena, 5, 1);
  Gate gate(IoOp::kRead);
  const auto held = submit(*pipeline, on_disk);
  CHECK(submit(*pipeline, in_memory)->wait().is_ok());
  CHECK_FALSE(held->done());
  gate.open();
  CHECK(held->wait().is_ok());
  CHECK(same(in_memory.now(), in_memory.after));
  CHECK(same(on_disk.now(), on_disk.after));
}

TEST_CASE_TEMPLATE("UpdatePipeline passes on what it cannot read", Engine, OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_update_store<Engine>(dir);
  if (!store) return;
  auto arena = make_arena();
  std::mt19937_64 random(4);
  UnitPlan plan = UnitPlan::everywhere(Home::kMemory, 1000);
  Unit unit(store.get(), *arena, plan, random);
  for (const unsigned role : {kParam, kGrad}) {
    CAPTURE(role);
    auto pipeline = make_pipeline(store, arena, 5, 1);
    UpdateJob job = unit.job();
    job.operands[role] = UpdateOperand::on_disk(create_object(*store, 4000), 4000);
    auto transfer = pipeline->submit(job);
    REQUIRE(transfer.is_ok());
    const Status status = transfer.value()->wait();
    CHECK(status.code() == Code::kInvalid);
    CHECK(status.to_string().find("never written") != std::string::npos);
  }
  CHECK(same(unit.now(), unit.before));
}

}  // namespace offload
