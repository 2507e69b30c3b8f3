// The entry points of the kernels, one per instruction set.
#pragma once

#include "optim/rule_scalars.h"
#include "optim/update_rule.h"

namespace offload::update_internal {

// One update() call, with its scalars.
struct UpdateCall {
  RuleScalars scalars;
  UpdateFormat format;
  RoundingSeed seed;
  std::uint64_t step;  // RuleHyper::step, for stochastic rounding
  std::size_t states;  // state_count()
  bool state_unsigned[kMaxStates];
  UpdateArrays arrays;
};

[[nodiscard]] UpdateCall make_call(const RuleHyper& hyper, const UpdateFormat& format,
                                   GradFactors factors, const RoundingSeed& seed,
                                   const UpdateArrays& arrays);

// Each is defined where its architecture is, and called only where its Isa is available.
void update_scalar(const UpdateCall& call);
void update_avx2(const UpdateCall& call);
void update_avx512(const UpdateCall& call);
void update_neon(const UpdateCall& call);

}  // namespace offload::update_internal
