// The loops of adafactor.cc, one table per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "optim/isa.h"
#include "optim/norm_order.h"
#include "optim/update_rule.h"

namespace offload::adafactor_internal {

// lerp_(target, weight) starts from whichever end is nearer, see RuleScalars::lerp_weight.
struct Lerp {
  float weight;
  bool to_target;
  bool fma;
};

// Arrays are of any alignment, and equal or disjoint.
struct Kernels {
  // lanes[i % order.lanes] += x[i] * x[i]. REQUIRES: n is a multiple of order.lanes.
  void (*fold_squares)(float* lanes, const float* x, std::size_t n, const NormOrder& order);
  // sums[j] += x[r * stride + j]^2 for the rows r in order.
  void (*add_squares)(float* sums, const float* x, std::size_t stride, std::size_t rows,
                      std::size_t cols, bool fuse);
  // average = lerp(average, x * x / divisor)
  void (*lerp_squares)(float* average, const float* x, float divisor, std::size_t n, Lerp lerp);
  // update = g / sqrt(max(row * col / mean, floor)), as torch rounds it
  void (*factored)(float row, const float* col, float mean, float floor, const float* g,
                   float* update, std::size_t n);
  // update = g / sqrt(max(variance, floor)), likewise
  void (*unfactored)(const float* variance, float floor, const float* g, float* update,
                     std::size_t n);
  // p = p * decay + step * update
  void (*apply)(float* p, const float* update, float decay, float step, bool fma, std::size_t n);
  // The gradient in fp32, each product with a factor rounded to `type`.
  void (*widen)(ElementType type, const void* grad, GradFactors factors, float* to, std::size_t n);
  // To nearest even. REQUIRES: `type` has 16 bits.
  void (*narrow)(ElementType type, const float* from, std::uint16_t* to, std::size_t n);
};

// Each is defined where its architecture is; what it returns is called only where its Isa is
// available.
[[nodiscard]] Kernels scalar_kernels();
[[nodiscard]] Kernels avx2_kernels();
[[nodiscard]] Kernels avx512_kernels();
[[nodiscard]] Kernels neon_kernels();

// REQUIRES: isa_available(isa).
[[nodiscard]] Kernels kernels_of(Isa isa);

}  // namespace offload::adafactor_internal
