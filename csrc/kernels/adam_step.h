// Adam and AdamW on one element, and the codes of their states of 8 bits: the operations of
// optim/update_scalar.cc and optim/block_quant.cc in their order, for the host and for a device.
//
// REQUIRES on a device: no contraction (-fmad=false), divisions and square roots correctly rounded,
// denormal numbers kept, and SqrtRule::kIeee: the other square roots are the CPU's alone. Pure.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "kernels/element.h"
#include "optim/aten_rounding.h"
#include "optim/block_quant.h"
#include "optim/rule_scalars.h"
#include "optim/update_rule.h"

namespace offload::kernels {

inline constexpr std::size_t kMaxFactors = 8;

// The fields of RuleScalars that Adam and AdamW without amsgrad use, and the factors themselves.
struct AdamScalars {
  bool fused = false;
  bool fma = false;
  bool maximize = false;
  bool decays_grad = false;
  bool lerp_to_grad = false;
  SqrtRule sqrt = SqrtRule::kIeee;  // where not fused
  float weight_decay = 0;
  float param_decay = 1;
  float lerp_weight = 0;
  float beta2 = 0;
  float one_minus_beta2 = 0;
  float bias_correction2_sqrt = 1;
  float eps = 0;
  float neg_step_size = 0;
  float unscale = 1;  // of the gradient of a 16-bit parameter, in fp32
  std::uint32_t factor_count = 0;
  float factors[kMaxFactors] = {};
};

struct AdamElement {
  float param;
  float exp_avg;
  float exp_avg_sq;
};

OFFLOAD_HD inline float fma_as_aten(const AdamScalars& s, float a, float b, float c) {
  if (s.fused || s.fma) return fmaf(a, b, c);
  const float product = a * b;
  return product + c;
}

OFFLOAD_HD inline float square_root(const AdamScalars& s, float x) {
#ifdef __CUDA_ARCH__
  return sqrtf(x);
#else
  if (s.fused || s.sqrt == SqrtRule::kIeee) return sqrtf(x);
  float root;
  sqrt_by_rule(s.sqrt, &x, &root, 1);
  return root;
#endif
}

// `type` is that of the gradient, to which each product with a factor is rounded.
OFFLOAD_HD inline float scaled_grad(const AdamScalars& s, ElementType type, float g) {
  for (std::uint32_t k = 0; k < s.factor_count; ++k) g = rounded(type, g * s.factors[k]);
  return type == ElementType::kFloat32 || s.unscale == 1.0f ? g : g * s.unscale;
}

OFFLOAD_HD inline void adam_step(const AdamScalars& s, float g, AdamElement& e) {
  if (s.maximize) g = -g;
  if (s.decays_grad) g = fma_as_aten(s, s.weight_decay, e.param, g);
  e.param = e.param * s.param_decay;
  e.exp_avg = fma_as_aten(s, s.lerp_weight, g - e.exp_avg, s.lerp_to_grad ? g : e.exp_avg);
  if (s.fused) {
    e.exp_avg_sq = fmaf(-s.one_minus_beta2, fmaf(-g, g, e.exp_avg_sq), e.exp_avg_sq);
  } else {
    const float kept = e.exp_avg_sq * s.beta2;
    e.exp_avg_sq = fma_as_aten(s, s.one_minus_beta2 * g, g, kept);
  }
  const float root = square_root(s, e.exp_avg_sq);
  const float denominator = (s.fused ? root : root / s.bias_correction2_sqrt) + s.eps;
  const float numerator = s.neg_step_size * e.exp_avg;
  if (s.fused) {
    e.param = fmaf(numerator, 1.0f / denominator, e.param);
  } else {
    const float quotient = numerator / denominator;
    e.param = e.param + quotient;
  }
}

OFFLOAD_HD inline int bit_width(unsigned x) {
#ifdef __CUDA_ARCH__
  return 32 - __clz(static_cast<int>(x));
#else
  return static_cast<int>(std::bit_width(x));
#endif
}

OFFLOAD_HD inline std::uint8_t encode(const update_internal::QuantMap& map, float value,
                                      float inverse) {
  const float z = fmaf(fabsf(value), inverse, update_internal::kQuantOffset);
  std::size_t segment = 0;
  while (segment < update_internal::kThresholds && z >= map.threshold[segment]) ++segment;
  const int m = static_cast<int>(fmaf(map.slope[segment], z, map.intercept[segment]));
  if (!map.is_signed) return static_cast<std::uint8_t>(m);
  const bool negative = std::bit_cast<std::uint32_t>(value) >> 31 != 0;
  return static_cast<std::uint8_t>(negative ? (m < 127 ? m : 127) : -m);
}

OFFLOAD_HD inline float decode(const update_internal::QuantMap& map, std::uint8_t code,
                               float scale) {
  const int t = map.is_signed ? static_cast<std::int8_t>(code) : code;
  const auto m = static_cast<unsigned>(t < 0 ? -t : t);
  float slope = 0.0f;
  float intercept = 0.0f;
  if (m == (map.is_signed ? 128u : 1u)) {
    intercept = 1.0f;
  } else if (m != 0) {
    const int decade = bit_width(m) - (map.is_signed ? 1 : 2);
    slope = map.value_slope[decade];
    intercept = map.value_intercept[decade];
  }
  const float value = fmaf(slope * scale, static_cast<float>(m), intercept * scale);
  return map.is_signed && t > 0 ? -value : value;
}

// What a block whose largest magnitude has these bits is scaled by: zero and NaN say that all of
// its codes are zero.
OFFLOAD_HD inline float block_scale(std::uint32_t largest_bits) {
  return update_internal::block_scale(largest_bits);
}

OFFLOAD_HD inline std::uint8_t encode_scaled(const update_internal::QuantMap& map, float value,
                                             float scale) {
  return scale > 0.0f ? encode(map, value, 1.0f / scale) : std::uint8_t{0};
}

}  // namespace offload::kernels
