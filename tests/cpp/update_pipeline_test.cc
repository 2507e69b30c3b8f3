// UpdatePipeline: bit for bit what update() gives on plain arrays, wherever the operands are.
#include "stream/update_pipeline.h"

#include <array>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "doctest/doctest.h"
#include "store_testing.h"
#include "temp_dir.h"
#include "update_testing.h"
#include "update_unit.h"

namespace offload {
namespace {

constexpr Rule kRules[] = {Rule::kAdamW,   Rule::kAdam,    Rule::kSgd,
                           Rule::kAdagrad, Rule::kRmsprop, Rule::kLion};

UnitPlan random_plan(const UpdateFormat& format, bool with_disk, std::mt19937_64& random) {
  // Elements of the chunks of 4, 2 and 1 bytes: kSmall, 2 and 4 times as many.
  constexpr std::uint64_t kSmall = kUpdateBlock / 4;
  constexpr std::array<std::uint64_t, 8> kSizes = {
      1, 1000, kSmall - 1, kSmall, 2 * kSmall + 1, 4 * kSmall, 4 * kSmall + 3, 9 * kSmall + 301};
  UnitPlan plan;
  plan.numel = kSizes[random() % kSizes.size()];
  plan.format = format;
  plan.rule = kRules[random() % std::size(kRules)];
  for (Home& home : plan.homes) home = kHomes[random() % (with_disk ? 4 : 2)];
  plan.whole = random() % 3 == 0;
  plan.fresh = static_cast<UnitPlan::Fresh>(random() % 3);
  if (plan.rule == Rule::kAdagrad && random() % 2 == 0) plan.initial = 0.25f;
  return plan;
}

void check_updated(Unit& unit, Transfer& transfer) {
  CAPTURE(unit.job().numel);
  for (unsigned role = 0; role < kUpdateRoles; ++role) {
    INFO("role ", role, ": width ", unit.width(role), unit.operand(role).is_stored() ? " disk" : "",
         unit.operand(role).address != nullptr ? " memory" : "");
  }
  const Status status = transfer.wait();
  CHECK_MESSAGE(status.is_ok(), status.to_string());
  CHECK(unit.memory_is_free());
  CHECK(same(unit.now(), unit.after));
  CHECK(unit.leases_hold(unit.after));
}

}  // namespace

TEST_CASE_TEMPLATE("UpdatePipeline gives the bits of update(), wherever the operands are", Engine,
                   OFFLOAD_STORE_ENGINES) {
  for (const unsigned threads : {1u, 3u}) {
    CAPTURE(threads);
    TempDir dir;
    auto store = open_update_store<Engine>(dir);
    if (!store) return;
    const std::uint64_t free_slots = store->stats().free_slots;
    auto arena = make_arena();
    const std::uint64_t least = UpdatePipeline::min_staging_bytes(1);  // in blocks
    auto pipeline = make_pipeline(store, arena, threads == 1 ? least : 3 * least, threads);
    std::mt19937_64 random(threads);
    std::uint64_t jobs = 0;
    for (const ElementType param : kElementTypes) {
      for (const StateFormat state : kStateFormats) {
        CAPTURE(param);
        CAPTURE(state);
        // Several jobs are queued at a time; their sizes and placements meet in changing ways.
        for (unsigned round = 0; round < 3; ++round) {
          std::vector<std::unique_ptr<Unit>> units;
          std::vector<std::shared_ptr<Transfer>> transfers;
          for (unsigned i = 0; i < 5; ++i) {
            const UnitPlan plan = random_plan({param, state}, i != 4, random);
            units.push_back(std::make_unique<Unit>(store.get(), *arena, plan, random));
          }
          for (const auto& unit : units) transfers.push_back(submit(*pipeline, *unit));
          for (unsigned i = 0; i < 5; ++i) check_updated(*units[i], *transfers[i]);
          jobs += units.size();
        }
      }
    }
    CHECK(pipeline->close().is_ok());
    CHECK(pipeline->stats().jobs == jobs);
    CHECK(store->stats().free_slots == free_slots);
  }
}

TEST_CASE("UpdatePipeline needs neither store nor staging for units in memory") {
  constexpr std::uint64_t kChunk = UpdateLayout::kMemoryChunk;
  auto arena = make_arena();
  auto pipeline = make_pipeline(nullptr, nullptr, 0, 3);
  std::mt19937_64 random(9);
  std::vector<std::unique_ptr<Unit>> units;
  std::vector<std::shared_ptr<Transfer>> transfers;
  for (const std::uint64_t numel : {kChunk + 1, std::uint64_t{3}, 3 * kChunk + 5, kChunk}) {
    const UnitPlan plan = UnitPlan::everywhere(Home::kMemory, numel);
    units.push_back(std::make_unique<Unit>(nullptr, *arena, plan, random));
    transfers.push_back(submit(*pipeline, *units.back()));
  }
  CHECK(pipeline->close().is_ok());  // finishes what was submitted
  for (std::size_t i = 0; i < units.size(); ++i) {
    CHECK(transfers[i]->done());
    check_updated(*units[i], *transfers[i]);
  }
  CHECK(pipeline->stats().chunks == 2 + 1 + 4 + 1);
}

TEST_CASE("UpdatePipeline is done at once with a unit of no elements or no segments") {
  auto arena = make_arena();
  auto pipeline = make_pipeline(nullptr, nullptr, 0, 1);
  std::mt19937_64 random(1);
  Unit unit(nullptr, *arena, UnitPlan::everywhere(Home::kMemory, 300), random);
  UpdateJob job = unit.job();
  job.segments.clear();
  auto nothing = pipeline->submit(job);
  REQUIRE(nothing.is_ok());
  CHECK(nothing.value()->wait().is_ok());
  job.numel = 0;
  nothing = pipeline->submit(std::move(job));
  REQUIRE(nothing.is_ok());
  CHECK(nothing.value()->done());
  CHECK(unit.memory_is_free());
  CHECK(same(unit.now(), unit.before));
}

TEST_CASE_TEMPLATE("UpdatePipeline refuses jobs that make no sense", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_update_store<Engine>(dir);
  if (!store) return;
  auto arena = make_arena();
  std::mt19937_64 random(6);
  UnitPlan plan = UnitPlan::everywhere(Home::kMemory, 5000);
  plan.format = {ElementType::kBfloat16, StateFormat::kInt8};
  plan.homes[kState] = plan.homes[kState + 1] = Home::kDisk;
  Unit unit(store.get(), *arena, plan, random);
  auto pipeline = make_pipeline(store, arena, 12, 1);
  const auto code = [&](const auto& change) {
    UpdateJob job = unit.job();
    change(job);
    return pipeline->submit(std::move(job)).status().code();
  };
  const auto cut = [](std::vector<std::pair<std::uint64_t, std::uint64_t>> ranges) {
    return [ranges](UpdateJob& job) {
      job.segments.clear();
      for (const auto& [begin, end] : ranges) job.segments.push_back({begin, end, {}, {}});
    };
  };
  const auto refused = [&](const auto& change) { return code(change) == Code::kInvalid; };
  for (const unsigned role : {kParam, kGrad, kMaster}) {
    CAPTURE(role);
    CHECK(refused([&](UpdateJob& j) { j.operands[role] = {}; }));
    CHECK(refused([&](UpdateJob& j) { --j.operands[role].nbytes; }));
    CHECK(refused([&](UpdateJob& j) { j.operands[role].nbytes = kUpdateBlock; }));
    CHECK(refused([&](UpdateJob& j) { ++j.operands[role].address; }));
    CHECK(refused([&](UpdateJob& j) { j.operands[role].initial = 1; }));
  }
  const auto state = [](unsigned k) { return static_cast<unsigned>(kState) + k; };
  CHECK(refused([&](UpdateJob& j) { j.operands[state(1)] = {}; }));
  CHECK(refused([&](UpdateJob& j) { j.operands[state(2)] = j.operands[state(1)]; }));
  CHECK(refused([&](UpdateJob& j) { j.operands[state(0)].nbytes = 4; }));
  CHECK(refused([](UpdateJob& j) { j.scales[1] = {}; }));
  CHECK(refused([](UpdateJob& j) { j.scales[2] = j.scales[1]; }));
  CHECK(refused([](UpdateJob& j) { j.scales[0].nbytes = 19 * sizeof(float); }));
  CHECK(refused([&](UpdateJob& j) { j.scales[0] = j.operands[state(0)]; }));
  CHECK(refused([](UpdateJob& j) { j.format.param = ElementType::kFloat32; }));
  CHECK(refused([](UpdateJob& j) { j.format.state = StateFormat::kFloat32; }));
  CHECK(refused([](UpdateJob& j) { j.numel = 5001; }));
  CHECK(refused([](UpdateJob& j) { j.numel = std::uint64_t{1} << 62; }));
  CHECK(refused([&](UpdateJob& j) {  // a page-aligned place is needed to read to
    j.operands[kParam].object = j.operands[state(0)].object;
    j.operands[kParam].address += 64;
    j.operands[kParam].memory_bytes -= 64;
    j.numel = 256;
    j.operands[kParam].nbytes = 512;
    j.segments.clear();
  }));
  CHECK(refused(cut({{0, 5001}})));
  CHECK(refused(cut({{512, 511}})));
  CHECK(refused(cut({{0, 300}, {256, 512}})));
  CHECK(refused(cut({{512, 600}, {0, 10}})));
  CHECK(refused(cut({{10, 20}})));  // 8-bit states have one scale for 256 elements
  CHECK(refused([](UpdateJob& j) {
    for (UpdateSegment& segment : j.segments) {
      segment.hyper.rule = Rule::kAdam;
      segment.hyper.amsgrad = true;
    }
  }));
  CHECK(pipeline->stats().jobs == 0);
  for (const auto& other : {make_pipeline(store, arena, 0, 1), make_pipeline(store, arena, 2, 1),
                            make_pipeline(nullptr, arena, 12, 1)}) {
    CHECK(other->submit(unit.job()).status().code() == Code::kInvalid);
  }
  CHECK(same(unit.now(), unit.before));
  check_updated(unit, *submit(*pipeline, unit));  // refusals are not sticky
}

TEST_CASE("UpdatePipeline refuses options that it cannot honour") {
  auto arena = make_arena();
  CHECK(
      UpdatePipeline::create(nullptr, arena, {.staging_bytes = 0, .threads = 0}).status().code() ==
      Code::kInvalid);
  CHECK(UpdatePipeline::create(nullptr, nullptr, {.staging_bytes = 1, .threads = 1})
            .status()
            .code() == Code::kInvalid);
  const Status refused =
      UpdatePipeline::create(nullptr, arena,
                             {.staging_bytes = std::uint64_t{1} << 30, .threads = 1})
          .status();
  CHECK(refused.code() == Code::kBudget);
  CHECK(refused.to_string().find("update staging") != std::string::npos);
  CHECK(arena->usage().in_use == 0);
}

TEST_CASE("UpdatePipeline::min_staging_bytes is what the widest chunk takes") {
  std::uint64_t most = 0;
  auto arena = make_arena();
  TempDir dir;
  auto store = open_update_store<StoreOnThreads>(dir);
  std::mt19937_64 random(2);
  for (const ElementType param : kElementTypes) {
    for (const StateFormat state : kStateFormats) {
      UnitPlan plan = UnitPlan::everywhere(Home::kDisk, kUpdateBlock);
      plan.format = {param, state};
      plan.rule = Rule::kAdam;
      const Unit unit(store.get(), *arena, plan, random);
      const auto layout = UpdateLayout::of(unit.job(), kUpdateBlock);
      REQUIRE(layout.is_ok());
      most = std::max(most, layout.value().staging_blocks(0) * kUpdateBlock);
    }
  }
  CHECK(UpdatePipeline::min_staging_bytes(kUpdateBlock) == most);
}

TEST_CASE("UpdatePipeline::close ends it, from any thread, any number of times") {
  auto arena = make_arena();
  auto pipeline = make_pipeline(nullptr, arena, 4, 2);
  std::mt19937_64 random(8);
  const UnitPlan plan = UnitPlan::everywhere(Home::kMemory, 3 * UpdateLayout::kMemoryChunk);
  Unit unit(nullptr, *arena, plan, random);
  const std::uint64_t in_use = arena->usage().in_use;
  const auto transfer = submit(*pipeline, unit);
  {
    std::vector<std::jthread> closers;
    for (int i = 0; i < 3; ++i) {
      closers.emplace_back([&pipeline] {
        const Status status = pipeline->close();
        CHECK(status.is_ok());
      });
    }
  }
  CHECK(transfer->done());
  CHECK(same(unit.now(), unit.after));
  CHECK(pipeline->submit(unit.job()).status().code() == Code::kClosed);
  CHECK(pipeline->close().is_ok());
  CHECK(same(unit.now(), unit.after));
  pipeline.reset();
  CHECK(arena->usage().in_use == in_use - 4 * kUpdateBlock);  // staging went back
}

}  // namespace offload
