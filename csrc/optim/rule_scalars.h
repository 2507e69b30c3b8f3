// One step's hyperparameters as the kernels use them: computed once per call, in double as Python
// does, then rounded to float as ATen does.
//
// Rules whose states are narrow are free of ATen's order of operations. They round as `Fused` in
// rounding_simd.h does, by correctly rounded operations that every instruction set has:
//   - a product that is added to something is a fused multiply-add, and square roots are correctly
//     rounded;
//   - a moving average of squares is v - w * (v - g * g), w = 1 - beta2: two fused multiply-adds.
//     It is never negative. (An infinity in v makes it NaN.)
//   - Adam's bias correction of v is part of the constants: with c = sqrt(1 - beta2^step),
//     lr * m / (sqrt(v) / c + eps) = (lr * c) * m / (sqrt(v) + eps * c);
//   - a quotient that is added to something is one by a reciprocal: c + a * (1 / b), the
//     reciprocal correctly rounded, then a fused multiply-add.
#pragma once

#include <cstddef>
#include <cstdint>

#include "optim/aten_rounding.h"
#include "optim/update_rule.h"

namespace offload::update_internal {

// A field is set where the rule uses it (see rule_scalars.cc for how).
struct RuleScalars {
  Rule rule;
  bool fused;             // see above
  AtenRounding rounding;  // where not fused
  bool maximize;
  // grad.add(param, alpha=weight_decay); every rule but AdamW and Lion. torch skips it at zero.
  bool decays_grad;
  float weight_decay;
  // param.mul_(1 - lr * weight_decay): AdamW and Lion. One where torch skips it: no bit changes.
  float param_decay;
  // lerp_(grad, weight) starts from whichever end is nearer: with a weight w < 0.5 it is
  // state + w * diff, otherwise grad + (w - 1) * diff.
  float lerp_weight;
  bool lerp_to_grad;
  float beta1;
  float one_minus_beta1;
  float beta2;  // of the moving average of squares: beta2, or RMSprop's alpha
  float one_minus_beta2;
  float bias_correction2_sqrt;  // where not fused
  float eps;
  float neg_step_size;  // -(lr / bias_correction1), -lr, or -clr
  float momentum;
  float one_minus_dampening;
  bool has_momentum;
  bool nesterov;
  bool first;
  bool amsgrad;
  bool centered;
  const float* factors;
  std::size_t factor_count;
  float unscale;
  bool by_divider;  // where fused: reciprocals, rather than by an estimate; the bits are the same
  std::size_t prefetch_bytes;  // see prefetch() in rule_loop_simd.h
};

[[nodiscard]] RuleScalars make_scalars(const RuleHyper& hyper, GradFactors factors, bool fused);

}  // namespace offload::update_internal
