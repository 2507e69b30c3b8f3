// The reference of sqrt_simd.h, one element at a time. Compiled with -ffp-contract=off.
#include "optim/aten_rounding.h"

#include <cmath>

#include "base/cpu_features.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace offload {
namespace {

#if defined(__x86_64__)

bool rsqrt_usable(float x) {
  return x >= 0x1p-126f && x <= 0x1.ffep127f;
}

float sqrt_rsqrt(float x) {
  if (!rsqrt_usable(x)) return std::sqrt(x);
  const float y = _mm_cvtss_f32(_mm_rsqrt_ss(_mm_set_ss(x)));
  const float s0 = x * y;
  const float h0 = 0.5f * y;
  const float e = 0.5f - s0 * h0;
  const float s1 = s0 * e + s0;
  const float h1 = h0 * e + h0;
  const float residual = x - s1 * s1;
  return residual * h1 + s1;
}

float sqrt_rsqrt_fma(float x) {
  if (!rsqrt_usable(x)) return std::sqrt(x);
  const float y = _mm_cvtss_f32(_mm_rsqrt_ss(_mm_set_ss(x)));
  const float s0 = x * y;
  const float h0 = 0.5f * y;
  const float e = std::fma(-h0, s0, 0.5f);
  const float s1 = std::fma(s0, e, s0);
  const float h1 = std::fma(h0, e, h0);
  const float residual = std::fma(-s1, s1, x);
  return std::fma(residual, h1, s1);
}

[[gnu::target("avx512f")]] float rsqrt14(float x) {
  const __m128 lanes = _mm_set_ss(x);
  return _mm_cvtss_f32(_mm_rsqrt14_ss(lanes, lanes));
}

float sqrt_rsqrt14_fma(float x) {
  if (!(x > 0.0f && x <= 0x1.fffffep127f)) return std::sqrt(x);
  const float y = rsqrt14(x);
  const float s = x * y;
  const float h = 0.5f * y;
  if (y <= 0x1p39f) return std::fma(h, std::fma(-s, s, x), s);
  const float scaled_s = s * 0x1p39f;
  const float residual = std::fma(-scaled_s, scaled_s, x * 0x1p78f);
  return std::fma(h * 0x1p-78f, residual, s);
}

#endif

float sqrt_ieee(float x) {
  return std::sqrt(x);
}

using SqrtFn = float (*)(float);

SqrtFn sqrt_function(SqrtRule rule) {
#if defined(__x86_64__)
  if (rule == SqrtRule::kRsqrt) return sqrt_rsqrt;
  if (rule == SqrtRule::kRsqrtFma) return sqrt_rsqrt_fma;
  if (rule == SqrtRule::kRsqrt14Fma) return sqrt_rsqrt14_fma;
#else
  static_cast<void>(rule);
#endif
  return sqrt_ieee;
}

}  // namespace

const char* sqrt_rule_name(SqrtRule rule) {
  switch (rule) {
    case SqrtRule::kIeee:
      return "ieee";
    case SqrtRule::kRsqrt:
      return "rsqrt";
    case SqrtRule::kRsqrtFma:
      return "rsqrt-fma";
    case SqrtRule::kRsqrt14Fma:
      return "rsqrt14-fma";
  }
  return "unknown";
}

bool sqrt_rule_available(Isa isa, SqrtRule rule) {
  if (!isa_available(isa)) return false;
  if (rule == SqrtRule::kIeee) return true;
#if defined(__x86_64__)
  return rule != SqrtRule::kRsqrt14Fma || (isa != Isa::kAvx2 && cpu_features().avx512);
#else
  return false;
#endif
}

void sqrt_by_rule(SqrtRule rule, const float* in, float* out, std::size_t n) {
  const SqrtFn sqrt = sqrt_function(rule);
  for (std::size_t i = 0; i < n; ++i) out[i] = sqrt(in[i]);
}

}  // namespace offload
