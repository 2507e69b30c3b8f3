// What the tests of the update pipeline share: units with operands of any format wherever a job may
// have them, and what their update must give.
//
// Not thread-safe: all of it belongs to the test's thread.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
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
#include "store_testing.h"
#include "stream/update_pipeline.h"

namespace offload {

// Small blocks: many chunks without much data.
inline constexpr std::uint64_t kUpdateBlock = SwapStoreOptions::kMinBlockBytes;

using Bytes = std::vector<std::byte>;
struct Arrays {
  std::array<Bytes, kUpdateRoles> operands;
  std::array<Bytes, kMaxStates> scales;
};

enum class Home { kMemory, kBorrowed, kDisk, kLoaded };
inline constexpr Home kHomes[] = {Home::kMemory, Home::kBorrowed, Home::kDisk, Home::kLoaded};
inline constexpr ElementType kElementTypes[] = {ElementType::kFloat32, ElementType::kBfloat16,
                                                ElementType::kFloat16};
inline constexpr StateFormat kStateFormats[] = {StateFormat::kFloat32, StateFormat::kBfloat16,
                                                StateFormat::kInt8};

inline bool on_disk(Home home) {
  return home == Home::kDisk || home == Home::kLoaded;
}

struct UnitPlan {
  std::uint64_t numel = 0;
  UpdateFormat format;
  Rule rule = Rule::kAdamW;
  std::array<Home, kUpdateRoles> homes = {};  // of roles that the format or rule does not have: any
  bool whole = false;  // one segment of everything, else several and gaps between them
  // Of states and master copies on disk: which blocks were never written.
  enum Fresh { kNone, kAll, kSome } fresh = kNone;
  float initial = 0;

  static UnitPlan everywhere(Home home, std::uint64_t numel) {
    UnitPlan plan;
    plan.numel = numel;
    plan.homes.fill(home);
    return plan;
  }
};

inline std::shared_ptr<HostMemory> make_arena() {
  auto arena = make_host_memory(std::uint64_t{160} << 20, {.poison = true});
  REQUIRE_MESSAGE(arena.is_ok(), arena.status().to_string());
  return arena.take();
}

// Null when this kernel refuses a ring: the caller returns.
template <typename Engine>
std::shared_ptr<SwapStore> open_update_store(const TempDir& dir) {
  constexpr std::uint64_t kBytes = std::uint64_t{64} << 20;
  return open_store<Engine>(dir, kBytes, kBytes, kUpdateBlock);
}

inline std::shared_ptr<UpdatePipeline> make_pipeline(const std::shared_ptr<SwapStore>& store,
                                                     const std::shared_ptr<HostMemory>& arena,
                                                     std::uint64_t staging_blocks,
                                                     unsigned threads) {
  auto pipeline = UpdatePipeline::create(store, arena, {staging_blocks * kUpdateBlock, threads});
  REQUIRE_MESSAGE(pipeline.is_ok(), pipeline.status().to_string());
  return pipeline.take();
}

// Most states that segments of the rule have here.
inline std::size_t states_of(Rule rule) {
  switch (rule) {
    case Rule::kAdam:
    case Rule::kRmsprop:
      return 3;
    case Rule::kAdamW:
      return 2;
    default:
      return 1;
  }
}

inline RuleHyper random_hyper(Rule rule, std::mt19937_64& random) {
  RuleHyper hyper;
  hyper.rule = rule;
  hyper.lr = 1e-3 * static_cast<double>(1 + random() % 50);
  hyper.beta1 = random() % 2 == 0 ? 0.9 : 0.3;
  hyper.beta2 = 0.999;
  hyper.eps = 1e-8;
  hyper.weight_decay = 0.01 * static_cast<double>(random() % 3);
  hyper.alpha = 0.99;
  hyper.step = static_cast<double>(1 + random() % 9);
  hyper.maximize = random() % 4 == 0;
  hyper.amsgrad = rule == Rule::kAdam && random() % 4 != 0;
  hyper.momentum = random() % 4 == 0 ? 0 : 0.9;
  hyper.centered = hyper.momentum != 0;
  return hyper;
}

inline std::vector<UpdateSegment> random_segments(const UnitPlan& plan, std::mt19937_64& random) {
  std::vector<std::uint64_t> cuts = {0, plan.numel};
  if (!plan.whole) {
    // At multiples of what all formats take.
    for (int i = 0; i < 5; ++i) cuts.push_back(random() % (plan.numel + 1) / 256 * 256);
    std::sort(cuts.begin(), cuts.end());
  }
  std::vector<UpdateSegment> segments;
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
    if (i > 0 && random() % 4 == 0) continue;  // a gap; segments of nothing occur too
    UpdateSegment segment{cuts[i], cuts[i + 1], random_hyper(plan.rule, random), {}, random() % 9};
    if (!plan.whole && segment.end > segment.begin && random() % 2 == 0) --segment.end;
    for (std::uint64_t n = random() % 3; n > 0; --n) {
      segment.factors.push_back(0.25f + 0.001f * static_cast<float>(random() % 700));
    }
    segments.push_back(std::move(segment));
  }
  return segments;
}

inline std::vector<float> random_floats(std::uint64_t n, float low, std::mt19937_64& seed) {
  std::minstd_rand random(static_cast<unsigned>(seed() | 1));
  std::vector<float> values(n);
  for (float& x : values) x = static_cast<float>(random()) * 0x1p-31f + low;
  return values;
}

template <typename T>
Bytes as_bytes(const std::vector<T>& values) {
  Bytes bytes(values.size() * sizeof(T));
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

// Values of the type within (-1, 1).
inline Bytes random_elements(ElementType type, std::uint64_t n, std::mt19937_64& random) {
  if (type == ElementType::kFloat32) return as_bytes(random_floats(n, -0.5f, random));
  std::vector<std::uint16_t> bits(n);
  std::minstd_rand next(static_cast<unsigned>(random() | 1));
  for (std::uint16_t& x : bits) {
    const auto r = static_cast<std::uint32_t>(next());
    const std::uint32_t exponent =
        type == ElementType::kBfloat16 ? (119 + r % 8) << 7 : (7 + r % 8) << 10;
    const std::uint32_t mantissa = r >> 8 & (type == ElementType::kBfloat16 ? 0x7f : 0x3ff);
    x = static_cast<std::uint16_t>((r >> 5 & 1) << 15 | exponent | mantissa);
  }
  return as_bytes(bits);
}

// The reference for the first value of a master copy. REQUIRES: no subnormal, infinity or NaN.
inline float widened(ElementType type, std::uint16_t bits) {
  const bool is_bfloat = type == ElementType::kBfloat16;
  const int mantissa_bits = is_bfloat ? 7 : 10;
  const int exponent = (bits & 0x7fff) >> mantissa_bits;
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const float value = std::ldexp(1.0f + std::ldexp(static_cast<float>(mantissa), -mantissa_bits),
                                 exponent - (is_bfloat ? 127 : 15));
  return (bits & 0x8000) != 0 ? -value : value;
}

// One step of all segments on plain arrays, each in one call.
inline void update_arrays(const UpdateJob& job, std::array<std::uint64_t, kUpdateRoles> width,
                          Arrays& arrays) {
  for (const UpdateSegment& s : job.segments) {
    if (s.begin == s.end) continue;
    const auto at = [&](unsigned role) {
      return arrays.operands[role].data() + s.begin * width[role];
    };
    UpdateArrays call;
    call.n = s.end - s.begin;
    call.param = call.param_out = at(kParam);
    call.grad = at(kGrad);
    if (job.format.has_master()) {
      call.master = call.master_out = reinterpret_cast<float*>(at(kMaster));
    }
    for (unsigned k = 0; k < state_count(s.hyper); ++k) {
      call.state[k] = call.state_out[k] = at(kState + k);
      if (job.format.state != StateFormat::kInt8) continue;
      auto* scales = reinterpret_cast<float*>(arrays.scales[k].data());
      call.scale[k] = call.scale_out[k] = scales + s.begin / kQuantBlock;
    }
    update(s.hyper, job.format, {s.factors.data(), s.factors.size()}, {job.seed, s.parameter, 0},
           call);
  }
}

inline bool same(const Arrays& a, const Arrays& b) {
  return a.operands == b.operands && a.scales == b.scales;
}

}  // namespace offload
