// One step of torch.optim.Adafactor on one parameter, in passes that make no array of its size.
//
// A matrix (dim >= 2, torch factors the last two dimensions of a batch of them) keeps the means of
// the squared gradient over each row and each column; anything else its average square, element by
// element. The caller does between the passes what torch does on Python numbers:
//   1. norm() of the parameter, for the size of the step;
//   2. take_statistics(): the running means, from sums over the gradient;
//   3. of a matrix: the mean of row_var over the rows, clamped, `mean` below;
//   4. update_norm(): the norm of the update, by which it is clipped;
//   5. apply(): the parameter.
// The update of an element is computed in 4 and again in 5, instead of being kept.
//
// Contract: the bits of torch's for-loop path on the same fp32 arrays, provided `order` and `fma`
// are those of the ATen in use, on every Isa and with any number of threads. Sums are taken in
// ATen's order: what precedes a sum is computed on all threads, the sum itself by one after the
// other (ordered_chunks.h). With a 16-bit parameter, torch's step on its fp32 master. Left open are
// the payload and sign of a NaN. REQUIRES the default floating-point environment. Allocates 128 KiB
// per thread, and one float per row and column. Thread-safe on disjoint parameters.
#pragma once

#include <cstddef>

#include "optim/isa.h"
#include "optim/norm_order.h"
#include "optim/update_rule.h"

namespace offload {

struct AdafactorStep {
  // Of a matrix, row-major: `batch` of them, neither extent 0. Anything else: batch elements, rows
  // and cols are 1.
  std::size_t batch = 1;
  std::size_t rows = 1;
  std::size_t cols = 1;

  ElementType type = ElementType::kFloat32;  // of the parameter and of the gradient
  float* param = nullptr;                    // the parameter, or its fp32 master
  void* narrow = nullptr;                    // the 16-bit parameter, with a master
  const void* grad = nullptr;
  GradFactors factors;

  float* row_var = nullptr;   // batch * rows; null: not a matrix
  float* col_var = nullptr;   // batch * cols
  float* variance = nullptr;  // of what is not a matrix

  NormOrder order;
  bool fma = true;  // AtenRounding::fma
  unsigned threads = 1;
  Isa isa = Isa::kScalar;

  [[nodiscard]] std::size_t numel() const { return batch * rows * cols; }
  [[nodiscard]] bool is_matrix() const { return row_var != nullptr; }

  // torch.norm of n fp32 elements that lie side by side. Uses order, threads and isa only.
  [[nodiscard]] float norm(const float* values, std::size_t n) const;

  // Moves the running means towards those of this gradient, by `weight`, 0 to 1.
  void take_statistics(double weight) const;

  // The norm of the update before clipping. `mean` has one element per matrix of the batch; an
  // estimate of the variance below `floor` becomes `floor`.
  [[nodiscard]] float update_norm(const float* mean, float floor) const;

  // param = param * decay + step * update, where `step` is negative unless maximizing.
  void apply(const float* mean, float floor, float decay, float step) const;
};

}  // namespace offload
