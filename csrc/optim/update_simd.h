// An update() call on the vectors of `V`. An fp32 parameter is updated where it is; of a 16-bit one
// the gradient is widened tile by tile to scratch that stays in the first cache, and the parameter
// rounded from its master while that is there too.
//
// Beside what rules_simd.h and narrow_loop_simd.h ask of `V`, for arrays of any alignment:
//   load_float16(from)                           kLanes elements, widened
//   store_bfloat16, store_float16(to, v)         to nearest even; NaN becomes narrow_float.h's
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "optim/rule_kernels.h"
#include "optim/select_rule_simd.h"

namespace offload::update_internal {

inline constexpr std::size_t kTile = 1024;
static_assert(kTile % kQuantBlock == 0);

template <typename V>
struct SimdUpdate {
  static const std::uint16_t* halves(const void* array, std::size_t first) {
    return static_cast<const std::uint16_t*>(array) + first;
  }
  static std::uint16_t* halves(void* array, std::size_t first) {
    return static_cast<std::uint16_t*>(array) + first;
  }

  template <ElementType kType>
  static V load16(const std::uint16_t* from) {
    if constexpr (kType == ElementType::kBfloat16) return V::load_bfloat16(from);
    return V::load_float16(from);
  }
  template <ElementType kType>
  static void store16(std::uint16_t* to, V value) {
    if constexpr (kType == ElementType::kBfloat16) return V::store_bfloat16(to, value);
    return V::store_float16(to, value);
  }

  // Multiplied by the factors, each product rounded to the gradient's type.
  template <ElementType kType>
  static V widen_grad(const RuleScalars& s, const std::uint16_t* from) {
    V g = load16<kType>(from);
    for (std::size_t k = 0; k < s.factor_count; ++k) {
      std::uint16_t rounded[V::kLanes];
      store16<kType>(rounded, g * V::broadcast(s.factors[k]));
      g = load16<kType>(rounded);
    }
    return g;
  }

  // `to` has room for whole vectors.
  template <ElementType kType>
  static void widen_grads(const RuleScalars& s, const std::uint16_t* from, float* to,
                          std::size_t n) {
    std::size_t i = 0;
    for (; n - i >= V::kLanes; i += V::kLanes) {
      prefetch<V::kLanes * sizeof(from[0])>(from + i, s.prefetch_bytes);
      V::store(to + i, widen_grad<kType>(s, from + i));
    }
    if (i == n) return;
    std::uint16_t padded[V::kLanes] = {};
    std::memcpy(padded, from + i, (n - i) * sizeof(padded[0]));
    V::store(to + i, widen_grad<kType>(s, padded));
  }

  template <ElementType kType>
  static void narrow_params(const float* from, std::uint16_t* to, std::size_t n) {
    std::size_t i = 0;
    for (; n - i >= V::kLanes; i += V::kLanes) store16<kType>(to + i, V::load(from + i));
    if (i == n) return;
    std::uint16_t padded[V::kLanes];
    store16<kType>(padded, V::load_first(from + i, n - i));
    std::memcpy(to + i, padded, (n - i) * sizeof(padded[0]));
  }

  // The one that the call's format of states needs.
  struct Loops {
    FloatLoop fp32 = nullptr;
    NarrowLoopFn narrow = nullptr;
  };

  // The fp32 parameter at `param` and the states from element `first` on.
  struct Run {
    const float* param;
    float* param_out;
    const float* grad;
    std::size_t first;
    std::size_t n;
  };

  static void run_fp32_states(const UpdateCall& call, const RuleScalars& scalars,
                              const Loops& loops, const Run& run) {
    FloatArrays f = {};
    f.n = run.n;
    f.param = run.param;
    f.param_out = run.param_out;
    f.grad = run.grad;
    for (std::size_t k = 0; k < call.states; ++k) {
      f.state[k] = static_cast<const float*>(call.arrays.state[k]) + run.first;
      f.state_out[k] = static_cast<float*>(call.arrays.state_out[k]) + run.first;
    }
    loops.fp32(scalars, f);
  }

  static NarrowArrays narrow_arrays(const UpdateCall& call, const Run& run) {
    const UpdateArrays& a = call.arrays;
    const std::size_t bytes = element_bytes(call.format.state);
    NarrowArrays out = {};
    out.n = run.n;
    out.param = run.param;
    out.param_out = run.param_out;
    out.grad = run.grad;
    for (std::size_t k = 0; k < call.states; ++k) {
      out.state[k] = static_cast<const std::byte*>(a.state[k]) + run.first * bytes;
      out.state_out[k] = static_cast<std::byte*>(a.state_out[k]) + run.first * bytes;
      if (call.format.state != StateFormat::kInt8) continue;
      out.scale[k] = a.scale[k] + run.first / kQuantBlock;
      out.scale_out[k] = a.scale_out[k] + run.first / kQuantBlock;
    }
    const std::uint64_t position = call.seed.first + run.first;
    out.position = static_cast<std::uint32_t>(position);
    for (std::size_t k = 0; k < call.states; k += 2) {
      out.key[k / 2] =
          rounding_key(call.seed, call.step, k / 2, static_cast<std::uint32_t>(position >> 32));
    }
    return out;
  }

  // The elements after the last whole block, by way of a padded copy.
  static void run_rest(const UpdateCall& call, const RuleScalars& scalars, const Loops& loops,
                       const Run& run) {
    const std::size_t bytes = element_bytes(call.format.state);
    float param[kQuantBlock] = {}, grad[kQuantBlock] = {};
    alignas(4) std::byte state[kMaxStates][kQuantBlock * sizeof(std::uint16_t)] = {};
    std::memcpy(param, run.param, run.n * sizeof(float));
    std::memcpy(grad, run.grad, run.n * sizeof(float));
    NarrowArrays a = narrow_arrays(call, run);
    NarrowArrays padded = a;
    padded.param = padded.param_out = param;
    padded.grad = grad;
    for (std::size_t k = 0; k < call.states; ++k) {
      std::memcpy(state[k], a.state[k], run.n * bytes);
      padded.state[k] = padded.state_out[k] = state[k];
    }
    loops.narrow(scalars, padded);
    std::memcpy(run.param_out, param, run.n * sizeof(float));
    for (std::size_t k = 0; k < call.states; ++k) {
      std::memcpy(a.state_out[k], state[k], run.n * bytes);
    }
  }

  static void run_narrow_states(const UpdateCall& call, const RuleScalars& scalars,
                                const Loops& loops, Run run) {
    while (run.n > 0) {
      Run part = run;
      // The high half of the position is part of the key: it is to be the same in all of a part.
      const std::uint64_t low = (call.seed.first + run.first) & 0xffffffff;
      part.n =
          static_cast<std::size_t>(std::min<std::uint64_t>(run.n, (std::uint64_t{1} << 32) - low));
      if (part.n >= kQuantBlock) {
        part.n = part.n / kQuantBlock * kQuantBlock;
        loops.narrow(scalars, narrow_arrays(call, part));
      } else {
        run_rest(call, scalars, loops, part);
      }
      run.param += part.n;
      run.param_out += part.n;
      run.grad += part.n;
      run.first += part.n;
      run.n -= part.n;
    }
  }

  static void run_part(const UpdateCall& call, const RuleScalars& scalars, const Loops& loops,
                       const Run& run) {
    if (call.format.state == StateFormat::kFloat32) {
      run_fp32_states(call, scalars, loops, run);
    } else {
      run_narrow_states(call, scalars, loops, run);
    }
  }

  template <ElementType kType>
  static void run_with_master(const UpdateCall& call, const Loops& loops) {
    const UpdateArrays& a = call.arrays;
    alignas(64) float grad[kTile];
    RuleScalars scalars = call.scalars;
    scalars.factors = &call.scalars.unscale;
    scalars.factor_count = call.scalars.unscale == 1.0f ? 0 : 1;
    for (std::size_t first = 0; first < a.n; first += kTile) {
      const std::size_t n = std::min(kTile, a.n - first);
      widen_grads<kType>(call.scalars, halves(a.grad, first), grad, n);
      run_part(call, scalars, loops, {a.master + first, a.master_out + first, grad, first, n});
      narrow_params<kType>(a.master_out + first, halves(a.param_out, first), n);
    }
  }

  static void run(const UpdateCall& call) {
    Loops loops;
    if (call.format.state == StateFormat::kFloat32) {
      loops.fp32 = select_float_loop<V>(call.scalars, call.states);
    } else {
      loops.narrow = select_narrow_loop<V>(call.scalars, call.states, call.format.state);
    }
    const UpdateArrays& a = call.arrays;
    switch (call.format.param) {
      case ElementType::kFloat32:
        return run_part(call, call.scalars, loops,
                        {static_cast<const float*>(a.param), static_cast<float*>(a.param_out),
                         static_cast<const float*>(a.grad), 0, a.n});
      case ElementType::kBfloat16:
        return run_with_master<ElementType::kBfloat16>(call, loops);
      case ElementType::kFloat16:
        return run_with_master<ElementType::kFloat16>(call, loops);
    }
  }
};

}  // namespace offload::update_internal
