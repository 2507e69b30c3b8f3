// AdamW in fp32, bit-identical to torch.optim.AdamW on the CPU.
//
// Contract: every element gets the bits that the for-loop and foreach paths of torch.optim.AdamW
// (amsgrad, capturable and differentiable off) give it, on every Isa, for every n, position and
// alignment, provided AdamWHyper::rounding is that of the ATen in use. Left open are the payload
// and sign of a NaN and, where beta1 is 0, the sign of an exp_avg that is zero, which in torch
// depends on the element's position. The fused path of torch rounds differently. REQUIRES the
// default floating-point environment: round to nearest, denormals kept. Thread-safe on disjoint
// outputs; allocates nothing.
#pragma once

#include <cstddef>

#include "optim/aten_rounding.h"
#include "optim/isa.h"

namespace offload {

struct AdamWHyper {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double step;  // the count after the increment, >= 1
  bool maximize;
  AtenRounding rounding = {};
};

// Factors by which the gradient is still to be multiplied (unscaling, clipping), applied one after
// another in fp32, values[0] first: the bits of as many grad.mul_() calls.
struct GradFactors {
  const float* values;
  std::size_t count;
};

// One step on n elements by best_isa(). REQUIRES: sqrt_rule_available(best_isa(),
// hyper.rounding.sqrt). Every out array either equals its input array or overlaps no array at
// all; grad is only read. No pointer needs more than the alignment of float.
void adamw_update(const AdamWHyper& hyper, GradFactors factors, const float* param,
                  const float* grad, const float* exp_avg, const float* exp_avg_sq,
                  float* param_out, float* exp_avg_out, float* exp_avg_sq_out, std::size_t n);

// The same on a given instruction set. REQUIRES: sqrt_rule_available(isa, hyper.rounding.sqrt).
void adamw_update_isa(Isa isa, const AdamWHyper& hyper, GradFactors factors, const float* param,
                      const float* grad, const float* exp_avg, const float* exp_avg_sq,
                      float* param_out, float* exp_avg_out, float* exp_avg_sq_out, std::size_t n);

}  // namespace offload
