// The reference: adamw_kernel.h's step spelled out, one element at a time.
// Compiled with -ffp-contract=off.
#include <cmath>

#include "optim/adamw_kernel.h"

namespace offload::adamw_internal {
namespace {

float multiply_add(bool fused, float a, float b, float c) {
  if (fused) return std::fma(a, b, c);
  const float product = a * b;
  return product + c;
}

}  // namespace

void adamw_scalar(const Scalars& s, const Arrays& a) {
  for (std::size_t i = 0; i < a.n; ++i) {
    float g = a.grad[i];
    for (std::size_t k = 0; k < s.factor_count; ++k) g *= s.factors[k];
    if (s.maximize) g = -g;

    const float decayed = a.param[i] * s.decay;
    const float diff = g - a.exp_avg[i];
    const float m =
        multiply_add(s.rounding.fma, s.lerp_weight, diff, s.lerp_to_grad ? g : a.exp_avg[i]);
    const float kept = a.exp_avg_sq[i] * s.beta2;
    const float v = multiply_add(s.rounding.fma, s.one_minus_beta2 * g, g, kept);
    float root;
    sqrt_by_rule(s.rounding.sqrt, &v, &root, 1);
    const float denominator = root / s.bias_correction2_sqrt + s.eps;
    const float change = (s.neg_step_size * m) / denominator;

    a.exp_avg_out[i] = m;
    a.exp_avg_sq_out[i] = v;
    a.param_out[i] = decayed + change;
  }
}

}  // namespace offload::adamw_internal
