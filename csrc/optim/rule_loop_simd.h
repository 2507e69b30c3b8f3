// One rule over fp32 arrays, with the vectors of `V` (see rules_simd.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "optim/rule_scalars.h"
#include "optim/rules_simd.h"

namespace offload::update_internal {

// Element i of each belongs together; an output equals its input or overlaps nothing.
struct FloatArrays {
  const float* param;
  const float* grad;
  const float* state[kMaxStates];
  float* param_out;
  float* state_out[kMaxStates];
  std::size_t n;
};

inline constexpr std::size_t kLineBytes = 64;

// Requests the lines of the kSize bytes that lie `ahead` bytes after `from`. They may lie past the
// end of the array: it is a hint and is not dereferenced. (Always inlined: see CONTRIBUTING.md on
// instruction sets.)
template <std::size_t kSize>
[[gnu::always_inline]] inline void prefetch(const void* from, std::size_t ahead) {
  const auto address = reinterpret_cast<std::uintptr_t>(from) + ahead;
  for (std::size_t line = 0; line < kSize; line += kLineBytes) {
    __builtin_prefetch(reinterpret_cast<const void*>(address + line));
  }
}

template <typename V, typename Rule>
struct RuleLoop {
  static constexpr std::size_t kStates = Rule::kStates;

  explicit RuleLoop(const RuleScalars& s)
      : rule(s),
        weight_decay(V::broadcast(s.weight_decay)),
        factors(s.factors),
        factor_count(s.factor_count),
        prefetch_bytes(s.prefetch_bytes),
        maximize(s.maximize),
        decays_grad(s.decays_grad) {}

  // Whether the gradient is what the rule is given, and the rule is plain.
  [[nodiscard]] bool is_plain() const {
    return factor_count == 0 && !maximize && !decays_grad && rule.is_plain();
  }

  // kPlain REQUIRES is_plain().
  template <bool kPlain = false>
  void step(V& p, V g, V* state) const {
    if constexpr (!kPlain) {
      for (std::size_t k = 0; k < factor_count; ++k) g = g * V::broadcast(factors[k]);
      if (maximize) g = V::negate(g);
      if (decays_grad) g = Rule::R::multiply_add(weight_decay, p, g);
    }
    rule.template step<kPlain>(p, g, state);
  }

  void run(const FloatArrays& a) const {
    constexpr std::size_t kBytes = V::kLanes * sizeof(float);
    const std::size_t ahead = prefetch_bytes;
    std::size_t i = 0;
    V state[kStates + 1];  // no array of none
    for (; a.n - i >= V::kLanes; i += V::kLanes) {
      prefetch<kBytes>(a.param + i, ahead);
      prefetch<kBytes>(a.grad + i, ahead);
      V p = V::load(a.param + i);
      for (std::size_t k = 0; k < kStates; ++k) {
        prefetch<kBytes>(a.state[k] + i, ahead);
        state[k] = V::load(a.state[k] + i);
      }
      step(p, V::load(a.grad + i), state);
      V::store(a.param_out + i, p);
      for (std::size_t k = 0; k < kStates; ++k) V::store(a.state_out[k] + i, state[k]);
    }
    const std::size_t rest = a.n - i;
    if (rest == 0) return;
    V p = V::load_first(a.param + i, rest);
    for (std::size_t k = 0; k < kStates; ++k) state[k] = V::load_first(a.state[k] + i, rest);
    step(p, V::load_first(a.grad + i, rest), state);
    V::store_first(a.param_out + i, p, rest);
    for (std::size_t k = 0; k < kStates; ++k) V::store_first(a.state_out[k] + i, state[k], rest);
  }

  Rule rule;
  V weight_decay;
  const float* factors;
  std::size_t factor_count;
  std::size_t prefetch_bytes;
  bool maximize;
  bool decays_grad;
};

}  // namespace offload::update_internal
