// How the rules of rules_simd.h round, on the vectors of `V` (see there): as ATen does, or as is
// fastest. Pure: thread-safe.
#pragma once

#include "optim/rule_scalars.h"
#include "optim/sqrt_simd.h"

namespace offload::update_internal {

// sqrt(x) / divisor. A division takes the divider for many cycles, and the rule has another one;
// by a divisor known beforehand it is one multiplication and two fused multiply-adds, the same bits
// as long as nothing overflows or underflows (Brisebarre, Muller, Raina, "Accelerating correctly
// rounded floating-point division when the divisor is known in advance", 2004).
template <typename V, SqrtRule kSqrt>
struct SqrtOverConstant {
  explicit SqrtOverConstant(float by)
      : divisor(V::broadcast(by)),
        inverse(V::broadcast(1.0f / by)),
        plain(by >= 0x1p-40f && by <= 1.0f) {}
  V operator()(V x) const {
    using aten_rounding_internal::kPlainMax;
    using aten_rounding_internal::kPlainMin;
    if (plain && V::all(V::between(x, V::broadcast(kPlainMin), V::broadcast(kPlainMax)))) {
      const V root = aten_rounding_internal::plain_sqrt_by<V, kSqrt>(x);
      const V quotient = root * inverse;
      const V residual = V::fnma(quotient, divisor, root);
      return V::fma(residual, inverse, quotient);
    }
    return aten_rounding_internal::sqrt_by<V, kSqrt>(x) / divisor;
  }
  V divisor;
  V inverse;
  bool plain;
};

// How ATen and MKL round (see AtenRounding): for what is fp32 throughout.
template <typename V, bool kFma, SqrtRule kSqrt>
struct LikeAten {
  static V multiply_add(V a, V b, V c) {
    if constexpr (kFma) return V::fma(a, b, c);
    return a * b + c;
  }
  static V sqrt(V x) { return aten_rounding_internal::sqrt_by<V, kSqrt>(x); }
  struct Quotient {
    explicit Quotient(const RuleScalars&) {}
    V add_to(V c, V a, V b) const { return c + a / b; }
  };

  struct SquareAverage {
    explicit SquareAverage(const RuleScalars& s)
        : kept(V::broadcast(s.beta2)), added(V::broadcast(s.one_minus_beta2)) {}
    V operator()(V state, V g) const { return multiply_add(added * g, g, state * kept); }
    V kept;
    V added;
  };

  // Adam's, of its average of squares.
  struct Denominator {
    explicit Denominator(const RuleScalars& s)
        : root(s.bias_correction2_sqrt), eps(V::broadcast(s.eps)) {}
    V operator()(V square) const { return root(square) + eps; }
    SqrtOverConstant<V, kSqrt> root;
    V eps;
  };
};

// For narrow states, whose steps need not have torch's bits: see rule_scalars.h for the operations.
template <typename V>
struct Fused {
  static V multiply_add(V a, V b, V c) { return V::fma(a, b, c); }
  static V sqrt(V x) { return V::sqrt(x); }

  // Two ways to one result. The estimate REQUIRES b in [2^-60, 2^65], infinite or NaN.
  struct Quotient {
    explicit Quotient(const RuleScalars& s) : by_divider(s.by_divider) {}
    V add_to(V c, V a, V b) const {
      if constexpr (requires { V::reciprocal_by_estimate(b); }) {
        if (!by_divider) return V::fma(a, V::reciprocal_by_estimate(b), c);
      }
      return V::fma(a, V::broadcast(1.0f) / b, c);
    }
    bool by_divider;
  };

  struct SquareAverage {
    explicit SquareAverage(const RuleScalars& s) : weight(V::broadcast(s.one_minus_beta2)) {}
    V operator()(V state, V g) const { return V::fnma(weight, V::fnma(g, g, state), state); }
    V weight;
  };

  struct Denominator {
    explicit Denominator(const RuleScalars& s) : eps(V::broadcast(s.eps)) {}
    V operator()(V square) const { return V::sqrt(square) + eps; }
    V eps;
  };
};

}  // namespace offload::update_internal
