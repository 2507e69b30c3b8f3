// What the tests of the update pipeline share: units with their operands in memory or in a store,
// and what their update must give.
//
// Not thread-safe: all of it belongs to the test's thread.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "doctest/doctest.h"
#include "io_testing.h"
#include "mem/make_host_memory.h"
#include "optim/adamw.h"
#include "store_testing.h"
#include "stream/update_pipeline.h"

namespace offload {

inline constexpr std::uint64_t kChunk = (kBlock / sizeof(float));
enum Operand { kParam, kGrad, kExpAvg, kExpAvgSq, kOperands };
using Arrays = std::array<std::vector<float>, kOperands>;

inline std::shared_ptr<HostMemory> make_arena() {
  auto arena = make_host_memory(std::uint64_t{160} << 20, {.poison = true});
  REQUIRE_MESSAGE(arena.is_ok(), arena.status().to_string());
  return arena.take();
}

inline std::shared_ptr<UpdatePipeline> make_pipeline(const std::shared_ptr<SwapStore>& store,
                                                     const std::shared_ptr<HostMemory>& arena,
                                                     unsigned staging_sets, unsigned threads) {
  auto pipeline = UpdatePipeline::create(store, arena, {staging_sets, threads});
  REQUIRE_MESSAGE(pipeline.is_ok(), pipeline.status().to_string());
  return pipeline.take();
}

inline std::vector<UpdateSegment> random_segments(std::uint64_t numel, std::mt19937_64& random) {
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
inline std::vector<float> random_pool(float low) {
  std::minstd_rand random(7);
  std::vector<float> pool(4 * kChunk);
  for (float& x : pool) x = static_cast<float>(random()) * 0x1p-31f + low;
  return pool;
}

inline const std::vector<float>& signed_pool() {
  static const std::vector<float> pool = random_pool(-0.5f);
  return pool;
}

inline const std::vector<float>& positive_pool() {
  static const std::vector<float> pool = random_pool(0.0f);
  return pool;
}

// A unit whose operands lie in memory or, where bit k of `on_disk` is set, in the store; what they
// hold before its update and what they must hold after it.
class Unit {
 public:
  Unit(SwapStore* store, HostMemory& arena, std::uint64_t numel, unsigned on_disk,
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
  void place(int k, bool on_disk, bool unwritten, HostMemory& arena) {
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

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b, std::uint64_t first,
                      std::uint64_t last) {
  return std::memcmp(a.data() + first, b.data() + first, (last - first) * sizeof(float)) == 0;
}

inline bool equal(const Arrays& a, const Arrays& b) {
  for (int k = 0; k < kOperands; ++k) {
    if (!same_bits(a[k], b[k], 0, a[k].size())) return false;
  }
  return true;
}

inline std::shared_ptr<Transfer> submit(UpdatePipeline& pipeline, const Unit& unit) {
  auto transfer = pipeline.submit(unit.job());
  REQUIRE_MESSAGE(transfer.is_ok(), transfer.status().to_string());
  return transfer.take();
}

}  // namespace offload
