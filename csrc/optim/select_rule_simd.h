// From a rule and how it rounds to the loops that were compiled for it.
#pragma once

#include "optim/narrow_loop_simd.h"
#include "optim/rule_loop_simd.h"

namespace offload::update_internal {

using FloatLoop = void (*)(const RuleScalars&, const FloatArrays&);
using NarrowLoopFn = void (*)(const RuleScalars&, const NarrowArrays&);

// What `Of` makes of the rule's class: Of::make<TheRule>(). REQUIRES: a rule with a square root.
template <typename V, typename R, typename Of>
auto of_root_rule(const RuleScalars& s, std::size_t states) {
  switch (s.rule) {
    case Rule::kAdagrad:
      return Of::template make<AdagradRule<V, R, 1>>();
    case Rule::kRmsprop:
      return states == 1   ? Of::template make<RmspropRule<V, R, 1>>()
             : states == 2 ? Of::template make<RmspropRule<V, R, 2>>()
                           : Of::template make<RmspropRule<V, R, 3>>();
    default:
      return states == 2 ? Of::template make<AdamRule<V, R, 2>>()
                         : Of::template make<AdamRule<V, R, 3>>();
  }
}

// Likewise. REQUIRES: a rule without a square root.
template <typename V, typename R, typename Of>
auto of_rootless_rule(const RuleScalars& s, std::size_t states) {
  if (s.rule == Rule::kLion) return Of::template make<LionRule<V, R, 1>>();
  return states == 0 ? Of::template make<SgdRule<V, R, 0>>()
                     : Of::template make<SgdRule<V, R, 1>>();
}

inline bool has_root(const RuleScalars& s) {
  return s.rule != Rule::kLion && s.rule != Rule::kSgd;
}

template <typename V>
struct MakeFloatLoop {
  template <typename TheRule>
  static FloatLoop make() {
    return [](const RuleScalars& s, const FloatArrays& a) { RuleLoop<V, TheRule>(s).run(a); };
  }
};

template <typename V>
struct MakeBfloat16Loop {
  template <typename TheRule>
  static NarrowLoopFn make() {
    return [](const RuleScalars& s, const NarrowArrays& a) {
      NarrowLoop<V, TheRule>(s).run_bfloat16(a);
    };
  }
};

template <typename V>
struct MakeInt8Loop {
  template <typename TheRule>
  static NarrowLoopFn make() {
    return
        [](const RuleScalars& s, const NarrowArrays& a) { NarrowLoop<V, TheRule>(s).run_int8(a); };
  }
};

// REQUIRES: V can follow s.rounding.sqrt.
template <typename V, bool kFma>
FloatLoop float_loop_with_fma(const RuleScalars& s, std::size_t states) {
  using Of = MakeFloatLoop<V>;
  using Ieee = LikeAten<V, kFma, SqrtRule::kIeee>;
  if (!has_root(s)) return of_rootless_rule<V, Ieee, Of>(s, states);
  const SqrtRule rule = s.rounding.sqrt;
  if constexpr (requires(V x) { V::rsqrt(x); }) {
    if (rule == SqrtRule::kRsqrt) {
      return of_root_rule<V, LikeAten<V, kFma, SqrtRule::kRsqrt>, Of>(s, states);
    }
    if (rule == SqrtRule::kRsqrtFma) {
      return of_root_rule<V, LikeAten<V, kFma, SqrtRule::kRsqrtFma>, Of>(s, states);
    }
  }
  if constexpr (requires(V x) { V::rsqrt14(x); }) {
    if (rule == SqrtRule::kRsqrt14Fma) {
      return of_root_rule<V, LikeAten<V, kFma, SqrtRule::kRsqrt14Fma>, Of>(s, states);
    }
  }
  return of_root_rule<V, Ieee, Of>(s, states);
}

// Of what is fp32 throughout or has fp32 states beside a master copy.
template <typename V>
FloatLoop select_float_loop(const RuleScalars& s, std::size_t states) {
  return s.rounding.fma ? float_loop_with_fma<V, true>(s, states)
                        : float_loop_with_fma<V, false>(s, states);
}

// REQUIRES: `format` is narrow. The loop REQUIRES a.n > 0.
template <typename V>
NarrowLoopFn select_narrow_loop(const RuleScalars& s, std::size_t states, StateFormat format) {
  using R = Fused<V>;
  if (format == StateFormat::kBfloat16) {
    return has_root(s) ? of_root_rule<V, R, MakeBfloat16Loop<V>>(s, states)
                       : of_rootless_rule<V, R, MakeBfloat16Loop<V>>(s, states);
  }
  return has_root(s) ? of_root_rule<V, R, MakeInt8Loop<V>>(s, states)
                     : of_rootless_rule<V, R, MakeInt8Loop<V>>(s, states);
}

}  // namespace offload::update_internal
