// UpdatePipeline: bit for bit what adamw_update gives on plain arrays, whatever is on disk.
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

namespace offload {
TEST_CASE_TEMPLATE("UpdatePipeline gives the bits of adamw_update, wherever the operands are",
                   Engine, OFFLOAD_STORE_ENGINES) {
  constexpr std::array<std::uint64_t, 6> kSizes = {1,      1000,       kChunk - 1,
                                                   kChunk, kChunk + 1, 3 * kChunk + 5};
  for (const unsigned threads : {1u, 3u}) {
    CAPTURE(threads);
    TempDir dir;
    auto store = open_store<Engine>(dir, 80 * kBlock, 16 * kBlock);
    if (!store) return;
    auto arena = make_arena();
    auto pipeline = make_pipeline(store, arena, threads == 1 ? 2 : 4, threads);
    std::mt19937_64 random(threads);
    std::uint64_t jobs = 0;
    // Four jobs are queued at a time; their sizes and placements meet in changing ways.
    for (unsigned round = 0; round < 4; ++round) {
      std::vector<std::unique_ptr<Unit>> units;
      std::vector<std::shared_ptr<Transfer>> transfers;
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned on_disk = 4 * round + i;  // every placement once
        const std::uint64_t numel = kSizes[(jobs++ + threads) % kSizes.size()];
        units.push_back(
            std::make_unique<Unit>(store.get(), *arena, numel, on_disk, random() % 3 == 0, random));
      }
      for (const auto& unit : units) transfers.push_back(submit(*pipeline, *unit));
      for (unsigned i = 0; i < 4; ++i) {
        CAPTURE(round);
        CAPTURE(units[i]->job().numel);
        const Status status = transfers[i]->wait();
        CHECK_MESSAGE(status.is_ok(), status.to_string());
        CHECK(units[i]->leases_are_free());
        CHECK(equal(units[i]->now(), units[i]->after));
        for (int k = 0; k < kOperands; ++k) {
          if (units[i]->operand(k).on_disk()) {
            CHECK(store->remove(units[i]->operand(k).object).is_ok());
          }
        }
      }
    }
    CHECK(pipeline->close().is_ok());
    CHECK(pipeline->stats().jobs == jobs);
    CHECK(store->stats().free_slots == 96);
  }
}

TEST_CASE_TEMPLATE("UpdatePipeline counts a moment that was never written as zero", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_store<Engine>(dir, 16 * kBlock, 12 * kBlock);
  if (!store) return;
  auto arena = make_arena();
  auto pipeline = make_pipeline(store, arena, 2, 1);
  std::mt19937_64 random(5);
  Unit unit(store.get(), *arena, 2 * kChunk + 7, 0b1111, true, random);
  CHECK_FALSE(store->written(unit.operand(kExpAvg).object, 0).value());
  CHECK(submit(*pipeline, unit)->wait().is_ok());
  CHECK(store->written(unit.operand(kExpAvg).object, 2 * kBlock).value());
  CHECK(equal(unit.now(), unit.after));
}

TEST_CASE("UpdatePipeline needs neither store nor staging for units in memory") {
  auto arena = make_arena();
  auto pipeline = make_pipeline(nullptr, arena, 0, 3);
  CHECK(arena->usage().in_use == 0);
  std::mt19937_64 random(9);
  std::vector<std::unique_ptr<Unit>> units;
  std::vector<std::shared_ptr<Transfer>> transfers;
  for (const std::uint64_t numel : {kChunk + 1, std::uint64_t{3}, 3 * kChunk + 5, kChunk}) {
    units.push_back(std::make_unique<Unit>(nullptr, *arena, numel, 0, false, random));
    transfers.push_back(submit(*pipeline, *units.back()));
  }
  CHECK(pipeline->close().is_ok());  // finishes what was submitted
  for (std::size_t i = 0; i < units.size(); ++i) {
    CHECK(transfers[i]->done());
    CHECK(transfers[i]->wait().is_ok());
    CHECK(equal(units[i]->now(), units[i]->after));
    CHECK(units[i]->leases_are_free());
  }
  CHECK(pipeline->stats().chunks == 2 + 1 + 4 + 1);
}

TEST_CASE_TEMPLATE("UpdatePipeline refuses jobs that make no sense", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_store<Engine>(dir, 8 * kBlock, 8 * kBlock);
  if (!store) return;
  auto arena = make_arena();
  std::mt19937_64 random(6);
  Unit unit(store.get(), *arena, 5000, 0b1100, false, random);
  auto pipeline = make_pipeline(store, arena, 1, 1);
  const auto code = [&pipeline](const auto& change, UpdateJob job) {
    change(job);
    return pipeline->submit(std::move(job)).status().code();
  };
  const auto cut = [](std::vector<std::pair<std::uint64_t, std::uint64_t>> ranges) {
    return [ranges](UpdateJob& job) {
      job.segments.clear();
      for (const auto& [begin, end] : ranges) job.segments.push_back({begin, end, {}, {}});
    };
  };
  const UpdateJob good = unit.job();
  CHECK(code([](UpdateJob& j) { j.param.lease = nullptr; }, good) == Code::kInvalid);
  CHECK(code([](UpdateJob& j) { j.param.object = 1; }, good) == Code::kInvalid);
  CHECK(code([](UpdateJob& j) { j.grad.nbytes = 4 * 5000 - 1; }, good) == Code::kInvalid);
  CHECK(code([](UpdateJob& j) { j.grad.nbytes = kBlock; }, good) == Code::kInvalid);
  CHECK(code([](UpdateJob& j) { j.exp_avg.nbytes = 4; }, good) == Code::kInvalid);
  CHECK(code([](UpdateJob& j) { j.numel = 5001; }, good) == Code::kInvalid);
  CHECK(code([](UpdateJob& j) { j.numel = std::uint64_t{1} << 62; }, good) == Code::kInvalid);
  CHECK(code(cut({{0, 5001}}), good) == Code::kInvalid);
  CHECK(code(cut({{10, 9}}), good) == Code::kInvalid);
  CHECK(code(cut({{0, 10}, {9, 20}}), good) == Code::kInvalid);
  CHECK(code(cut({{20, 30}, {0, 10}}), good) == Code::kInvalid);
  CHECK(pipeline->stats().jobs == 0);
  auto in_memory_only = make_pipeline(store, arena, 0, 1);
  CHECK(in_memory_only->submit(good).status().code() == Code::kInvalid);
  auto no_store = make_pipeline(nullptr, arena, 1, 1);
  CHECK(no_store->submit(good).status().code() == Code::kInvalid);
  CHECK(equal(unit.now(), unit.before));
  CHECK(submit(*pipeline, unit)->wait().is_ok());  // refusals are not sticky
  CHECK(equal(unit.now(), unit.after));
}

TEST_CASE("UpdatePipeline refuses options that it cannot honour") {
  auto arena = make_arena();
  CHECK(UpdatePipeline::create(nullptr, arena, {.staging_sets = 0, .threads = 0}).status().code() ==
        Code::kInvalid);
  const Status refused =
      UpdatePipeline::create(nullptr, arena, {.staging_sets = 1000, .threads = 1}).status();
  CHECK(refused.code() == Code::kBudget);
  CHECK(refused.to_string().find("update staging") != std::string::npos);
  CHECK(arena->usage().in_use == 0);
}

TEST_CASE("UpdatePipeline::close ends it, from any thread, any number of times") {
  auto arena = make_arena();
  auto pipeline = make_pipeline(nullptr, arena, 1, 2);
  std::mt19937_64 random(8);
  Unit unit(nullptr, *arena, kChunk + 1, 0, false, random);
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
  CHECK(equal(unit.now(), unit.after));
  CHECK(pipeline->submit(unit.job()).status().code() == Code::kClosed);
  CHECK(pipeline->close().is_ok());
  CHECK(equal(unit.now(), unit.after));
  pipeline.reset();  // staging goes back
  std::uint64_t held = 0;
  for (int k = 0; k < kOperands; ++k) held += unit.operand(k).lease->nbytes();
  CHECK(arena->usage().in_use == held);
}

}  // namespace offload
