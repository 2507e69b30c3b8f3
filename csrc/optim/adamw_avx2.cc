// Compiled with -mavx2 -mfma -ffp-contract=off; called only where isa_available(Isa::kAvx2).
#if defined(__x86_64__)

#include <immintrin.h>

#include "optim/adamw_simd.h"

namespace offload::adamw_internal {
namespace {

struct Avx2 {
  static constexpr std::size_t kLanes = 8;

  static Avx2 broadcast(float value) { return {_mm256_set1_ps(value)}; }
  static Avx2 load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static void store(float* to, Avx2 a) { _mm256_storeu_ps(to, a.lanes); }

  static __m256i first(std::size_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Avx2 load_first(const float* from, std::size_t count) {
    return {_mm256_maskload_ps(from, first(count))};
  }
  static void store_first(float* to, Avx2 a, std::size_t count) {
    _mm256_maskstore_ps(to, first(count), a.lanes);
  }

  static Avx2 sqrt(Avx2 a) { return {_mm256_sqrt_ps(a.lanes)}; }
  static Avx2 rsqrt(Avx2 a) { return {_mm256_rsqrt_ps(a.lanes)}; }
  static Avx2 negate(Avx2 a) { return {_mm256_xor_ps(a.lanes, _mm256_set1_ps(-0.0f))}; }
  static Avx2 fma(Avx2 a, Avx2 b, Avx2 c) { return {_mm256_fmadd_ps(a.lanes, b.lanes, c.lanes)}; }
  friend Avx2 operator+(Avx2 a, Avx2 b) { return {_mm256_add_ps(a.lanes, b.lanes)}; }
  friend Avx2 operator-(Avx2 a, Avx2 b) { return {_mm256_sub_ps(a.lanes, b.lanes)}; }
  friend Avx2 operator*(Avx2 a, Avx2 b) { return {_mm256_mul_ps(a.lanes, b.lanes)}; }
  friend Avx2 operator/(Avx2 a, Avx2 b) { return {_mm256_div_ps(a.lanes, b.lanes)}; }

  struct Mask {
    __m256 lanes;
  };
  static Mask between(Avx2 x, Avx2 min, Avx2 max) {
    return {_mm256_and_ps(_mm256_cmp_ps(x.lanes, min.lanes, _CMP_GE_OQ),
                          _mm256_cmp_ps(x.lanes, max.lanes, _CMP_LE_OQ))};
  }
  static bool all(Mask mask) { return _mm256_movemask_ps(mask.lanes) == 0xff; }
  static Avx2 select(Mask mask, Avx2 a, Avx2 b) {
    return {_mm256_blendv_ps(b.lanes, a.lanes, mask.lanes)};
  }

  __m256 lanes;
};

}  // namespace

void adamw_avx2(const Scalars& scalars, const Arrays& arrays) {
  run_simd_adamw<Avx2>(scalars, arrays);
}

}  // namespace offload::adamw_internal

#endif
