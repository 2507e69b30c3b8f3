// From a rule and how it rounds to the loops that were compiled for it.
#pragma once

#include "optim/narrow_loop_simd.h"
#include "optim/rule_loop_simd.h"

namespace offload::update_internal {

struct RuleLoops {
  void (*fp32)(const RuleScalars&, const FloatArrays&);
  // With states of these formats. REQUIRES: RuleScalars::rounding.fma, a.n > 0.
  void (*bfloat16)(const RuleScalars&, const NarrowArrays&);
  void (*int8)(const RuleScalars&, const NarrowArrays&);
};

template <typename V, template <typename, bool, SqrtRule, std::size_t> typename Rule, bool kFma,
          SqrtRule kSqrt, std::size_t kStates>
RuleLoops loops_of() {
  using R = Rule<V, kFma, kSqrt, kStates>;
  RuleLoops loops = {};
  loops.fp32 = [](const RuleScalars& s, const FloatArrays& a) { RuleLoop<V, R, kFma>(s).run(a); };
  if constexpr (kFma) {
    loops.bfloat16 = [](const RuleScalars& s, const NarrowArrays& a) {
      NarrowLoop<V, R, kFma>(s).run_bfloat16(a);
    };
    loops.int8 = [](const RuleScalars& s, const NarrowArrays& a) {
      NarrowLoop<V, R, kFma>(s).run_int8(a);
    };
  }
  return loops;
}

template <typename V, bool kFma, SqrtRule kSqrt>
RuleLoops loops_with_sqrt(const RuleScalars& s, std::size_t states) {
  switch (s.rule) {
    case Rule::kAdagrad:
      return loops_of<V, AdagradRule, kFma, kSqrt, 1>();
    case Rule::kRmsprop:
      return states == 1   ? loops_of<V, RmspropRule, kFma, kSqrt, 1>()
             : states == 2 ? loops_of<V, RmspropRule, kFma, kSqrt, 2>()
                           : loops_of<V, RmspropRule, kFma, kSqrt, 3>();
    default:
      return states == 2 ? loops_of<V, AdamRule, kFma, kSqrt, 2>()
                         : loops_of<V, AdamRule, kFma, kSqrt, 3>();
  }
}

// REQUIRES: V can follow s.rounding.sqrt.
template <typename V, bool kFma>
RuleLoops loops_with_fma(const RuleScalars& s, std::size_t states) {
  if (s.rule == Rule::kLion) return loops_of<V, LionRule, kFma, SqrtRule::kIeee, 1>();
  if (s.rule == Rule::kSgd) {
    return states == 0 ? loops_of<V, SgdRule, kFma, SqrtRule::kIeee, 0>()
                       : loops_of<V, SgdRule, kFma, SqrtRule::kIeee, 1>();
  }
  const SqrtRule rule = s.rounding.sqrt;
  if constexpr (requires(V x) { V::rsqrt(x); }) {
    if (rule == SqrtRule::kRsqrt) return loops_with_sqrt<V, kFma, SqrtRule::kRsqrt>(s, states);
    if (rule == SqrtRule::kRsqrtFma) {
      return loops_with_sqrt<V, kFma, SqrtRule::kRsqrtFma>(s, states);
    }
  }
  if constexpr (requires(V x) { V::rsqrt14(x); }) {
    if (rule == SqrtRule::kRsqrt14Fma) {
      return loops_with_sqrt<V, kFma, SqrtRule::kRsqrt14Fma>(s, states);
    }
  }
  return loops_with_sqrt<V, kFma, SqrtRule::kIeee>(s, states);
}

template <typename V>
RuleLoops select_loops(const RuleScalars& s, std::size_t states) {
  return s.rounding.fma ? loops_with_fma<V, true>(s, states) : loops_with_fma<V, false>(s, states);
}

}  // namespace offload::update_internal
