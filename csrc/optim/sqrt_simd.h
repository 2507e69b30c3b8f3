// The square roots of SqrtRule in terms of a vector wrapper `V` (see rules_simd.h, which says what
// V must provide and why it must have internal linkage).
//
// Each line is one rounded operation, in the order of the implementation it follows; files that
// include this need -ffp-contract=off. Arguments for which the estimate is not usable (zeros,
// infinities, NaN, negative numbers, and for RSQRTPS denormals and the last binade's end) get the
// correctly rounded root. Pure: thread-safe.
#pragma once

#include "optim/aten_rounding.h"

namespace offload::aten_rounding_internal {

inline constexpr float kMinNormal = 0x1p-126f;
inline constexpr float kRsqrtMax = 0x1.ffep127f;
inline constexpr float kMinDenormal = 0x1p-149f;
inline constexpr float kMaxFinite = 0x1.fffffep127f;
// Between these every rule's estimate is usable and nothing is scaled.
inline constexpr float kPlainMin = 0x1p-77f;
inline constexpr float kPlainMax = 0x1p100f;

template <typename V>
V replace_outside(V root, V x, float min, float max) {
  const typename V::Mask inside = V::between(x, V::broadcast(min), V::broadcast(max));
  return V::all(inside) ? root : V::select(inside, root, V::sqrt(x));
}

template <typename V>
V refine_rsqrt(V x) {
  const V half = V::broadcast(0.5f);
  const V y = V::rsqrt(x);
  const V s0 = x * y;
  const V h0 = half * y;
  const V e = half - s0 * h0;
  const V s1 = s0 * e + s0;
  const V h1 = h0 * e + h0;
  const V residual = x - s1 * s1;
  return residual * h1 + s1;
}

template <typename V>
V refine_rsqrt_fma(V x) {
  const V half = V::broadcast(0.5f);
  const V y = V::rsqrt(x);
  const V s0 = x * y;
  const V h0 = half * y;
  const V e = V::fnma(h0, s0, half);
  const V s1 = V::fma(s0, e, s0);
  const V h1 = V::fma(h0, e, h0);
  const V residual = V::fnma(s1, s1, x);
  return V::fma(residual, h1, s1);
}

template <typename V>
V refine_rsqrt14_fma(V x) {
  const V y = V::rsqrt14(x);
  const V s = x * y;
  const V h = y * V::broadcast(0.5f);
  return V::fma(h, V::fnma(s, s, x), s);
}

// Below 2^-78 the residual would underflow: it is computed 2^78 times too large there, and its
// factor h as much too small.
template <typename V>
V sqrt_rsqrt14_fma(V x) {
  const V y = V::rsqrt14(x);
  const V s = x * y;
  const V h = y * V::broadcast(0.5f);
  const typename V::Mask unscaled = V::between(y, V::broadcast(0.0f), V::broadcast(0x1p39f));
  const V scaled_x = V::select(unscaled, x, x * V::broadcast(0x1p78f));
  const V scaled_s = V::select(unscaled, s, s * V::broadcast(0x1p39f));
  const V scaled_h = V::select(unscaled, h, h * V::broadcast(0x1p-78f));
  const V residual = V::fnma(scaled_s, scaled_s, scaled_x);
  return replace_outside(V::fma(scaled_h, residual, s), x, kMinDenormal, kMaxFinite);
}

// REQUIRES: every lane in [kPlainMin, kPlainMax].
template <typename V, SqrtRule kRule>
V plain_sqrt_by(V x) {
  if constexpr (kRule == SqrtRule::kRsqrt) {
    return refine_rsqrt(x);
  } else if constexpr (kRule == SqrtRule::kRsqrtFma) {
    return refine_rsqrt_fma(x);
  } else if constexpr (kRule == SqrtRule::kRsqrt14Fma) {
    return refine_rsqrt14_fma(x);
  } else {
    return V::sqrt(x);
  }
}

template <typename V, SqrtRule kRule>
V sqrt_by(V x) {
  if constexpr (kRule == SqrtRule::kRsqrt) {
    return replace_outside(refine_rsqrt(x), x, kMinNormal, kRsqrtMax);
  } else if constexpr (kRule == SqrtRule::kRsqrtFma) {
    return replace_outside(refine_rsqrt_fma(x), x, kMinNormal, kRsqrtMax);
  } else if constexpr (kRule == SqrtRule::kRsqrt14Fma) {
    return sqrt_rsqrt14_fma(x);
  } else {
    return V::sqrt(x);
  }
}

}  // namespace offload::aten_rounding_internal
