// The update rules on vectors; update_scalar.cc spells out what they compute.
//
// `V` wraps a vector register and must have internal linkage, so that code for one instruction set
// is not merged with another's: V::kLanes, V::broadcast, load, store, load_first, store_first (the
// first `count` < kLanes lanes; no other byte of memory is touched, other lanes are zero),
// operators + - * /, negate, correctly rounded sqrt, fma(a, b, c) and fnma(a, b, c) = c - a * b,
// which round once, maximum(a, b) (NaN if either is), sign (of NaN and zeros: zero), a type Mask of
// lanes, between(x, min, max) (false for NaN), all(mask) and select(mask, a, b). On x86-64 also
// rsqrt (RSQRTPS), and where there is an instruction for it rsqrt14. Thread-safe.
#pragma once

#include <cstddef>

#include "optim/rounding_simd.h"
#include "optim/rule_scalars.h"

namespace offload::update_internal {

template <typename V, typename R>
struct Lerp {
  explicit Lerp(const RuleScalars& s)
      : weight(V::broadcast(s.lerp_weight)), to_grad(s.lerp_to_grad) {}
  // kPlain REQUIRES is_plain().
  template <bool kPlain>
  V apply(V state, V g) const {
    if constexpr (kPlain) return R::multiply_add(weight, g - state, state);
    return R::multiply_add(weight, g - state, to_grad ? g : state);
  }
  [[nodiscard]] bool is_plain() const { return !to_grad; }
  V weight;
  bool to_grad;
};

// Each rule has kStates states, is_unsigned(k) of them (see state_is_unsigned()) and
// step<kPlain>(p, g, states), which updates p and the states in place. It is given the gradient
// after maximize and the decay that is added to it. kPlain, which REQUIRES is_plain(), leaves out
// what hardly anybody asks for. `Rounding` is one of rounding_simd.h.

template <typename V, typename Rounding, std::size_t kStateCount>
struct AdamRule {
  using R = Rounding;
  static constexpr std::size_t kStates = kStateCount;  // 3 with amsgrad
  static constexpr bool is_unsigned(std::size_t k) { return k >= 1; }
  explicit AdamRule(const RuleScalars& s)
      : param_decay(V::broadcast(s.param_decay)),
        average(s),
        square_average(s),
        denominator(s),
        quotient(s),
        neg_step_size(V::broadcast(s.neg_step_size)) {}
  [[nodiscard]] bool is_plain() const { return average.is_plain(); }
  template <bool kPlain>
  void step(V& p, V g, V* state) const {
    state[0] = average.template apply<kPlain>(state[0], g);
    state[1] = square_average(state[1], g);
    V square = state[1];
    if constexpr (kStates == 3) square = state[2] = V::maximum(state[2], square);
    p = quotient.add_to(p * param_decay, neg_step_size * state[0], denominator(square));
  }
  V param_decay;
  Lerp<V, R> average;
  typename R::SquareAverage square_average;
  typename R::Denominator denominator;
  typename R::Quotient quotient;
  V neg_step_size;
};

template <typename V, typename Rounding, std::size_t kStateCount>
struct SgdRule {
  using R = Rounding;
  static constexpr std::size_t kStates = kStateCount;  // 1 with momentum
  static constexpr bool is_unsigned(std::size_t) { return false; }
  explicit SgdRule(const RuleScalars& s)
      : momentum(V::broadcast(s.momentum)),
        added(V::broadcast(s.one_minus_dampening)),
        neg_step_size(V::broadcast(s.neg_step_size)),
        nesterov(s.nesterov),
        first(s.first) {}
  [[nodiscard]] bool is_plain() const { return true; }
  template <bool kPlain>
  void step(V& p, V g, V* state) const {
    if constexpr (kStates == 1) {
      state[0] = first ? g : R::multiply_add(added, g, state[0] * momentum);
      g = nesterov ? R::multiply_add(momentum, state[0], g) : state[0];
    }
    p = R::multiply_add(neg_step_size, g, p);
  }
  V momentum;
  V added;
  V neg_step_size;
  bool nesterov;
  bool first;
};

template <typename V, typename Rounding, std::size_t kStateCount>
struct AdagradRule {
  using R = Rounding;
  static constexpr std::size_t kStates = kStateCount;
  static constexpr bool is_unsigned(std::size_t k) { return k == 0; }
  explicit AdagradRule(const RuleScalars& s)
      : eps(V::broadcast(s.eps)), quotient(s), neg_step_size(V::broadcast(s.neg_step_size)) {}
  [[nodiscard]] bool is_plain() const { return true; }
  template <bool kPlain>
  void step(V& p, V g, V* state) const {
    state[0] = R::multiply_add(g, g, state[0]);
    p = quotient.add_to(p, neg_step_size * g, R::sqrt(state[0]) + eps);
  }
  V eps;
  typename R::Quotient quotient;
  V neg_step_size;
};

template <typename V, typename Rounding, std::size_t kStateCount>
struct RmspropRule {
  using R = Rounding;
  static constexpr std::size_t kStates = kStateCount;  // 1, and one each by momentum and centered
  static constexpr bool is_unsigned(std::size_t k) { return k == 0; }
  explicit RmspropRule(const RuleScalars& s)
      : square_average(s),
        average(s),
        eps(V::broadcast(s.eps)),
        quotient(s),
        momentum(V::broadcast(s.momentum)),
        neg_step_size(V::broadcast(s.neg_step_size)),
        has_momentum(s.has_momentum),
        centered(s.centered) {}
  [[nodiscard]] bool is_plain() const { return average.is_plain(); }
  template <bool kPlain>
  void step(V& p, V g, V* state) const {
    state[0] = square_average(state[0], g);
    V variance = state[0];
    if constexpr (kStates > 1) {
      if (centered) {
        V& mean = state[kStates - 1];
        mean = average.template apply<kPlain>(mean, g);
        variance = R::multiply_add(V::negate(mean), mean, variance);
      }
    }
    const V denominator = R::sqrt(variance) + eps;
    if constexpr (kStates > 1) {
      if (has_momentum) {
        state[1] = quotient.add_to(state[1] * momentum, g, denominator);
        p = R::multiply_add(neg_step_size, state[1], p);
        return;
      }
    }
    p = quotient.add_to(p, neg_step_size * g, denominator);
  }
  typename R::SquareAverage square_average;
  Lerp<V, R> average;
  V eps;
  typename R::Quotient quotient;
  V momentum;
  V neg_step_size;
  bool has_momentum;
  bool centered;
};

template <typename V, typename Rounding, std::size_t kStateCount>
struct LionRule {
  using R = Rounding;
  static constexpr std::size_t kStates = kStateCount;
  static constexpr bool is_unsigned(std::size_t) { return false; }
  explicit LionRule(const RuleScalars& s)
      : param_decay(V::broadcast(s.param_decay)),
        beta1(V::broadcast(s.beta1)),
        one_minus_beta1(V::broadcast(s.one_minus_beta1)),
        beta2(V::broadcast(s.beta2)),
        one_minus_beta2(V::broadcast(s.one_minus_beta2)),
        neg_step_size(V::broadcast(s.neg_step_size)) {}
  [[nodiscard]] bool is_plain() const { return true; }
  template <bool kPlain>
  void step(V& p, V g, V* state) const {
    const V direction = state[0] * beta1 + g * one_minus_beta1;
    p = R::multiply_add(neg_step_size, V::sign(direction), p * param_decay);
    state[0] = R::multiply_add(one_minus_beta2, g, state[0] * beta2);
  }
  V param_decay;
  V beta1;
  V one_minus_beta1;
  V beta2;
  V one_minus_beta2;
  V neg_step_size;
};

}  // namespace offload::update_internal
