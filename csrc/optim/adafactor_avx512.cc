// Compiled with -mavx512{f,vl,dq,bw} -mfma -mf16c -ffp-contract=off; called only where
// isa_available(Isa::kAvx512).
#if defined(__x86_64__)

// GCC 12 warns about the deliberately undefined operands inside its own AVX-512 header (PR 105593).
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include "optim/adafactor_simd.h"
#include "optim/narrow_float.h"

namespace offload::adafactor_internal {
namespace {

using update_internal::kBfloat16Nan;

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
  static Avx512 fma(Avx512 a, Avx512 b, Avx512 c) {
    return {_mm512_fmadd_ps(a.lanes, b.lanes, c.lanes)};
  }
  static Avx512 maximum(Avx512 a, Avx512 b) {
    const __mmask16 nan = _mm512_cmp_ps_mask(a.lanes, b.lanes, _CMP_UNORD_Q);
    return {_mm512_mask_add_ps(_mm512_max_ps(a.lanes, b.lanes), nan, a.lanes, b.lanes)};
  }
  friend Avx512 operator+(Avx512 a, Avx512 b) { return {_mm512_add_ps(a.lanes, b.lanes)}; }
  friend Avx512 operator-(Avx512 a, Avx512 b) { return {_mm512_sub_ps(a.lanes, b.lanes)}; }
  friend Avx512 operator*(Avx512 a, Avx512 b) { return {_mm512_mul_ps(a.lanes, b.lanes)}; }
  friend Avx512 operator/(Avx512 a, Avx512 b) { return {_mm512_div_ps(a.lanes, b.lanes)}; }

  static __m256i load16(const std::uint16_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static void store16(std::uint16_t* to, __m256i a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a);
  }
  static Avx512 load_bfloat16(const std::uint16_t* from) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load16(from)), 16))};
  }
  static void store_bfloat16(std::uint16_t* to, Avx512 a) {
    const __m512i bits = _mm512_castps_si512(a.lanes);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(a.lanes, a.lanes, _CMP_UNORD_Q);
    store16(to, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan,
                                                            _mm512_set1_epi32(kBfloat16Nan))));
  }
  static Avx512 load_float16(const std::uint16_t* from) { return {_mm512_cvtph_ps(load16(from))}; }
  static void store_float16(std::uint16_t* to, Avx512 a) {
    const __mmask16 nan = _mm512_cmp_ps_mask(a.lanes, a.lanes, _CMP_UNORD_Q);
    // This NaN's conversion is kFloat16Nan.
    const __m512 quiet = _mm512_mask_mov_ps(a.lanes, nan, _mm512_set1_ps(__builtin_nanf("")));
    store16(to, _mm512_cvtps_ph(quiet, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  __m512 lanes;
};

// Half a register holds the running sums of an ATen that has eight of them.
struct Half {
  static constexpr std::size_t kLanes = 8;

  static Half load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static void store(float* to, Half a) { _mm256_storeu_ps(to, a.lanes); }
  static Half fma(Half a, Half b, Half c) { return {_mm256_fmadd_ps(a.lanes, b.lanes, c.lanes)}; }
  friend Half operator+(Half a, Half b) { return {_mm256_add_ps(a.lanes, b.lanes)}; }
  friend Half operator*(Half a, Half b) { return {_mm256_mul_ps(a.lanes, b.lanes)}; }

  __m256 lanes;
};

}  // namespace

Kernels avx512_kernels() {
  return Loops<Avx512, Half>::table();
}

}  // namespace offload::adafactor_internal

#endif
