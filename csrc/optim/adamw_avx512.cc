// Compiled with -mavx512{f,vl,dq,bw} -mfma -ffp-contract=off; called only where
// isa_available(Isa::kAvx512).
#if defined(__x86_64__)

// GCC 12 warns about the deliberately undefined operands inside its own AVX-512 header (PR 105593).
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include "optim/adamw_simd.h"

namespace offload::adamw_internal {
namespace {

struct Avx512 {
  static constexpr std::size_t kLanes = 16;

  static Avx512 broadcast(float value) { return {_mm512_set1_ps(value)}; }
  static Avx512 load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static void store(float* to, Avx512 a) { _mm512_storeu_ps(to, a.lanes); }

  static __mmask16 first(std::size_t count) { return static_cast<__mmask16>((1u << count) - 1u); }
  static Avx512 load_first(const float* from, std::size_t count) {
    return {_mm512_maskz_loadu_ps(first(count), from)};
  }
  static void store_first(float* to, Avx512 a, std::size_t count) {
    _mm512_mask_storeu_ps(to, first(count), a.lanes);
  }

  static Avx512 sqrt(Avx512 a) { return {_mm512_sqrt_ps(a.lanes)}; }
  static Avx512 rsqrt14(Avx512 a) { return {_mm512_rsqrt14_ps(a.lanes)}; }
  // There is no RSQRTPS on 512 bits.
  static Avx512 rsqrt(Avx512 a) {
    const __m256 low = _mm256_rsqrt_ps(_mm512_castps512_ps256(a.lanes));
    const __m256 high = _mm256_rsqrt_ps(_mm512_extractf32x8_ps(a.lanes, 1));
    return {_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1)};
  }
  static Avx512 negate(Avx512 a) { return {_mm512_xor_ps(a.lanes, _mm512_set1_ps(-0.0f))}; }
  static Avx512 fma(Avx512 a, Avx512 b, Avx512 c) {
    return {_mm512_fmadd_ps(a.lanes, b.lanes, c.lanes)};
  }
  friend Avx512 operator+(Avx512 a, Avx512 b) { return {_mm512_add_ps(a.lanes, b.lanes)}; }
  friend Avx512 operator-(Avx512 a, Avx512 b) { return {_mm512_sub_ps(a.lanes, b.lanes)}; }
  friend Avx512 operator*(Avx512 a, Avx512 b) { return {_mm512_mul_ps(a.lanes, b.lanes)}; }
  friend Avx512 operator/(Avx512 a, Avx512 b) { return {_mm512_div_ps(a.lanes, b.lanes)}; }

  using Mask = __mmask16;
  static Mask between(Avx512 x, Avx512 min, Avx512 max) {
    return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(x.lanes, min.lanes, _CMP_GE_OQ), x.lanes,
                                   max.lanes, _CMP_LE_OQ);
  }
  static bool all(Mask mask) { return mask == 0xffff; }
  static Avx512 select(Mask mask, Avx512 a, Avx512 b) {
    return {_mm512_mask_blend_ps(mask, b.lanes, a.lanes)};
  }

  __m512 lanes;
};

}  // namespace

void adamw_avx512(const Scalars& scalars, const Arrays& arrays) {
  run_simd_adamw<Avx512>(scalars, arrays);
}

}  // namespace offload::adamw_internal

#endif
