// Compiled with -mavx2 -mfma -mf16c -ffp-contract=off; called only where isa_available(Isa::kAvx2).
#if defined(__x86_64__)

#include <immintrin.h>

#include "optim/narrow_float.h"
#include "optim/quant_tables8.h"
#include "optim/update_simd.h"

namespace offload::update_internal {
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
  static __m256 sign_bit() { return _mm256_set1_ps(-0.0f); }
  static Avx2 negate(Avx2 a) { return {_mm256_xor_ps(a.lanes, sign_bit())}; }
  static Avx2 fma(Avx2 a, Avx2 b, Avx2 c) { return {_mm256_fmadd_ps(a.lanes, b.lanes, c.lanes)}; }
  static Avx2 fnma(Avx2 a, Avx2 b, Avx2 c) { return {_mm256_fnmadd_ps(a.lanes, b.lanes, c.lanes)}; }
  static Avx2 maximum(Avx2 a, Avx2 b) {
    const __m256 nan = _mm256_cmp_ps(a.lanes, b.lanes, _CMP_UNORD_Q);
    return {_mm256_or_ps(_mm256_max_ps(a.lanes, b.lanes), nan)};
  }
  static Avx2 sign(Avx2 a) {
    const __m256 zero = _mm256_setzero_ps(), one = _mm256_set1_ps(1.0f);
    const __m256 above = _mm256_cmp_ps(a.lanes, zero, _CMP_GT_OQ);
    const __m256 below = _mm256_cmp_ps(a.lanes, zero, _CMP_LT_OQ);
    return {_mm256_sub_ps(_mm256_and_ps(above, one), _mm256_and_ps(below, one))};
  }
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

  struct Int {
    static Int iota() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }
    static Int broadcast(std::uint32_t value) {
      return {_mm256_set1_epi32(static_cast<int>(value))};
    }
    template <int kBits>
    static Int xor_shifted(Int a) {
      return {_mm256_xor_si256(a.lanes, _mm256_srli_epi32(a.lanes, kBits))};
    }
    friend Int operator+(Int a, Int b) { return {_mm256_add_epi32(a.lanes, b.lanes)}; }
    friend Int operator*(Int a, Int b) { return {_mm256_mullo_epi32(a.lanes, b.lanes)}; }
    __m256i lanes;
  };

  static __m128i load16(const std::uint16_t* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  }
  static void store16(std::uint16_t* to, __m128i a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), a);
  }
  // The low halves of the lanes, which are at most 2^16 - 1.
  static __m128i low_halves(__m256i a) {
    return _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  }
  static __m256i replace_nan(__m256i narrow, __m256 from, std::uint16_t nan) {
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(from, from, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(narrow, _mm256_set1_epi32(nan), is_nan);
  }

  static Avx2 load_bfloat16(const std::uint16_t* from) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(from)), 16))};
  }
  static void store_bfloat16(std::uint16_t* to, Avx2 a) {
    const __m256i bits = _mm256_castps_si256(a.lanes);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    store16(to, low_halves(replace_nan(_mm256_srli_epi32(sum, 16), a.lanes, kBfloat16Nan)));
  }
  template <std::size_t k>
  static void store_bfloat16_random(std::uint16_t* to, const Avx2 (&a)[2], const Int (&random)[2]) {
    for (std::size_t i = 0; i < 2; ++i) {
      const __m256i low = k % 2 == 0 ? _mm256_and_si256(random[i].lanes, _mm256_set1_epi32(0xffff))
                                     : _mm256_srli_epi32(random[i].lanes, 16);
      const __m256i sum = _mm256_add_epi32(_mm256_castps_si256(a[i].lanes), low);
      const __m256i narrow = replace_nan(_mm256_srli_epi32(sum, 16), a[i].lanes, kBfloat16Nan);
      store16(to + i * kLanes, low_halves(narrow));
    }
  }
  static Avx2 load_float16(const std::uint16_t* from) { return {_mm256_cvtph_ps(load16(from))}; }
  static void store_float16(std::uint16_t* to, Avx2 a) {
    const __m256 nan = _mm256_cmp_ps(a.lanes, a.lanes, _CMP_UNORD_Q);
    // This NaN's conversion is kFloat16Nan.
    const __m256 quiet = _mm256_blendv_ps(a.lanes, _mm256_set1_ps(__builtin_nanf("")), nan);
    store16(to, _mm256_cvtps_ph(quiet, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  template <bool kSigned>
  static Int larger_magnitude(Int largest, Avx2 a) {
    const __m256 magnitude = kSigned ? _mm256_andnot_ps(sign_bit(), a.lanes) : a.lanes;
    return {_mm256_max_epu32(largest.lanes, _mm256_castps_si256(magnitude))};
  }
  static std::uint32_t largest(Int a) {
    alignas(32) std::uint32_t lanes[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes),
                       _mm256_and_si256(a.lanes, _mm256_set1_epi32(0x7fffffff)));
    return *std::max_element(lanes, lanes + kLanes);
  }

  struct Decoder {
    template <bool kSigned>
    static Decoder of(float scale) {
      constexpr const QuantTables8& tables = kSigned ? kSignedTables8 : kUnsignedTables8;
      const __m256 factor = _mm256_set1_ps(scale);
      return {_mm256_mul_ps(_mm256_load_ps(tables.value_slope), factor),
              _mm256_mul_ps(_mm256_load_ps(tables.value_intercept), factor),
              _mm256_mul_ps(_mm256_setzero_ps(), factor)};
    }

    template <bool kSigned>
    [[gnu::always_inline]] void decode(const std::uint8_t* codes, Avx2 (&to)[4]) const {
      for (std::size_t k = 0; k < 4; ++k) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + k * kLanes));
        const __m256 code =
            _mm256_cvtepi32_ps(kSigned ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
        const __m256 m = _mm256_andnot_ps(sign_bit(), code);
        const __m256i decade = _mm256_srli_epi32(_mm256_castps_si256(m), 23);
        __m256 value = _mm256_fmadd_ps(_mm256_permutevar8x32_ps(slope, decade), m,
                                       _mm256_permutevar8x32_ps(intercept, decade));
        if constexpr (kSigned) value = _mm256_xor_ps(value, _mm256_andnot_ps(code, sign_bit()));
        const __m256 nonzero = _mm256_cmp_ps(m, _mm256_setzero_ps(), _CMP_NEQ_OQ);
        to[k] = {_mm256_blendv_ps(zero, value, nonzero)};
      }
    }

    __m256 slope;
    __m256 intercept;
    __m256 zero;  // NaN where the scale is
  };

  static __m256 lookup(const float* table, __m256i index) {
    return _mm256_permutevar8x32_ps(_mm256_load_ps(table), index);
  }
  static __m256 at_least(__m256 z, float threshold) {
    return _mm256_cmp_ps(z, _mm256_set1_ps(threshold), _CMP_GE_OQ);
  }

  // The codes of eight elements, in lanes of 32 bits.
  template <bool kSigned>
  [[gnu::always_inline]] static __m256i quantize(__m256 element, __m256 inverse) {
    constexpr const QuantMap& map = kSigned ? kSignedMap : kUnsignedMap;
    constexpr const QuantTables8& tables = kSigned ? kSignedTables8 : kUnsignedTables8;
    const __m256 magnitude = kSigned ? _mm256_andnot_ps(sign_bit(), element) : element;
    const __m256 z = _mm256_fmadd_ps(magnitude, inverse, _mm256_set1_ps(kQuantOffset));
    __m256i decades = _mm256_setzero_si256();
    for (std::size_t i = 1; i <= kDecades; ++i) {
      decades = _mm256_sub_epi32(decades, _mm256_castps_si256(at_least(z, map.threshold[i])));
    }
    __m256 position =
        _mm256_fmadd_ps(lookup(tables.slope, decades), z, lookup(tables.intercept, decades));
    position = _mm256_blendv_ps(position, _mm256_set1_ps(map.intercept[kSegments - 1]),
                                at_least(z, map.threshold[kThresholds - 1]));
    if constexpr (kSigned) {
      position = _mm256_or_ps(position, _mm256_andnot_ps(element, sign_bit()));
    } else {
      position = _mm256_and_ps(position, at_least(z, map.threshold[0]));
    }
    return _mm256_cvttps_epi32(position);
  }

  template <bool kSigned>
  [[gnu::always_inline]] static void quantize(const float* from, float inverse,
                                              std::uint8_t* codes) {
    __m256i m[4];
    for (std::size_t k = 0; k < 4; ++k) {
      m[k] = quantize<kSigned>(_mm256_loadu_ps(from + k * kLanes), _mm256_set1_ps(inverse));
    }
    // Saturation makes 127 of 128: there is no code for minus one.
    const __m256i low = kSigned ? _mm256_packs_epi32(m[0], m[1]) : _mm256_packus_epi32(m[0], m[1]);
    const __m256i high = kSigned ? _mm256_packs_epi32(m[2], m[3]) : _mm256_packus_epi32(m[2], m[3]);
    const __m256i bytes = kSigned ? _mm256_packs_epi16(low, high) : _mm256_packus_epi16(low, high);
    // Packing works within 128 bits: words of four codes lie as 0 2 4 6 1 3 5 7.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes),
                        _mm256_permutevar8x32_epi32(bytes, order));
  }

  __m256 lanes;
};

}  // namespace

void update_avx2(const UpdateCall& call) {
  SimdUpdate<Avx2>::run(call);
}

}  // namespace offload::update_internal

#endif
