// Compiled with -mavx2 -mfma -mf16c -ffp-contract=off; called only where isa_available(Isa::kAvx2).
#if defined(__x86_64__)

#include <immintrin.h>

#include "optim/adafactor_simd.h"
#include "optim/narrow_float.h"

namespace offload::adafactor_internal {
namespace {

using update_internal::kBfloat16Nan;

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
  static Avx2 fma(Avx2 a, Avx2 b, Avx2 c) { return {_mm256_fmadd_ps(a.lanes, b.lanes, c.lanes)}; }
  static Avx2 maximum(Avx2 a, Avx2 b) {
    const __m256 nan = _mm256_cmp_ps(a.lanes, b.lanes, _CMP_UNORD_Q);
    return {_mm256_or_ps(_mm256_max_ps(a.lanes, b.lanes), nan)};
  }
  friend Avx2 operator+(Avx2 a, Avx2 b) { return {_mm256_add_ps(a.lanes, b.lanes)}; }
  friend Avx2 operator-(Avx2 a, Avx2 b) { return {_mm256_sub_ps(a.lanes, b.lanes)}; }
  friend Avx2 operator*(Avx2 a, Avx2 b) { return {_mm256_mul_ps(a.lanes, b.lanes)}; }
  friend Avx2 operator/(Avx2 a, Avx2 b) { return {_mm256_div_ps(a.lanes, b.lanes)}; }

  static __m128i load16(const std::uint16_t* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  }
  static void store16(std::uint16_t* to, __m128i a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), a);
  }
  static Avx2 load_bfloat16(const std::uint16_t* from) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(from)), 16))};
  }
  static void store_bfloat16(std::uint16_t* to, Avx2 a) {
    const __m256i bits = _mm256_castps_si256(a.lanes);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.lanes, a.lanes, _CMP_UNORD_Q));
    const __m256i rounded =
        _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(kBfloat16Nan), nan);
    store16(to, _mm_packus_epi32(_mm256_castsi256_si128(rounded),
                                 _mm256_extracti128_si256(rounded, 1)));
  }
  static Avx2 load_float16(const std::uint16_t* from) { return {_mm256_cvtph_ps(load16(from))}; }
  static void store_float16(std::uint16_t* to, Avx2 a) {
    const __m256 nan = _mm256_cmp_ps(a.lanes, a.lanes, _CMP_UNORD_Q);
    // This NaN's conversion is kFloat16Nan.
    const __m256 quiet = _mm256_blendv_ps(a.lanes, _mm256_set1_ps(__builtin_nanf("")), nan);
    store16(to, _mm256_cvtps_ph(quiet, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  __m256 lanes;
};

}  // namespace

Kernels avx2_kernels() {
  return Loops<Avx2, Avx2>::table();
}

}  // namespace offload::adafactor_internal

#endif
