// What the tests of the update rules share: random problems of every rule and format, and running
// one on an instruction set with guards around every array.
//
// Not thread-safe: all of it belongs to the test's thread.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <random>
#include <vector>

#include "doctest/doctest.h"
#include "optim/narrow_float.h"
#include "optim/update_rule.h"

namespace offload {

inline constexpr Isa kIsas[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kNeon};
inline constexpr SqrtRule kSqrtRules[] = {SqrtRule::kIeee, SqrtRule::kRsqrt, SqrtRule::kRsqrtFma,
                                          SqrtRule::kRsqrt14Fma};
inline constexpr Rule kRules[] = {Rule::kAdamW,   Rule::kAdam,    Rule::kSgd,
                                  Rule::kAdagrad, Rule::kRmsprop, Rule::kLion};

inline RuleHyper random_hyper(Rule rule, std::mt19937& random) {
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  const auto coin = [&] { return random() % 2 == 0; };
  const double betas[] = {0.9, 0.3, 0.5, 0.0};
  RuleHyper hyper;
  hyper.rule = rule;
  hyper.lr = 1e-3 * uniform(random);
  hyper.beta1 = betas[random() % 4];
  hyper.beta2 = coin() ? 0.999 : uniform(random);
  hyper.eps = random() % 4 == 0 ? 0.0 : 1e-8;  // zero: what lies beyond the end may become NaN
  hyper.weight_decay = coin() ? 0.0 : 0.1;
  hyper.momentum = coin() ? 0.0 : 0.9;
  hyper.dampening = coin() ? 0.0 : 0.2;
  hyper.alpha = coin() ? 0.99 : 0.3;
  hyper.lr_decay = coin() ? 0.0 : 0.01;
  hyper.step = 1.0 + static_cast<double>(random() % 1000);
  hyper.maximize = coin();
  hyper.amsgrad = coin();
  hyper.nesterov = coin();
  hyper.centered = coin();
  hyper.first = random() % 4 == 0;
  hyper.rounding.fma = coin();
  return hyper;
}

using Bytes = std::vector<std::byte>;

struct Operands {
  Bytes param, master, grad;
  Bytes state[kMaxStates], scale[kMaxStates];  // empty where there is none
};

struct Problem {
  RuleHyper hyper;
  UpdateFormat format;
  std::vector<float> factors;
  RoundingSeed seed;
  std::size_t n = 0;
  Operands in;
};

inline Bytes to_bytes(const std::vector<float>& values) {
  Bytes bytes(values.size() * sizeof(float));
  if (!bytes.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

inline std::vector<float> to_floats(const Bytes& bytes) {
  std::vector<float> values(bytes.size() / sizeof(float));
  if (!bytes.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

inline Bytes narrowed(ElementType type, const std::vector<float>& values) {
  if (type == ElementType::kFloat32) return to_bytes(values);
  Bytes bytes(values.size() * 2);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::uint16_t bits = update_internal::narrow(type, values[i]);
    std::memcpy(bytes.data() + 2 * i, &bits, sizeof(bits));
  }
  return bytes;
}

// `special`: beside ordinary numbers any bit pattern and special values.
inline std::vector<float> random_floats(std::size_t n, bool special, std::mt19937& random) {
  const float inf = std::numeric_limits<float>::infinity();
  const float specials[] = {
      0.0f,   -0.0f,    inf,     -inf, std::numeric_limits<float>::quiet_NaN(), 1e-45f, -1e-45f,
      1e-38f, -3.4e38f, 3.4e38f, 1.0f};
  std::normal_distribution<float> normal;
  std::vector<float> values(n);
  for (float& value : values) {
    const unsigned kind = special ? static_cast<unsigned>(random() % 8) : 7;
    value = kind == 0   ? std::bit_cast<float>(static_cast<std::uint32_t>(random()))
            : kind == 1 ? specials[random() % std::size(specials)]
                        : normal(random);
  }
  return values;
}

inline void set_state(Problem& problem, std::size_t k, const std::vector<float>& values) {
  const StateFormat format = problem.format.state;
  problem.in.state[k].resize(values.size() * element_bytes(format));
  std::vector<float> scales;
  if (format == StateFormat::kInt8) scales.resize((values.size() + kQuantBlock - 1) / kQuantBlock);
  encode_state(problem.hyper, format, k, values.data(), problem.in.state[k].data(), scales.data(),
               values.size());
  problem.in.scale[k] = to_bytes(scales);
}

inline Problem random_problem(const RuleHyper& hyper, const UpdateFormat& format, std::size_t n,
                              bool special, std::mt19937& random) {
  Problem problem;
  problem.hyper = hyper;
  problem.format = format;
  problem.n = n;
  problem.seed = {random(), random() % 9, kQuantBlock * (random() % 1000)};
  for (std::size_t k = random() % 3; k > 0; --k) {
    problem.factors.push_back(0.001f * static_cast<float>(random() % 2000) - 0.5f);
  }
  problem.in.param = narrowed(format.param, random_floats(n, special, random));
  problem.in.grad = narrowed(format.param, random_floats(n, special, random));
  if (format.has_master()) problem.in.master = to_bytes(random_floats(n, special, random));
  for (std::size_t k = 0; k < state_count(hyper); ++k) {
    std::vector<float> values = random_floats(n, special, random);
    for (float& value : values) {
      if (state_is_unsigned(hyper, k)) value = std::fabs(value);
      // Over the range that the quantization map has, and below.
      if (!special) value *= std::pow(10.0f, -0.01f * static_cast<float>(random() % 900));
    }
    set_state(problem, k, values);
  }
  return problem;
}

// An array at its own distance from an aligned address, between bytes that must not change.
class Guarded {
 public:
  Guarded(const Bytes& from, std::size_t element, std::size_t offset)
      : shift_(kGuard + offset * element), size_(from.size()), buffer_(size_ + 4 * kGuard, kByte) {
    std::copy(from.begin(), from.end(), buffer_.begin() + static_cast<std::ptrdiff_t>(shift_));
  }
  std::byte* data() { return buffer_.data() + shift_; }
  Bytes take() const {
    const auto begin = buffer_.begin() + static_cast<std::ptrdiff_t>(shift_);
    const auto end = begin + static_cast<std::ptrdiff_t>(size_);
    const auto untouched = [](std::byte b) { return b == kByte; };
    CHECK(std::all_of(buffer_.begin(), begin, untouched));
    CHECK(std::all_of(end, buffer_.end(), untouched));
    return {begin, end};
  }

 private:
  static constexpr std::size_t kGuard = 128;
  static constexpr std::byte kByte{0x5a};
  std::size_t shift_;
  std::size_t size_;
  Bytes buffer_;
};

// One step, by step(arrays). Where not `in_place` the outputs are other arrays, and the inputs must
// not change.
template <typename Step>
Operands run_by(Step step, const Problem& problem, bool in_place, std::size_t offset) {
  const std::size_t states = state_count(problem.hyper);
  const std::size_t element = element_bytes(problem.format.param);
  const std::size_t state_element = element_bytes(problem.format.state);
  const Operands& in = problem.in;
  Guarded param(in.param, element, offset % 17), grad(in.grad, element, 3 * offset % 17);
  Guarded master(in.master, 4, 5 * offset % 17);
  std::vector<Guarded> state, scale;
  for (std::size_t k = 0; k < states; ++k) {
    state.emplace_back(in.state[k], state_element, (7 + k) * offset % 17);
    scale.emplace_back(in.scale[k], 4, (9 + k) * offset % 17);
  }
  Guarded param_other = param, master_other = master;
  std::vector<Guarded> state_other = state, scale_other = scale;

  UpdateArrays arrays;
  arrays.n = problem.n;
  arrays.param = param.data();
  arrays.param_out = in_place ? param.data() : param_other.data();
  if (problem.format.has_master()) {
    arrays.master = reinterpret_cast<float*>(master.data());
    arrays.master_out = reinterpret_cast<float*>(in_place ? master.data() : master_other.data());
  }
  arrays.grad = grad.data();
  for (std::size_t k = 0; k < states; ++k) {
    arrays.state[k] = state[k].data();
    arrays.state_out[k] = in_place ? state[k].data() : state_other[k].data();
    if (problem.format.state != StateFormat::kInt8) continue;
    arrays.scale[k] = reinterpret_cast<float*>(scale[k].data());
    arrays.scale_out[k] =
        reinterpret_cast<float*>(in_place ? scale[k].data() : scale_other[k].data());
  }
  step(arrays);

  CHECK(grad.take() == in.grad);
  Operands out;
  out.grad = in.grad;
  out.param = in_place ? param.take() : param_other.take();
  out.master = in_place ? master.take() : master_other.take();
  for (std::size_t k = 0; k < states; ++k) {
    out.state[k] = in_place ? state[k].take() : state_other[k].take();
    out.scale[k] = in_place ? scale[k].take() : scale_other[k].take();
  }
  if (in_place) return out;
  CHECK(param.take() == in.param);
  CHECK(master.take() == in.master);
  for (std::size_t k = 0; k < states; ++k) {
    CHECK(state[k].take() == in.state[k]);
    CHECK(scale[k].take() == in.scale[k]);
  }
  return out;
}

inline Operands run(Isa isa, const Problem& problem, bool in_place, std::size_t offset) {
  const auto step = [&](const UpdateArrays& arrays) {
    update_isa(isa, problem.hyper, problem.format, {problem.factors.data(), problem.factors.size()},
               problem.seed, arrays);
  };
  return run_by(step, problem, in_place, offset);
}

// The same bits, where fp32 numbers may be any NaN.
inline bool same_floats(const Bytes& a, const Bytes& b) {
  if (a.size() != b.size()) return false;
  const std::vector<float> x = to_floats(a), y = to_floats(b);
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (std::isnan(x[i]) && std::isnan(y[i])) continue;
    if (std::bit_cast<std::uint32_t>(x[i]) != std::bit_cast<std::uint32_t>(y[i])) return false;
  }
  return true;
}

inline void check_same(const UpdateFormat& format, const Operands& got, const Operands& want) {
  CHECK((format.has_master() ? got.param == want.param : same_floats(got.param, want.param)));
  CHECK(same_floats(got.master, want.master));
  for (std::size_t k = 0; k < kMaxStates; ++k) {
    CAPTURE(k);
    CHECK((format.state == StateFormat::kFloat32 ? same_floats(got.state[k], want.state[k])
                                                 : got.state[k] == want.state[k]));
    CHECK(got.scale[k] == want.scale[k]);
  }
}

}  // namespace offload
