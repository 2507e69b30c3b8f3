// One rule over fp32 arrays, with the vectors of `V` (see rules_simd.h).
#pragma once

#include <cstddef>

#include "optim/read_ahead.h"
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
  // Where the arrays end, n or more, for reading ahead; of the gradient apart, it may be scratch.
  std::size_t length;
  std::size_t grad_length;
};

template <typename V, typename Rule>
struct RuleLoop {
  static constexpr std::size_t kStates = Rule::kStates;

  explicit RuleLoop(const RuleScalars& s)
      : rule(s),
        weight_decay(V::broadcast(s.weight_decay)),
        factors(s.factors),
        factor_count(s.factor_count),
        maximize(s.maximize),
        decays_grad(s.decays_grad) {}

  // Whether the gradient is what the rule is given.
  [[nodiscard]] bool is_plain() const { return factor_count == 0 && !maximize && !decays_grad; }

  // kPlain REQUIRES is_plain().
  template <bool kPlain = false>
  void step(V& p, V g, V* state) const {
    if constexpr (!kPlain) {
      for (std::size_t k = 0; k < factor_count; ++k) g = g * V::broadcast(factors[k]);
      if (maximize) g = V::negate(g);
      if (decays_grad) g = Rule::R::multiply_add(weight_decay, p, g);
    }
    rule.step(p, g, state);
  }

  // The elements [i, i + kLanes).
  void run_vector(const FloatArrays& a, std::size_t i) const {
    V state[kStates + 1];  // no array of none
    V p = V::load(a.param + i);
    for (std::size_t k = 0; k < kStates; ++k) state[k] = V::load(a.state[k] + i);
    step(p, V::load(a.grad + i), state);
    V::store(a.param_out + i, p);
    for (std::size_t k = 0; k < kStates; ++k) V::store(a.state_out[k] + i, state[k]);
  }

  void run(const FloatArrays& a) const {
    constexpr std::size_t kGroup = 4 * V::kLanes;
    constexpr std::size_t kStep = kGroup * sizeof(float);
    const std::size_t size = a.length * sizeof(float);
    std::size_t i = 0;
    for (; a.n - i >= kGroup; i += kGroup) {
      const std::size_t at = i * sizeof(float);
      read_ahead(a.param, at, kStep, size);
      read_ahead(a.grad, at, kStep, a.grad_length * sizeof(float));
      for (std::size_t k = 0; k < kStates; ++k) read_ahead(a.state[k], at, kStep, size);
      for (std::size_t j = 0; j < kGroup; j += V::kLanes) run_vector(a, i + j);
    }
    for (; a.n - i >= V::kLanes; i += V::kLanes) run_vector(a, i);
    const std::size_t rest = a.n - i;
    if (rest == 0) return;
    V state[kStates + 1];
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
  bool maximize;
  bool decays_grad;
};

}  // namespace offload::update_internal
