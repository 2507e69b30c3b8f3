// Compiled with -mavx512{f,vl,dq,bw} -mfma -mf16c -ffp-contract=off; called only where
// isa_available(Isa::kAvx512).
#if defined(__x86_64__)

// GCC 12 warns about the deliberately undefined operands inside its own AVX-512 header (PR 105593).
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include <array>
#include <bit>

#include "optim/narrow_float.h"
#include "optim/update_simd.h"

namespace offload::update_internal {
namespace {

// Encoding looks up by binade: entry E - 96 is for the exponent field E, [2^(E - 127), 2^(E -
// 126)), which the low five bits of E select. `slope` and `intercept` are those of the segment at
// the binade's lower end. A binade holds one threshold at most; from there on the next binade's
// segment holds: `carry`, added to the bits, carries into the exponent there. Decoding looks up by
// the exponent field of a code's float, modulo 16.
struct Tables {
  alignas(64) std::uint32_t carry[32];
  alignas(64) float slope[32];
  alignas(64) float intercept[32];
  alignas(64) float value_slope[16];
  alignas(64) float value_intercept[16];
};

// A code's byte is the highest of its lane where it is signed, and the second where it is not: so
// the exponent fields of zero, which is 0, of the decades and of one differ modulo 16.
constexpr double kSignedUnit = 0x1p24;
constexpr double kUnsignedUnit = 0x1p8;

consteval Tables make_tables(const QuantMap& map) {
  Tables tables = {};
  for (std::uint32_t e = 0; e < 32; ++e) {
    const std::uint32_t low_bits = (96 + e) << 23;
    const float low = std::bit_cast<float>(low_bits), high = 2.0f * low;
    std::size_t segment = 0;
    while (segment < kThresholds && map.threshold[segment] <= low) ++segment;
    if (segment < kThresholds && map.threshold[segment] < high) {
      if (segment + 1 < kThresholds && map.threshold[segment + 1] <= high) {
        throw "the next binade does not begin in the threshold's segment";
      }
      tables.carry[e] =
          low_bits + (1u << 23) - std::bit_cast<std::uint32_t>(map.threshold[segment]);
    }
    tables.slope[e] = map.slope[segment];
    tables.intercept[e] = map.intercept[segment];
  }
  // A signed code is the greater the more negative its element is.
  const float sign = map.is_signed ? -1.0f : 1.0f;
  const auto unit = static_cast<float>(map.is_signed ? kSignedUnit : kUnsignedUnit);
  const std::size_t first = map.is_signed ? 127 + 24 : 128 + 8;  // the exponent field of decade 0
  for (std::size_t i = 0; i < kDecades; ++i) {
    tables.value_slope[(first + i) % 16] = sign * map.value_slope[i] / unit;
    tables.value_intercept[(first + i) % 16] = sign * map.value_intercept[i];
  }
  const std::size_t one = map.is_signed ? 134 + 24 : 127 + 8;
  tables.value_intercept[one % 16] = sign;
  return tables;
}

constexpr Tables kSignedTables = make_tables(kSignedMap);
constexpr Tables kUnsignedTables = make_tables(kUnsignedMap);

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
  // 1 / d, correctly rounded, for d in [2^-60, 2^65], infinite or NaN. From a neighbour of 1 / d
  // the last step of Newton's iteration rounds right, for a mantissa of ones if the neighbour is
  // the upper one (Markstein, "IA-64 and Elementary Functions", 2000).
  static Avx512 reciprocal_by_estimate(Avx512 d) {
    constexpr int kUp = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 infinity = _mm512_set1_ps(__builtin_inff());
    const __mmask16 finite = _mm512_cmp_ps_mask(d.lanes, infinity, _CMP_NEQ_UQ);
    __m512 y = _mm512_rcp14_ps(d.lanes);
    y = _mm512_fmadd_round_ps(_mm512_fnmadd_ps(d.lanes, y, one), y, y, kUp);
    return {_mm512_maskz_fmadd_ps(finite, _mm512_fnmadd_ps(d.lanes, y, one), y, y)};
  }
  static Avx512 negate(Avx512 a) { return {_mm512_xor_ps(a.lanes, _mm512_set1_ps(-0.0f))}; }
  static Avx512 fma(Avx512 a, Avx512 b, Avx512 c) {
    return {_mm512_fmadd_ps(a.lanes, b.lanes, c.lanes)};
  }
  static Avx512 fnma(Avx512 a, Avx512 b, Avx512 c) {
    return {_mm512_fnmadd_ps(a.lanes, b.lanes, c.lanes)};
  }
  static Avx512 maximum(Avx512 a, Avx512 b) {
    const __mmask16 nan = _mm512_cmp_ps_mask(a.lanes, b.lanes, _CMP_UNORD_Q);
    return {_mm512_mask_add_ps(_mm512_max_ps(a.lanes, b.lanes), nan, a.lanes, b.lanes)};
  }
  static Avx512 sign(Avx512 a) {
    const __m512 zero = _mm512_setzero_ps();
    const __mmask16 above = _mm512_cmp_ps_mask(a.lanes, zero, _CMP_GT_OQ);
    const __mmask16 below = _mm512_cmp_ps_mask(a.lanes, zero, _CMP_LT_OQ);
    const __m512 positive = _mm512_maskz_mov_ps(above, _mm512_set1_ps(1.0f));
    return {_mm512_mask_mov_ps(positive, below, _mm512_set1_ps(-1.0f))};
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

  struct Int {
    static Int iota() {
      return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
    }
    static Int broadcast(std::uint32_t value) {
      return {_mm512_set1_epi32(static_cast<int>(value))};
    }
    template <int kBits>
    static Int xor_shifted(Int a) {
      return {_mm512_xor_si512(a.lanes, _mm512_srli_epi32(a.lanes, kBits))};
    }
    friend Int operator+(Int a, Int b) { return {_mm512_add_epi32(a.lanes, b.lanes)}; }
    friend Int operator*(Int a, Int b) { return {_mm512_mullo_epi32(a.lanes, b.lanes)}; }
    __m512i lanes;
  };

  static __m256i load16(const std::uint16_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static void store16(std::uint16_t* to, __m256i a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a);
  }
  static __m256i replace_nan(__m256i narrow, __m512 from, std::uint16_t nan) {
    const __mmask16 is_nan = _mm512_cmp_ps_mask(from, from, _CMP_UNORD_Q);
    return _mm256_mask_mov_epi16(narrow, is_nan, _mm256_set1_epi16(static_cast<short>(nan)));
  }
  static __m256i high_halves(__m512i a) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(a, 16)); }

  static Avx512 load_bfloat16(const std::uint16_t* from) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load16(from)), 16))};
  }
  static void store_bfloat16(std::uint16_t* to, Avx512 a) {
    const __m512i bits = _mm512_castps_si512(a.lanes);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    store16(to, replace_nan(high_halves(sum), a.lanes, kBfloat16Nan));
  }
  // The bits of a + 16 of the random ones; of a NaN the constant's.
  template <std::size_t k>
  static __m512i add_random(Avx512 a, Int random) {
    const __m512i low = k % 2 == 0 ? _mm512_and_si512(random.lanes, _mm512_set1_epi32(0xffff))
                                   : _mm512_srli_epi32(random.lanes, 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a.lanes, a.lanes, _CMP_UNORD_Q);
    const __m512i nan = _mm512_set1_epi32(kBfloat16Nan << 16);
    return _mm512_mask_mov_epi32(_mm512_add_epi32(_mm512_castps_si512(a.lanes), low), is_nan, nan);
  }
  template <std::size_t k>
  static void store_bfloat16_random(std::uint16_t* to, const Avx512 (&a)[2],
                                    const Int (&random)[2]) {
    alignas(64) static constexpr auto kHighHalves = [] {
      std::array<std::uint16_t, 32> index = {};
      for (std::size_t i = 0; i < 32; ++i) index[i] = static_cast<std::uint16_t>(2 * i + 1);
      return index;
    }();
    const __m512i index = _mm512_load_si512(kHighHalves.data());
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(add_random<k>(a[0], random[0]), index,
                                                      add_random<k>(a[1], random[1])));
  }
  static Avx512 load_float16(const std::uint16_t* from) { return {_mm512_cvtph_ps(load16(from))}; }
  static void store_float16(std::uint16_t* to, Avx512 a) {
    const __m256i half = _mm512_cvtps_ph(a.lanes, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    store16(to, replace_nan(half, a.lanes, kFloat16Nan));
  }

  template <bool kSigned>
  static Int larger_magnitude(Int largest, Avx512 a) {
    const __m512 magnitude = kSigned ? _mm512_abs_ps(a.lanes) : a.lanes;
    return {_mm512_max_epu32(largest.lanes, _mm512_castps_si512(magnitude))};
  }
  static std::uint32_t largest(Int a) {
    return _mm512_reduce_max_epu32(_mm512_and_si512(a.lanes, _mm512_set1_epi32(0x7fffffff)));
  }

  struct Decoder {
    template <bool kSigned>
    static Decoder of(float scale) {
      constexpr const Tables& tables = kSigned ? kSignedTables : kUnsignedTables;
      const __m512 factor = _mm512_set1_ps(scale);
      return {_mm512_mul_ps(_mm512_load_ps(tables.value_slope), factor),
              _mm512_mul_ps(_mm512_load_ps(tables.value_intercept), factor)};
    }

    template <bool kSigned>
    [[gnu::always_inline]] void decode(const std::uint8_t* codes, Avx512 (&to)[4]) const {
      // To each lane its byte, from one copy of the sixteen in each quarter.
      constexpr int kPlace = kSigned ? 24 : 8;
      constexpr auto control = [](int byte) {
        return static_cast<int>(0x80808080u & ~(0xffu << kPlace)) | byte << kPlace;
      };
      const __m512i place =
          _mm512_setr_epi32(control(0), control(1), control(2), control(3), control(4), control(5),
                            control(6), control(7), control(8), control(9), control(10),
                            control(11), control(12), control(13), control(14), control(15));
      for (std::size_t k = 0; k < 4; ++k) {
        const __m512i bytes = _mm512_broadcast_i32x4(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + k * kLanes)));
        const __m512 code = _mm512_cvtepi32_ps(_mm512_shuffle_epi8(bytes, place));
        const __m512i index = _mm512_srli_epi32(_mm512_castps_si512(code), 23);
        __m512 line_intercept = _mm512_permutexvar_ps(index, intercept);
        if constexpr (kSigned) {
          constexpr int kXorWithMasked = 0x78;  // a ^ (b & c)
          line_intercept = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
              _mm512_castps_si512(line_intercept), _mm512_castps_si512(code),
              _mm512_set1_epi32(static_cast<int>(0x80000000u)), kXorWithMasked));
        }
        to[k] = {_mm512_fmadd_ps(_mm512_permutexvar_ps(index, slope), code, line_intercept)};
      }
    }

    __m512 slope;
    __m512 intercept;
  };

  template <typename T>
  static __m512i lookup(const T* table, __m512i index) {
    return _mm512_permutex2var_epi32(_mm512_load_si512(table), index,
                                     _mm512_load_si512(table + 16));
  }

  // The codes of sixteen elements, in lanes of 32 bits.
  template <bool kSigned>
  [[gnu::always_inline]] static __m512i quantize(__m512 element, __m512 inverse) {
    constexpr const Tables& tables = kSigned ? kSignedTables : kUnsignedTables;
    const __m512 magnitude = kSigned ? _mm512_abs_ps(element) : element;
    const __m512 z = _mm512_fmadd_ps(magnitude, inverse, _mm512_set1_ps(kQuantOffset));
    const __m512i bits = _mm512_castps_si512(z);
    const __m512i carry = lookup(tables.carry, _mm512_srli_epi32(bits, 23));
    const __m512i segment = _mm512_srli_epi32(_mm512_add_epi32(bits, carry), 23);
    __m512 position = _mm512_fmadd_ps(_mm512_castsi512_ps(lookup(tables.slope, segment)), z,
                                      _mm512_castsi512_ps(lookup(tables.intercept, segment)));
    if constexpr (kSigned) {
      constexpr int kOrMaskedNot = 0xf2;  // a | (~b & c)
      position = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
          _mm512_castps_si512(position), _mm512_castps_si512(element),
          _mm512_set1_epi32(static_cast<int>(0x80000000u)), kOrMaskedNot));
    }
    return _mm512_cvttps_epi32(position);
  }

  template <bool kSigned>
  [[gnu::always_inline]] static void quantize(const float* from, float inverse,
                                              std::uint8_t* codes) {
    __m512i m[4];
    for (std::size_t k = 0; k < 4; ++k) {
      m[k] = quantize<kSigned>(_mm512_loadu_ps(from + k * kLanes), _mm512_set1_ps(inverse));
    }
    // Saturation makes 127 of 128: there is no code for minus one.
    const __m512i low = kSigned ? _mm512_packs_epi32(m[0], m[1]) : _mm512_packus_epi32(m[0], m[1]);
    const __m512i high = kSigned ? _mm512_packs_epi32(m[2], m[3]) : _mm512_packus_epi32(m[2], m[3]);
    const __m512i bytes = kSigned ? _mm512_packs_epi16(low, high) : _mm512_packus_epi16(low, high);
    // Packing works within 128 bits: word 4 q + k holds quarter q of vector k.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(codes, _mm512_permutexvar_epi32(order, bytes));
  }

  __m512 lanes;
};

}  // namespace

void update_avx512(const UpdateCall& call) {
  SimdUpdate<Avx512>::run(call);
}

}  // namespace offload::update_internal

#endif
