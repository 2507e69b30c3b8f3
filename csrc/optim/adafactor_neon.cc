// Compiled with -ffp-contract=off; called only where isa_available(Isa::kNeon).
#if defined(__aarch64__)

#include <arm_neon.h>

#include "optim/adafactor_simd.h"
#include "optim/narrow_float.h"

namespace offload::adafactor_internal {
namespace {

using update_internal::kBfloat16Nan;
using update_internal::kFloat16Nan;

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
  static Neon fma(Neon a, Neon b, Neon c) { return {vfmaq_f32(c.lanes, a.lanes, b.lanes)}; }
  static Neon maximum(Neon a, Neon b) { return {vmaxq_f32(a.lanes, b.lanes)}; }
  friend Neon operator+(Neon a, Neon b) { return {vaddq_f32(a.lanes, b.lanes)}; }
  friend Neon operator-(Neon a, Neon b) { return {vsubq_f32(a.lanes, b.lanes)}; }
  friend Neon operator*(Neon a, Neon b) { return {vmulq_f32(a.lanes, b.lanes)}; }
  friend Neon operator/(Neon a, Neon b) { return {vdivq_f32(a.lanes, b.lanes)}; }

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
  static Neon load_float16(const std::uint16_t* from) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)))};
  }
  static void store_float16(std::uint16_t* to, Neon a) {
    const uint16x4_t half = vreinterpret_u16_f16(vcvt_f16_f32(a.lanes));
    vst1_u16(to, replace_nan(half, a.lanes, kFloat16Nan));
  }

  float32x4_t lanes;
};

}  // namespace

Kernels neon_kernels() {
  return Loops<Neon, Neon>::table();
}

}  // namespace offload::adafactor_internal

#endif
