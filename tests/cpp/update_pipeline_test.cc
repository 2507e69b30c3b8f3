// UpdatePipeline: bit for bit what adamw_update gives on plain arrays, whatever is on disk; whole
// chunks or none when the disk fails.
#include "stream/update_pipeline.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "doctest/doctest.h"
#include "io_testing.h"
#include "mem/host_arena.h"
#include "optim/adamw.h"
#include "store_testing.h"
#include "temp_dir.h"

namespace offload {
namespace {

constexpr std::uint64_t kChunk = UpdatePipeline::kChunkElements;
enum Operand { kParam, kGrad, kExpAvg, kExpAvgSq, kOperands };
using Arrays = std::array<std::vector<float>, kOperands>;

std::shared_ptr<HostArena> make_arena() {
  auto arena = HostArena::create(std::uint64_t{160} << 20, true);
  REQUIRE_MESSAGE(arena.is_ok(), arena.status().to_string());
  return arena.take();
}

std::shared_ptr<UpdatePipeline> make_pipeline(const std::shared_ptr<SwapStore>& store,
                                              const std::shared_ptr<HostArena>& arena,
                                              unsigned staging_sets, unsigned threads) {
  auto pipeline = UpdatePipeline::create(store, arena, {staging_sets, threads});
  REQUIRE_MESSAGE(pipeline.is_ok(), pipeline.status().to_string());
  return pipeline.take();
}

std::vector<UpdateSegment> random_segments(std::uint64_t numel, std::mt19937_64& random) {
  std::vector<std::uint64_t> cuts = {0, numel};
  for (int i = 0; i < 5; ++i) cuts.push_back(random() % (numel + 1));
  std::sort(cuts.begin(), cuts.end());
  std::vector<UpdateSegment> segments;
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
    if (i > 0 && random() % 4 == 0) continue;  // a gap; segments of nothing occur too
    UpdateSegment segment{cuts[i], cuts[i + 1], {}, {}};
    segment.hyper = {.lr = 1e-3 * static_cast<double>(1 + random() % 50),
                     .beta1 = random() % 2 == 0 ? 0.9 : 0.3,
                     .beta2 = 0.999,
                     .eps = 1e-8,
                     .weight_decay = 0.01 * static_cast<double>(random() % 3),
                     .step = static_cast<double>(1 + random() % 9),
                     .maximize = random() % 4 == 0};
    for (std::uint64_t n = random() % 3; n > 0; --n) {
      segment.factors.push_back(0.25f + 0.001f * static_cast<float>(random() % 700));
    }
    segments.push_back(std::move(segment));
  }
  return segments;
}

// More random numbers than a unit has elements, made once: in [low, low + 1).
std::vector<float> random_pool(float low) {
  std::minstd_rand random(7);
  std::vector<float> pool(4 * kChunk);
  for (float& x : pool) x = static_cast<float>(random()) * 0x1p-31f + low;
  return pool;
}

const std::vector<float>& signed_pool() {
  static const std::vector<float> pool = random_pool(-0.5f);
  return pool;
}

const std::vector<float>& positive_pool() {
  static const std::vector<float> pool = random_pool(0.0f);
  return pool;
}

// A unit whose operands lie in memory or, where bit k of `on_disk` is set, in the store; what they
// hold before its update and what they must hold after it.
class Unit {
 public:
  Unit(SwapStore* store, HostArena& arena, std::uint64_t numel, unsigned on_disk,
       bool fresh_moments, std::mt19937_64& random)
      : store_(store) {
    job_.numel = numel;
    job_.segments = random_segments(numel, random);
    for (int k = 0; k < kOperands; ++k) {
      const bool zero = fresh_moments && (k == kExpAvg || k == kExpAvgSq);
      before[k].resize(numel);
      if (!zero) {
        const std::vector<float>& pool = k == kExpAvgSq ? positive_pool() : signed_pool();
        const auto from = pool.begin() + static_cast<long>(random() % (pool.size() - numel));
        std::copy_n(from, numel, before[k].begin());
      }
      place(k, (on_disk >> k & 1) != 0, zero, arena);
    }
    after = before;
    for (const UpdateSegment& s : job_.segments) {
      adamw_update(s.hyper, {s.factors.data(), s.factors.size()}, after[kParam].data() + s.begin,
                   after[kGrad].data() + s.begin, after[kExpAvg].data() + s.begin,
                   after[kExpAvgSq].data() + s.begin, after[kParam].data() + s.begin,
                   after[kExpAvg].data() + s.begin, after[kExpAvgSq].data() + s.begin,
                   s.end - s.begin);
    }
  }

  const UpdateJob& job() const { return job_; }
  UpdateOperand& operand(int k) {
    UpdateOperand* const all[] = {&job_.param, &job_.grad, &job_.exp_avg, &job_.exp_avg_sq};
    return *all[k];
  }

  // What the operands hold now, from wherever they are.
  Arrays now() {
    Arrays arrays;
    for (int k = 0; k < kOperands; ++k) {
      arrays[k].resize(job_.numel);
      const UpdateOperand& from = operand(k);
      if (!from.on_disk()) {
        std::memcpy(arrays[k].data(), from.lease->data(), job_.numel * sizeof(float));
        continue;
      }
      for (std::uint64_t at = 0; at < from.nbytes; at += kBlock) {
        if (!store_->written(from.object, at).value()) continue;  // zero
        const std::uint64_t nbytes = std::min(kBlock, from.nbytes - at);
        const Buffer buffer(nbytes);
        const Status status = read_now(*store_, {{from.object, at, buffer.get(), nbytes}});
        REQUIRE_MESSAGE(status.is_ok(), status.to_string());
        std::memcpy(reinterpret_cast<std::byte*>(arrays[k].data()) + at, buffer.get(), nbytes);
      }
    }
    return arrays;
  }

  bool leases_are_free() {
    for (int k = 0; k < kOperands; ++k) {
      if (!operand(k).on_disk() && operand(k).lease.use_count() != 2) return false;
    }
    return true;
  }

  Arrays before;
  Arrays after;

 private:
  void place(int k, bool on_disk, bool unwritten, HostArena& arena) {
    const std::uint64_t nbytes = job_.numel * sizeof(float);
    Result<Lease> lease = arena.allocate(nbytes);
    REQUIRE_MESSAGE(lease.is_ok(), lease.status().to_string());
    std::memcpy(lease.value().data(), before[k].data(), nbytes);
    if (!on_disk) {
      leases_[k] = std::make_shared<Lease>(lease.take());
      operand(k) = {leases_[k], kNoObject, nbytes};
      return;
    }
    operand(k) = {nullptr, create_object(*store_, nbytes), nbytes};
    if (unwritten) return;
    const Status status =
        write_now(*store_, {{operand(k).object, 0, lease.value().data(), nbytes}});
    REQUIRE_MESSAGE(status.is_ok(), status.to_string());
  }

  SwapStore* store_;
  UpdateJob job_;
  std::array<std::shared_ptr<Lease>, kOperands> leases_;  // beside job_: two owners when idle
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b, std::uint64_t first,
               std::uint64_t last) {
  return std::memcmp(a.data() + first, b.data() + first, (last - first) * sizeof(float)) == 0;
}

bool equal(const Arrays& a, const Arrays& b) {
  for (int k = 0; k < kOperands; ++k) {
    if (!same_bits(a[k], b[k], 0, a[k].size())) return false;
  }
  return true;
}

std::shared_ptr<Transfer> submit(UpdatePipeline& pipeline, const Unit& unit) {
  auto transfer = pipeline.submit(unit.job());
  REQUIRE_MESSAGE(transfer.is_ok(), transfer.status().to_string());
  return transfer.take();
}

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

TEST_CASE_TEMPLATE("UpdatePipeline leaves whole chunks when the disk fails, and stops", Engine,
                   OFFLOAD_STORE_ENGINES) {
  constexpr std::uint64_t kNumel = 2 * kChunk + 5;
  std::mt19937_64 random(3);
  for (const IoOp op : {IoOp::kRead, IoOp::kWrite}) {
    for (const unsigned on_disk : {0b1111u, 0b0101u}) {
      for (const unsigned staging_sets : {1u, 4u}) {
        const unsigned bad = static_cast<unsigned>(random() % 3);
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
