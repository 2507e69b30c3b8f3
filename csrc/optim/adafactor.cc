#include "optim/adafactor.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "optim/adafactor_kernels.h"
#include "optim/ordered_chunks.h"

namespace offload {

namespace adafactor_internal {

Kernels kernels_of(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return avx2_kernels();
    case Isa::kAvx512:
      return avx512_kernels();
#elif defined(__aarch64__)
    case Isa::kNeon:
      return neon_kernels();
#endif
    default:
      return scalar_kernels();
  }
}

}  // namespace adafactor_internal

namespace {

using adafactor_internal::Kernels;
using adafactor_internal::kernels_of;
using adafactor_internal::Lerp;

// Of the elements that a worker takes at a time: they stay in its second cache until it is its turn
// to add them up.
constexpr std::size_t kChunk = std::size_t{1} << 15;
// Of what is widened or computed on the way to a loop: stays in the first cache.
constexpr std::size_t kTile = std::size_t{1} << 10;
static_assert(kChunk % kTile == 0 && kTile % NormOrder::kMostLanes == 0);
// Starting a thread costs as much as the pass over some ten thousand elements.
constexpr std::size_t kElementsPerThread = std::size_t{1} << 17;

std::size_t chunks_of(std::size_t n, std::size_t chunk) {
  return (n + chunk - 1) / chunk;
}

unsigned workers_for(std::size_t n, unsigned threads) {
  return static_cast<unsigned>(
      std::clamp<std::size_t>(n / kElementsPerThread, 1, std::max(threads, 1u)));
}

// The sum of squares along memory, in ATen's order: whole groups of lanes first, then the rest.
class SquareSum {
 public:
  SquareSum(const NormOrder& order, const Kernels& kernels) : order_(order), kernels_(kernels) {}

  void add_lanes(const float* x, std::size_t n) { kernels_.fold_squares(lanes_, x, n, order_); }
  // At most order.lanes - 1 elements, after all else.
  [[nodiscard]] float norm(const float* rest, std::size_t n) const {
    float sum = lanes_[0];
    for (std::size_t k = 1; k < order_.lanes; ++k) sum = sum + lanes_[k];
    const std::size_t grouped = order_.rest_group == 0 ? 0 : n - n % order_.rest_group;
    for (std::size_t i = 0; i < n; ++i) {
      const float square = rest[i] * rest[i];
      sum = order_.fuse_rest && i >= grouped ? std::fma(rest[i], rest[i], sum) : sum + square;
    }
    return std::sqrt(sum);
  }

 private:
  const NormOrder& order_;
  const Kernels& kernels_;
  float lanes_[NormOrder::kMostLanes] = {};
};

// The gradient as the loops take it.
class GradReader {
 public:
  GradReader(const AdafactorStep& step, const Kernels& kernels) : step_(step), kernels_(kernels) {}

  [[nodiscard]] bool is_direct() const {
    return step_.type == ElementType::kFloat32 && step_.factors.count == 0;
  }
  // Elements [first, first + n) in fp32: where they are, or in `tile`, n <= kTile.
  const float* read(std::size_t first, std::size_t n, float* tile) const {
    if (is_direct()) return static_cast<const float*>(step_.grad) + first;
    const auto* bytes = static_cast<const std::byte*>(step_.grad);
    kernels_.widen(step_.type, bytes + first * element_bytes(step_.type), step_.factors, tile, n);
    return tile;
  }

 private:
  const AdafactorStep& step_;
  const Kernels& kernels_;
};

class Pass {
 public:
  explicit Pass(const AdafactorStep& step)
      : step_(step), kernels_(kernels_of(step.isa)), grad_(step, kernels_) {}

  float norm(const float* x, std::size_t n) const {
    if (n == 1) return std::fabs(x[0]);  // torch takes it for the norm of one element
    const std::size_t whole = n - n % step_.order.lanes;
    const unsigned workers = workers_for(n, step_.threads);
    SquareSum sum(step_.order, kernels_);
    const auto size_of = [&](std::size_t chunk) {
      return std::min(kChunk, whole - chunk * kChunk);
    };
    run_ordered_chunks(
        chunks_of(whole, kChunk), workers,
        [&](std::size_t chunk, unsigned) {  // into the cache, on all threads
          if (workers == 1) return;
          constexpr std::size_t kLine = 64 / sizeof(float);
          for (std::size_t i = 0; i < size_of(chunk); i += kLine) {
            __builtin_prefetch(x + chunk * kChunk + i, 0, 2);
          }
        },
        [&](std::size_t chunk, unsigned) { sum.add_lanes(x + chunk * kChunk, size_of(chunk)); });
    return sum.norm(x + whole, n - whole);
  }

  void matrix_statistics(double weight) const {
    std::vector<float> row_norms(step_.batch * step_.rows);
    std::vector<float> col_norms(step_.batch * step_.cols);
    const std::size_t rows_per_chunk = std::max<std::size_t>(1, kChunk / step_.cols);
    const auto end_of = [&](std::size_t chunk) {
      return std::min((chunk + 1) * rows_per_chunk, row_norms.size());
    };
    // The columns of one column are its norm along memory.
    const bool along = step_.cols == 1;
    run_ordered_chunks(
        chunks_of(row_norms.size(), rows_per_chunk), workers_for(step_.numel(), step_.threads),
        [&](std::size_t chunk, unsigned) {
          for (std::size_t row = chunk * rows_per_chunk; row < end_of(chunk); ++row) {
            row_norms[row] = grad_norm(row * step_.cols, step_.cols);
          }
        },
        [&](std::size_t chunk, unsigned) {
          if (!along) add_columns(col_norms.data(), chunk * rows_per_chunk, end_of(chunk));
        });
    if (along) {
      for (std::size_t b = 0; b < step_.batch; ++b) {
        col_norms[b] = grad_norm(b * step_.rows, step_.rows);
      }
    } else {
      for (float& norm : col_norms) norm = std::sqrt(norm);
    }
    if (step_.rows == 1 && !along) {  // norms of one element each
      float tile[kTile];
      for (std::size_t i = 0; i < col_norms.size(); i += kTile) {
        const std::size_t n = std::min(kTile, col_norms.size() - i);
        const float* g = grad_.read(i, n, tile);
        for (std::size_t j = 0; j < n; ++j) col_norms[i + j] = std::fabs(g[j]);
      }
    }
    kernels_.lerp_squares(step_.row_var, row_norms.data(), static_cast<float>(step_.cols),
                          row_norms.size(), lerp(weight));
    kernels_.lerp_squares(step_.col_var, col_norms.data(), static_cast<float>(step_.rows),
                          col_norms.size(), lerp(weight));
  }

  void element_statistics(double weight) const {
    const std::size_t n = step_.numel();
    run_ordered_chunks(
        chunks_of(n, kChunk), workers_for(n, step_.threads), [&](std::size_t chunk, unsigned) {
          for_tiles(chunk, [&](std::size_t first, std::size_t size) {
            float tile[kTile];
            kernels_.lerp_squares(step_.variance + first, grad_.read(first, size, tile), 1.0f, size,
                                  lerp(weight));
          });
        });
  }

  float update_norm(const float* mean, float floor) const {
    const std::size_t n = step_.numel();
    const unsigned workers = workers_for(n, step_.threads);
    const std::size_t per_worker = std::min(n, kChunk);
    const auto scratch = std::make_unique_for_overwrite<float[]>(workers * per_worker);
    float rest[NormOrder::kMostLanes];
    std::size_t rest_size = 0;
    SquareSum sum(step_.order, kernels_);
    run_ordered_chunks(
        chunks_of(n, kChunk), workers,
        [&](std::size_t chunk, unsigned worker) {
          const std::size_t first = chunk * kChunk;
          updates(mean, floor, first, std::min(kChunk, n - first),
                  scratch.get() + worker * per_worker);
        },
        [&](std::size_t chunk, unsigned worker) {
          const std::size_t size = std::min(kChunk, n - chunk * kChunk);
          rest_size = size % step_.order.lanes;
          const float* computed = scratch.get() + worker * per_worker;
          sum.add_lanes(computed, size - rest_size);
          std::copy_n(computed + size - rest_size, rest_size, rest);
        });
    return n == 1 ? std::fabs(rest[0]) : sum.norm(rest, rest_size);
  }

  void apply(const float* mean, float floor, float decay, float step) const {
    const std::size_t n = step_.numel();
    run_ordered_chunks(chunks_of(n, kChunk), workers_for(n, step_.threads),
                       [&](std::size_t chunk, unsigned) {
                         for_tiles(chunk, [&](std::size_t first, std::size_t size) {
                           float update[kTile];
                           updates(mean, floor, first, size, update);
                           float* param = step_.param + first;
                           kernels_.apply(param, update, decay, step, step_.fma, size);
                           if (step_.narrow == nullptr) return;
                           kernels_.narrow(step_.type, param,
                                           static_cast<std::uint16_t*>(step_.narrow) + first, size);
                         });
                       });
  }

 private:
  Lerp lerp(double weight) const {
    const auto rounded = static_cast<float>(weight);
    const bool to_target = !(std::fabs(rounded) < 0.5f);
    return {to_target ? rounded - 1.0f : rounded, to_target, step_.fma};
  }

  template <typename Body>
  void for_tiles(std::size_t chunk, const Body& body) const {
    const std::size_t end = std::min((chunk + 1) * kChunk, step_.numel());
    for (std::size_t first = chunk * kChunk; first < end; first += kTile) {
      body(first, std::min(kTile, end - first));
    }
  }

  float grad_norm(std::size_t first, std::size_t n) const {
    float tile[kTile];
    if (n == 1) return std::fabs(*grad_.read(first, 1, tile));
    const std::size_t most = grad_.is_direct() ? n : kTile;
    const std::size_t whole = n - n % step_.order.lanes;
    SquareSum sum(step_.order, kernels_);
    for (std::size_t i = 0; i < whole; i += most) {
      const std::size_t size = std::min(most, whole - i);
      sum.add_lanes(grad_.read(first + i, size, tile), size);
    }
    return sum.norm(grad_.read(first + whole, n - whole, tile), n - whole);
  }

  // Rows [row, end) onto the sums of squares of their matrices' columns.
  void add_columns(float* sums, std::size_t row, std::size_t end) const {
    const std::size_t cols = step_.cols;
    const bool fuse = step_.order.fuse_columns;
    while (row < end) {
      const std::size_t matrix = row / step_.rows;
      const std::size_t last = std::min(end, (matrix + 1) * step_.rows);
      if (grad_.is_direct()) {
        kernels_.add_squares(sums + matrix * cols, grad_.read(row * cols, 0, nullptr), cols,
                             last - row, cols, fuse);
      } else {
        float tile[kTile];
        for (std::size_t r = row; r < last; ++r) {
          for (std::size_t j = 0; j < cols; j += kTile) {
            const std::size_t size = std::min(kTile, cols - j);
            kernels_.add_squares(sums + matrix * cols + j, grad_.read(r * cols + j, size, tile),
                                 size, 1, size, fuse);
          }
        }
      }
      row = last;
    }
  }

  // The updates of elements [first, first + n).
  void updates(const float* mean, float floor, std::size_t first, std::size_t n, float* to) const {
    float tile[kTile];
    const std::size_t cols = step_.cols;
    std::size_t row = first / cols, col = first % cols;
    for (std::size_t done = 0; done < n;) {
      std::size_t size = std::min(kTile, n - done);
      if (!step_.is_matrix()) {
        kernels_.unfactored(step_.variance + first + done, floor,
                            grad_.read(first + done, size, tile), to + done, size);
      } else {
        size = std::min(size, cols - col);
        const std::size_t matrix = row / step_.rows;
        kernels_.factored(step_.row_var[row], step_.col_var + matrix * cols + col, mean[matrix],
                          floor, grad_.read(first + done, size, tile), to + done, size);
        col += size;
        if (col == cols) {
          col = 0;
          ++row;
        }
      }
      done += size;
    }
  }

  const AdafactorStep& step_;
  const Kernels kernels_;
  const GradReader grad_;
};

}  // namespace

float AdafactorStep::norm(const float* values, std::size_t n) const {
  return Pass(*this).norm(values, n);
}

void AdafactorStep::take_statistics(double weight) const {
  const Pass pass(*this);
  if (is_matrix()) {
    pass.matrix_statistics(weight);
  } else {
    pass.element_statistics(weight);
  }
}

float AdafactorStep::update_norm(const float* mean, float floor) const {
  return Pass(*this).update_norm(mean, floor);
}

void AdafactorStep::apply(const float* mean, float floor, float decay, float step) const {
  Pass(*this).apply(mean, floor, decay, step);
}

}  // namespace offload
