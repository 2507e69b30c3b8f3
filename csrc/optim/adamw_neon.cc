// Compiled with -ffp-contract=off; called only where isa_available(Isa::kNeon).
#if defined(__aarch64__)

#include <arm_neon.h>

#include "optim/adamw_simd.h"

namespace offload::adamw_internal {
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
  friend Neon operator+(Neon a, Neon b) { return {vaddq_f32(a.lanes, b.lanes)}; }
  friend Neon operator-(Neon a, Neon b) { return {vsubq_f32(a.lanes, b.lanes)}; }
  friend Neon operator*(Neon a, Neon b) { return {vmulq_f32(a.lanes, b.lanes)}; }
  friend Neon operator/(Neon a, Neon b) { return {vdivq_f32(a.lanes, b.lanes)}; }

  float32x4_t lanes;
};

}  // namespace

void adamw_neon(const Scalars& scalars, const Arrays& arrays) {
  run_simd_adamw<Neon>(scalars, arrays);
}

}  // namespace offload::adamw_internal

#endif
