// One step's hyperparameters as the kernels use them: computed once per call, in double as Python
// does, then rounded to float as ATen does.
#pragma once

#include <cstddef>

#include "optim/aten_rounding.h"
#include "optim/update_rule.h"

namespace offload::update_internal {

// A field is set where the rule uses it (see rule_scalar.cc for how).
struct RuleScalars {
  Rule rule;
  AtenRounding rounding;
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
  float bias_correction2_sqrt;
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
};

[[nodiscard]] RuleScalars make_scalars(const RuleHyper& hyper, GradFactors factors);

}  // namespace offload::update_internal
