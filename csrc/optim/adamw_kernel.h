// What the AdamW kernels of all instruction sets share: their arguments and entry points.
//
// The step, with each line rounded to fp32 and fma(a, b, c) rounded once (see AtenRounding::fma):
//   g = (maximize ? -grad : grad), after grad was multiplied by each factor in turn
//   p = param * decay                                             mul_(1 - lr * weight_decay)
//   m = fma(lerp_weight, g - exp_avg, lerp_to_grad ? g : exp_avg) lerp_(g, 1 - beta1)
//   v = fma(one_minus_beta2 * g, g, exp_avg_sq * beta2)           mul_(beta2).addcmul_(g, g)
//   d = sqrt(v) (see SqrtRule) / bias_correction2_sqrt + eps
//   p = p + (neg_step_size * m) / d                               addcdiv_(m, d)
// Nothing else may be contracted: every file that implements it needs -ffp-contract=off.
#pragma once

#include <cstddef>

#include "optim/aten_rounding.h"

namespace offload::adamw_internal {

// Computed once per call, in double as Python does, then rounded to float as ATen does.
struct Scalars {
  float decay;
  // lerp_ starts from whichever end is nearer: with a weight w < 0.5 it is exp_avg + w * diff,
  // otherwise g + (w - 1) * diff.
  float lerp_weight;
  bool lerp_to_grad;
  float beta2;
  float one_minus_beta2;
  float bias_correction2_sqrt;
  float eps;
  float neg_step_size;
  bool maximize;
  AtenRounding rounding;
  const float* factors;
  std::size_t factor_count;
};

struct Arrays {
  const float* param;
  const float* grad;
  const float* exp_avg;
  const float* exp_avg_sq;
  float* param_out;
  float* exp_avg_out;
  float* exp_avg_sq_out;
  std::size_t n;
};

// Each is defined where its architecture is, and called only where its Isa is available.
void adamw_scalar(const Scalars& scalars, const Arrays& arrays);
void adamw_avx2(const Scalars& scalars, const Arrays& arrays);
void adamw_avx512(const Scalars& scalars, const Arrays& arrays);
void adamw_neon(const Scalars& scalars, const Arrays& arrays);

}  // namespace offload::adamw_internal
