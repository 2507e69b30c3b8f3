// Adafactor's passes against its definition, one element at a time, on each instruction set.
#include "optim/adafactor.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "doctest/doctest.h"
#include "optim/narrow_float.h"
#include "optim/ordered_chunks.h"

namespace offload {
namespace {

using Floats = std::vector<float>;
using update_internal::narrow;
using update_internal::widen;

constexpr Isa kIsas[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kNeon};

struct Problem {
  std::size_t batch, rows, cols;
  bool is_matrix;
  ElementType type;
  NormOrder order;
  bool fma;
  double weight;
  Floats factors;
  Floats param, grad;  // of a 16-bit type: values that it has
  Floats row_var, col_var, variance;

  [[nodiscard]] std::size_t numel() const { return batch * rows * cols; }
};

// What a step leaves and returns.
struct Outcome {
  Floats param, narrowed, row_var, col_var, variance, norms;
};

constexpr float kFloor = 1e-14f;
constexpr float kDecay = 0.999f;
constexpr float kStep = -0.0123f;

float fused(bool fuse, float a, float b, float c) {
  const float product = a * b;
  return fuse ? std::fma(a, b, c) : c + product;
}

float norm(const NormOrder& order, const Floats& x) {
  if (x.size() == 1) return std::fabs(x[0]);
  float lanes[NormOrder::kMostLanes] = {};
  const std::size_t whole = x.size() / order.lanes * order.lanes;
  for (std::size_t i = 0; i < whole; ++i) {
    float& lane = lanes[i % order.lanes];
    lane = fused(order.fuse_lanes, x[i], x[i], lane);
  }
  float sum = lanes[0];
  for (std::size_t k = 1; k < order.lanes; ++k) sum += lanes[k];
  std::size_t left = x.size() - whole;
  for (std::size_t i = whole; i < x.size(); ++i) {
    if (order.rest_group != 0 && left >= order.rest_group) {
      for (std::size_t k = 0; k < order.rest_group; ++k) sum += x[i + k] * x[i + k];
      i += order.rest_group - 1;
      left -= order.rest_group;
    } else {
      sum = fused(order.fuse_rest, x[i], x[i], sum);
    }
  }
  return std::sqrt(sum);
}

float norm_across(const NormOrder& order, const Floats& x) {
  float sum = 0.0f;
  for (const float value : x) sum = fused(order.fuse_columns, value, value, sum);
  return std::sqrt(sum);
}

float lerp(const Problem& p, float from, float to) {
  const auto weight = static_cast<float>(p.weight);
  if (weight < 0.5f) return fused(p.fma, weight, to - from, from);
  return fused(p.fma, weight - 1.0f, to - from, to);
}

float mean_of(const Problem& p, const Floats& row_var, std::size_t matrix) {
  float sum = 0.0f;
  for (std::size_t r = 0; r < p.rows; ++r) sum += row_var[matrix * p.rows + r];
  return sum / static_cast<float>(p.rows) + 1e-6f;
}

Outcome expected(const Problem& p) {
  Outcome out{p.param, p.param, p.row_var, p.col_var, p.variance, {}};
  Floats g = p.grad;
  for (float& value : g) {
    for (const float factor : p.factors) {
      value *= factor;
      if (p.type != ElementType::kFloat32) value = widen(p.type, narrow(p.type, value));
    }
  }
  out.norms.push_back(norm(p.order, p.param));
  Floats update(p.numel());
  for (std::size_t m = 0; p.is_matrix && m < p.batch; ++m) {
    const std::size_t first = m * p.rows * p.cols;
    for (std::size_t r = 0; r < p.rows; ++r) {
      const auto* row = g.data() + first + r * p.cols;
      const float n = norm(p.order, Floats(row, row + p.cols));
      float& average = out.row_var[m * p.rows + r];
      average = lerp(p, average, n * n / static_cast<float>(p.cols));
    }
    for (std::size_t c = 0; c < p.cols; ++c) {
      Floats column;
      for (std::size_t r = 0; r < p.rows; ++r) column.push_back(g[first + r * p.cols + c]);
      const bool along = p.cols == 1 || p.rows == 1;
      const float n = along ? norm(p.order, column) : norm_across(p.order, column);
      float& average = out.col_var[m * p.cols + c];
      average = lerp(p, average, n * n / static_cast<float>(p.rows));
    }
  }
  Floats means;
  for (std::size_t m = 0; p.is_matrix && m < p.batch; ++m) {
    means.push_back(mean_of(p, out.row_var, m));
  }
  for (std::size_t i = 0; i < p.numel(); ++i) {
    float variance;
    if (p.is_matrix) {
      const std::size_t m = i / (p.rows * p.cols);
      variance = out.row_var[i / p.cols] * out.col_var[m * p.cols + i % p.cols];
      variance = variance / means[m];
    } else {
      variance = out.variance[i] = lerp(p, out.variance[i], g[i] * g[i]);
    }
    if (variance < kFloor) variance = kFloor;
    const float inverse = 1.0f / std::sqrt(variance);
    update[i] = inverse * g[i];
    const float kept = out.param[i] * kDecay;
    out.param[i] = fused(p.fma, kStep, update[i], kept);
  }
  out.norms.push_back(norm(p.order, update));
  if (p.type == ElementType::kFloat32) return out;
  for (std::size_t i = 0; i < p.numel(); ++i) {
    out.narrowed[i] = widen(p.type, narrow(p.type, out.param[i]));
  }
  return out;
}

Outcome run(const Problem& p, Isa isa, unsigned threads) {
  Outcome out{p.param, p.param, p.row_var, p.col_var, p.variance, {}};
  const bool has_master = p.type != ElementType::kFloat32;
  std::vector<std::uint16_t> narrow_grad, narrow_param(p.numel());
  if (has_master) {
    for (const float value : p.grad) narrow_grad.push_back(narrow(p.type, value));
  }
  AdafactorStep step;
  step.batch = p.batch;
  step.rows = p.rows;
  step.cols = p.cols;
  step.type = p.type;
  step.param = out.param.data();
  step.narrow = has_master ? narrow_param.data() : nullptr;
  step.grad = has_master ? static_cast<const void*>(narrow_grad.data()) : p.grad.data();
  step.factors = {p.factors.data(), p.factors.size()};
  step.row_var = p.is_matrix ? out.row_var.data() : nullptr;
  step.col_var = p.is_matrix ? out.col_var.data() : nullptr;
  step.variance = p.is_matrix ? nullptr : out.variance.data();
  step.order = p.order;
  step.fma = p.fma;
  step.threads = threads;
  step.isa = isa;
  out.norms.push_back(step.norm(step.param, step.numel()));
  step.take_statistics(p.weight);
  Floats means;
  for (std::size_t m = 0; p.is_matrix && m < p.batch; ++m) {
    means.push_back(mean_of(p, out.row_var, m));
  }
  out.norms.push_back(step.update_norm(means.data(), kFloor));
  step.apply(means.data(), kFloor, kDecay, kStep);
  if (has_master) {
    for (std::size_t i = 0; i < p.numel(); ++i) out.narrowed[i] = widen(p.type, narrow_param[i]);
  } else {
    out.narrowed = p.param;  // not written: as in expected()
  }
  return out;
}

void check_bits(const Floats& got, const Floats& want) {
  REQUIRE(got.size() == want.size());
  std::size_t same = 0;
  while (same < got.size() &&
         ((std::isnan(got[same]) && std::isnan(want[same])) ||
          std::bit_cast<std::uint32_t>(got[same]) == std::bit_cast<std::uint32_t>(want[same]))) {
    ++same;
  }
  REQUIRE(same == got.size());  // else the index of the first that differs
}

void check(const Outcome& got, const Outcome& want) {
  check_bits(got.norms, want.norms);
  check_bits(got.row_var, want.row_var);
  check_bits(got.col_var, want.col_var);
  check_bits(got.variance, want.variance);
  check_bits(got.param, want.param);
  check_bits(got.narrowed, want.narrowed);
}

struct Shape {
  std::size_t batch, rows, cols;
  bool is_matrix = true;
};

Problem make_problem(const Shape& shape, ElementType type, bool special, std::mt19937& random) {
  constexpr std::size_t kLanes[] = {4, 8, 16};
  const auto coin = [&] { return random() % 2 == 0; };
  Problem p{shape.batch, shape.rows, shape.cols, shape.is_matrix,
            type,        {},         coin(),     coin() ? 0.3 : 0.8,
            {},          {},         {},         {},
            {},          {}};
  p.order.lanes = kLanes[random() % 3];
  p.order.fuse_lanes = coin();
  p.order.rest_group = coin() ? 4 : 0;
  p.order.fuse_rest = coin();
  p.order.fuse_columns = coin();
  if (coin()) p.factors = {0.37f, 3.1f};
  std::normal_distribution<float> normal;
  const auto fill = [&](Floats& values, std::size_t n, bool squares) {
    for (std::size_t i = 0; i < n; ++i) {
      const float value = normal(random);
      values.push_back(squares ? value * value : value);
    }
  };
  fill(p.param, p.numel(), false);
  fill(p.grad, p.numel(), false);
  if (shape.is_matrix) {
    fill(p.row_var, p.batch * p.rows, true);
    fill(p.col_var, p.batch * p.cols, true);
  } else {
    fill(p.variance, p.numel(), true);
  }
  if (special) {
    constexpr float kInf = std::numeric_limits<float>::infinity();
    for (const float value : {0.0f, -0.0f, kInf, -kInf, NAN, 1e-45f, 3e38f}) {
      p.grad[random() % p.numel()] = value;
    }
  }
  if (type != ElementType::kFloat32) {
    for (float& value : p.grad) value = widen(type, narrow(type, value));
  }
  return p;
}

constexpr Shape kShapes[] = {{1, 1, 1},    {1, 1, 40},       {1, 37, 1},       {3, 17, 1},
                             {2, 1, 19},   {1, 31, 47},      {5, 3, 3},        {2, 64, 65},
                             {1, 3, 2500}, {1, 1, 1, false}, {7, 1, 1, false}, {2311, 1, 1, false}};

TEST_CASE("Adafactor's passes have the bits of its definition on every instruction set") {
  std::mt19937 random(1);
  for (const Shape& shape : kShapes) {
    for (const auto type : {ElementType::kFloat32, ElementType::kBfloat16, ElementType::kFloat16}) {
      for (int round = 0; round < 6; ++round) {
        const Problem p = make_problem(shape, type, round >= 4, random);
        CAPTURE(p.rows);
        CAPTURE(p.cols);
        CAPTURE(p.order.lanes);
        const Outcome want = expected(p);
        for (const Isa isa : kIsas) {
          if (!isa_available(isa)) continue;
          CAPTURE(isa_name(isa));
          check(run(p, isa, 1), want);
        }
      }
    }
  }
}

TEST_CASE("Adafactor's bits do not depend on the number of threads") {
  std::mt19937 random(2);
  constexpr Shape kLarge[] = {
      {1, 700, 801}, {3, 400, 451}, {1, 5, 100003}, {1, 60001, 7}, {600011, 1, 1, false}};
  for (const Shape& shape : kLarge) {
    for (const auto type : {ElementType::kFloat32, ElementType::kBfloat16}) {
      const Problem p = make_problem(shape, type, false, random);
      CAPTURE(p.rows);
      const Outcome want = expected(p);
      for (const unsigned threads : {1u, 2u, 5u}) check(run(p, best_isa(), threads), want);
    }
  }
}

TEST_CASE("chunks are folded in order, each by the worker that worked on it") {
  std::vector<unsigned> worker_of(1000, ~0u);
  std::vector<std::size_t> folded;
  run_ordered_chunks(
      worker_of.size(), 4, [&](std::size_t chunk, unsigned worker) { worker_of[chunk] = worker; },
      [&](std::size_t chunk, unsigned worker) {
        CHECK(worker_of[chunk] == worker);
        folded.push_back(chunk);
      });
  REQUIRE(folded.size() == worker_of.size());
  for (std::size_t i = 0; i < folded.size(); ++i) REQUIRE(folded[i] == i);
  run_ordered_chunks(0, 4, [](std::size_t, unsigned) { FAIL("there is no chunk"); });
}

}  // namespace
}  // namespace offload
