// How the ATen of this machine rounds where IEEE 754 leaves a choice, so that update rules can
// follow it bit for bit.
//
// Two things differ between machines for fp32 on the CPU. ATen's kernels are compiled once with
// fused multiply-add and once without. And torch.sqrt goes through MKL where torch is built with
// it, whose square root is not correctly rounded: it refines a reciprocal square root estimate, by
// one of three recipes that MKL chooses by CPU model. Which combination is in use cannot be read
// from torch; it is found by comparing a sample, and it is constant in a process. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>

#include "optim/isa.h"

namespace offload {

enum class SqrtRule : std::uint8_t {
  kIeee,       // correctly rounded: torch without MKL, Arm
  kRsqrt,      // RSQRTPS and two steps without FMA: MKL on x86-64 CPUs not made by Intel
  kRsqrtFma,   // RSQRTPS and two steps with FMA: MKL on Intel CPUs with AVX2
  kRsqrt14Fma  // VRSQRT14PS and one step with FMA: MKL on Intel CPUs with AVX-512
};

struct AtenRounding {
  // Round once where ATen's kernels contract a product and a sum. True for its AVX2, AVX512 and Arm
  // kernels; false for its kernels for x86-64 without AVX2 ("DEFAULT").
  bool fma = true;
  SqrtRule sqrt = SqrtRule::kIeee;
};

// "ieee", "rsqrt", "rsqrt-fma" or "rsqrt14-fma".
[[nodiscard]] const char* sqrt_rule_name(SqrtRule rule);

// Whether the kernels of `isa` can follow `rule` on this CPU. Where best_isa() cannot, ATen on the
// same machine does not round by that rule either.
[[nodiscard]] bool sqrt_rule_available(Isa isa, SqrtRule rule);

// out[i] = sqrt(in[i]) by `rule`: the slow reference. REQUIRES:
// sqrt_rule_available(Isa::kScalar, rule); `out` equals `in` or does not overlap it.
void sqrt_by_rule(SqrtRule rule, const float* in, float* out, std::size_t n);

}  // namespace offload
