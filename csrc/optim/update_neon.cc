// Compiled with -ffp-contract=off; called only where isa_available(Isa::kNeon).
#if defined(__aarch64__)

#include <arm_neon.h>

#include "optim/narrow_float.h"
#include "optim/quant_tables8.h"
#include "optim/update_simd.h"

namespace offload::update_internal {
namespace {

struct Neon {
  static constexpr std::size_t kLanes = 4;

  static Neon broadcast(float value) { return {vdupq_n_f32(value)}; }
  static Neon load(const float* from) { return {vld1q_f32(from)}; }
  static void store(float* to, Neon a) { vst1q_f32(to, a.lanes); }

  static Neon load_first(const float* from, std::size_t count) {
    float buffer[kLanes] = {};
    for (std::size_t i = 0; i < count; ++i) buffer[i] = from[i];
    return {vld1q_f32(buffer)};
  }
  static void store_first(float* to, Neon a, std::size_t count) {
    float buffer[kLanes];
    vst1q_f32(buffer, a.lanes);
    for (std::size_t i = 0; i < count; ++i) to[i] = buffer[i];
  }

  static Neon sqrt(Neon a) { return {vsqrtq_f32(a.lanes)}; }
  static Neon negate(Neon a) { return {vnegq_f32(a.lanes)}; }
  static Neon fma(Neon a, Neon b, Neon c) { return {vfmaq_f32(c.lanes, a.lanes, b.lanes)}; }
  static Neon fnma(Neon a, Neon b, Neon c) { return {vfmsq_f32(c.lanes, a.lanes, b.lanes)}; }
  static Neon maximum(Neon a, Neon b) { return {vmaxq_f32(a.lanes, b.lanes)}; }
  static Neon sign(Neon a) {
    const uint32x4_t one = vreinterpretq_u32_f32(vdupq_n_f32(1.0f));
    const float32x4_t above = vreinterpretq_f32_u32(vandq_u32(vcgtzq_f32(a.lanes), one));
    const float32x4_t below = vreinterpretq_f32_u32(vandq_u32(vcltzq_f32(a.lanes), one));
    return {vsubq_f32(above, below)};
  }
  friend Neon operator+(Neon a, Neon b) { return {vaddq_f32(a.lanes, b.lanes)}; }
  friend Neon operator-(Neon a, Neon b) { return {vsubq_f32(a.lanes, b.lanes)}; }
  friend Neon operator*(Neon a, Neon b) { return {vmulq_f32(a.lanes, b.lanes)}; }
  friend Neon operator/(Neon a, Neon b) { return {vdivq_f32(a.lanes, b.lanes)}; }

  struct Mask {
    uint32x4_t lanes;
  };
  static Mask between(Neon x, Neon min, Neon max) {
    return {vandq_u32(vcgeq_f32(x.lanes, min.lanes), vcleq_f32(x.lanes, max.lanes))};
  }
  static bool all(Mask mask) { return vminvq_u32(mask.lanes) != 0; }
  static Neon select(Mask mask, Neon a, Neon b) {
    return {vbslq_f32(mask.lanes, a.lanes, b.lanes)};
  }

  struct Int {
    static Int iota() {
      constexpr std::uint32_t kIota[] = {0, 1, 2, 3};
      return {vld1q_u32(kIota)};
    }
    static Int broadcast(std::uint32_t value) { return {vdupq_n_u32(value)}; }
    template <int kBits>
    static Int xor_shifted(Int a) {
      return {veorq_u32(a.lanes, vshrq_n_u32(a.lanes, kBits))};
    }
    friend Int operator+(Int a, Int b) { return {vaddq_u32(a.lanes, b.lanes)}; }
    friend Int operator*(Int a, Int b) { return {vmulq_u32(a.lanes, b.lanes)}; }
    uint32x4_t lanes;
  };

  // `narrow` where `from` is a number, else `nan`.
  static uint16x4_t replace_nan(uint16x4_t narrow, float32x4_t from, std::uint16_t nan) {
    const uint16x4_t number = vmovn_u32(vceqq_f32(from, from));
    return vbsl_u16(number, narrow, vdup_n_u16(nan));
  }

  static Neon load_bfloat16(const std::uint16_t* from) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from), 16))};
  }
  static void store_bfloat16(std::uint16_t* to, Neon a) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a.lanes);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t sum = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    vst1_u16(to, replace_nan(vshrn_n_u32(sum, 16), a.lanes, kBfloat16Nan));
  }
  template <std::size_t k>
  static void store_bfloat16_random(std::uint16_t* to, const Neon (&a)[2], const Int (&random)[2]) {
    for (std::size_t i = 0; i < 2; ++i) {
      const uint32x4_t low = k % 2 == 0 ? vandq_u32(random[i].lanes, vdupq_n_u32(0xffff))
                                        : vshrq_n_u32(random[i].lanes, 16);
      const uint32x4_t sum = vaddq_u32(vreinterpretq_u32_f32(a[i].lanes), low);
      vst1_u16(to + i * kLanes, replace_nan(vshrn_n_u32(sum, 16), a[i].lanes, kBfloat16Nan));
    }
  }
  static Neon load_float16(const std::uint16_t* from) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)))};
  }
  static void store_float16(std::uint16_t* to, Neon a) {
    const uint16x4_t half = vreinterpret_u16_f16(vcvt_f16_f32(a.lanes));
    vst1_u16(to, replace_nan(half, a.lanes, kFloat16Nan));
  }

  template <bool kSigned>
  static Int larger_magnitude(Int largest, Neon a) {
    const float32x4_t magnitude = kSigned ? vabsq_f32(a.lanes) : a.lanes;
    return {vmaxq_u32(largest.lanes, vreinterpretq_u32_f32(magnitude))};
  }
  static std::uint32_t largest(Int a) {
    return vmaxvq_u32(vandq_u32(a.lanes, vdupq_n_u32(0x7fffffff)));
  }

  // Eight numbers, as bytes.
  static uint8x16x2_t table_of(float32x4_t low, float32x4_t high) {
    return {{vreinterpretq_u8_f32(low), vreinterpretq_u8_f32(high)}};
  }
  static uint8x16x2_t table_of(const float (&table)[8]) {
    return table_of(vld1q_f32(table), vld1q_f32(table + 4));
  }
  // Of the table's numbers that of `index` modulo 8.
  static float32x4_t lookup(uint8x16x2_t table, uint32x4_t index) {
    const uint32x4_t low = vandq_u32(index, vdupq_n_u32(7));
    const uint32x4_t places = vmlaq_u32(vdupq_n_u32(0x03020100), low, vdupq_n_u32(0x04040404));
    return vreinterpretq_f32_u8(vqtbl2q_u8(table, vreinterpretq_u8_u32(places)));
  }
  static float32x4_t with_sign_against(float32x4_t a, float32x4_t other) {
    const uint32x4_t against =
        vandq_u32(vmvnq_u32(vreinterpretq_u32_f32(other)), vdupq_n_u32(0x80000000));
    return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(a), against));
  }

  struct Decoder {
    static uint8x16x2_t scaled(const float (&table)[8], float scale) {
      return table_of(vmulq_n_f32(vld1q_f32(table), scale),
                      vmulq_n_f32(vld1q_f32(table + 4), scale));
    }
    template <bool kSigned>
    static Decoder of(float scale) {
      constexpr const QuantTables8& tables = kSigned ? kSignedTables8 : kUnsignedTables8;
      return {scaled(tables.value_slope, scale), scaled(tables.value_intercept, scale),
              vdupq_n_f32(0.0f * scale)};
    }

    // The values of four codes.
    template <bool kSigned>
    Neon decode(float32x4_t code) const {
      const float32x4_t m = vabsq_f32(code);
      const uint32x4_t decade = vshrq_n_u32(vreinterpretq_u32_f32(m), 23);
      float32x4_t value = vfmaq_f32(lookup(intercept, decade), lookup(slope, decade), m);
      if constexpr (kSigned) value = with_sign_against(value, code);
      return {vbslq_f32(vcgtzq_f32(m), value, zero)};
    }

    template <bool kSigned>
    [[gnu::always_inline]] void decode(const std::uint8_t* codes, Neon (&to)[4]) const {
      const uint8x16_t bytes = vld1q_u8(codes);
      int16x8_t halves[2];
      if constexpr (kSigned) {
        halves[0] = vmovl_s8(vreinterpret_s8_u8(vget_low_u8(bytes)));
        halves[1] = vmovl_s8(vreinterpret_s8_u8(vget_high_u8(bytes)));
      } else {
        halves[0] = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes)));
        halves[1] = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(bytes)));
      }
      for (std::size_t k = 0; k < 2; ++k) {
        to[2 * k] = decode<kSigned>(vcvtq_f32_s32(vmovl_s16(vget_low_s16(halves[k]))));
        to[2 * k + 1] = decode<kSigned>(vcvtq_f32_s32(vmovl_s16(vget_high_s16(halves[k]))));
      }
    }

    uint8x16x2_t slope;
    uint8x16x2_t intercept;
    float32x4_t zero;  // NaN where the scale is
  };

  // The codes of four elements, in lanes of 32 bits.
  template <bool kSigned>
  [[gnu::always_inline]] static int32x4_t encode(float32x4_t element, float inverse) {
    constexpr const QuantMap& map = kSigned ? kSignedMap : kUnsignedMap;
    constexpr const QuantTables8& tables = kSigned ? kSignedTables8 : kUnsignedTables8;
    const float32x4_t z =
        vfmaq_f32(vdupq_n_f32(kQuantOffset), vabsq_f32(element), vdupq_n_f32(inverse));
    const auto reached = [z](float threshold) { return vcgeq_f32(z, vdupq_n_f32(threshold)); };
    uint32x4_t decades = vdupq_n_u32(0);
    for (std::size_t i = 1; i <= kDecades; ++i) {
      decades = vsubq_u32(decades, reached(map.threshold[i]));
    }
    float32x4_t position = vfmaq_f32(lookup(table_of(tables.intercept), decades),
                                     lookup(table_of(tables.slope), decades), z);
    position = vbslq_f32(reached(map.threshold[kThresholds - 1]),
                         vdupq_n_f32(map.intercept[kSegments - 1]), position);
    if constexpr (kSigned) {
      position = with_sign_against(position, element);
    } else {
      position = vreinterpretq_f32_u32(
          vandq_u32(vreinterpretq_u32_f32(position), reached(map.threshold[0])));
    }
    return vcvtq_s32_f32(position);
  }

  template <bool kSigned>
  [[gnu::always_inline]] static void quantize(const float* from, float inverse,
                                              std::uint8_t* codes) {
    int32x4_t m[4];
    for (std::size_t k = 0; k < 4; ++k) {
      m[k] = encode<kSigned>(vld1q_f32(from + k * kLanes), inverse);
    }
    const int16x8_t low = vcombine_s16(vmovn_s32(m[0]), vmovn_s32(m[1]));
    const int16x8_t high = vcombine_s16(vmovn_s32(m[2]), vmovn_s32(m[3]));
    if constexpr (kSigned) {
      // Saturation makes 127 of 128: there is no code for minus one.
      const int8x16_t bytes = vcombine_s8(vqmovn_s16(low), vqmovn_s16(high));
      vst1q_u8(codes, vreinterpretq_u8_s8(bytes));
    } else {
      vst1q_u8(codes, vcombine_u8(vqmovun_s16(low), vqmovun_s16(high)));
    }
  }

  float32x4_t lanes;
};

}  // namespace

void update_neon(const UpdateCall& call) {
  SimdUpdate<Neon>::run(call);
}

}  // namespace offload::update_internal

#endif
