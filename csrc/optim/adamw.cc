#include "optim/adamw.h"

#include <cmath>

#include "optim/adamw_kernel.h"

namespace offload {
namespace {

using adamw_internal::Arrays;
using adamw_internal::Scalars;

// Python's `base ** exponent`: libm's pow. The exponent is hidden from compilers that put sqrt in
// the place of pow(x, 0.5), which rounds differently.
double python_pow(double base, double exponent) {
  const volatile double hidden = exponent;
  return std::pow(base, hidden);
}

Scalars make_scalars(const AdamWHyper& hyper, GradFactors factors) {
  const double bias_correction1 = 1.0 - python_pow(hyper.beta1, hyper.step);
  const double bias_correction2 = 1.0 - python_pow(hyper.beta2, hyper.step);
  const float weight = static_cast<float>(1.0 - hyper.beta1);
  Scalars s;
  // torch skips the multiplication when there is no decay, and multiplying by one changes no bit.
  s.decay =
      hyper.weight_decay != 0.0 ? static_cast<float>(1.0 - hyper.lr * hyper.weight_decay) : 1.0f;
  s.lerp_to_grad = !(std::fabs(weight) < 0.5f);
  s.lerp_weight = s.lerp_to_grad ? weight - 1.0f : weight;
  s.beta2 = static_cast<float>(hyper.beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - hyper.beta2);
  s.bias_correction2_sqrt = static_cast<float>(python_pow(bias_correction2, 0.5));
  s.eps = static_cast<float>(hyper.eps);
  s.neg_step_size = static_cast<float>(-(hyper.lr / bias_correction1));
  s.maximize = hyper.maximize;
  s.rounding = hyper.rounding;
  s.factors = factors.values;
  s.factor_count = factors.count;
  return s;
}

}  // namespace

void adamw_update_isa(Isa isa, const AdamWHyper& hyper, GradFactors factors, const float* param,
                      const float* grad, const float* exp_avg, const float* exp_avg_sq,
                      float* param_out, float* exp_avg_out, float* exp_avg_sq_out, std::size_t n) {
  const Scalars scalars = make_scalars(hyper, factors);
  const Arrays arrays{param, grad, exp_avg, exp_avg_sq, param_out, exp_avg_out, exp_avg_sq_out, n};
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return adamw_internal::adamw_avx2(scalars, arrays);
    case Isa::kAvx512:
      return adamw_internal::adamw_avx512(scalars, arrays);
#elif defined(__aarch64__)
    case Isa::kNeon:
      return adamw_internal::adamw_neon(scalars, arrays);
#endif
    default:
      return adamw_internal::adamw_scalar(scalars, arrays);
  }
}

void adamw_update(const AdamWHyper& hyper, GradFactors factors, const float* param,
                  const float* grad, const float* exp_avg, const float* exp_avg_sq,
                  float* param_out, float* exp_avg_out, float* exp_avg_sq_out, std::size_t n) {
  adamw_update_isa(best_isa(), hyper, factors, param, grad, exp_avg, exp_avg_sq, param_out,
                   exp_avg_out, exp_avg_sq_out, n);
}

}  // namespace offload
