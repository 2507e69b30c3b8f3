#include "optim/stochastic_rounding.h"

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "optim/narrow_float.h"
#include "update_rule_testing.h"

namespace offload {
namespace {

using update_internal::from_bfloat16;
using update_internal::kBfloat16Nan;
using update_internal::round_stochastically;
using update_internal::rounding_bits;
using update_internal::rounding_key;
using update_internal::RoundingKey;
using update_internal::to_bfloat16;

TEST_CASE("a number is rounded to a neighbour, and what bfloat16 holds stays") {
  std::mt19937 random(1);
  for (int i = 0; i < 100000; ++i) {
    const auto value = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    const auto bits = static_cast<std::uint32_t>(random());
    const std::uint16_t rounded = round_stochastically(value, bits, random() % 3);
    if (std::isnan(value)) {
      CHECK(rounded == kBfloat16Nan);
      continue;
    }
    const std::uint32_t low = std::bit_cast<std::uint32_t>(value) >> 16;
    CHECK((rounded == low || rounded == low + 1));
    const float held = from_bfloat16(static_cast<std::uint16_t>(low));
    CHECK(round_stochastically(held, bits, 0) == low);
  }
  const float inf = std::numeric_limits<float>::infinity();
  CHECK(from_bfloat16(round_stochastically(-inf, 0xffffffff, 0)) == -inf);
  CHECK(round_stochastically(-0.0f, 0xffffffff, 1) == 0x8000);
}

TEST_CASE("rounding is right on average, over elements, over steps and in every state") {
  constexpr int kCount = 1 << 16;
  // Of the gap between neighbours; the mean of kCount coins is right to six standard deviations.
  const double tolerance = 6.0 * 0.5 / std::sqrt(kCount);
  for (const double fraction : {0.5, 0.25, 0.01, 0.9, 1.0 / 512}) {
    const auto value = static_cast<float>(1.0 + fraction * 0x1p-7);
    for (std::size_t k = 0; k < kMaxStates; ++k) {
      int over_elements = 0, over_steps = 0;
      const RoundingKey key = rounding_key({7, 3, 0}, 1, k / 2, 0);
      for (std::uint32_t i = 0; i < kCount; ++i) {
        over_elements += round_stochastically(value, rounding_bits(key, i), k) == 0x3f81;
        const RoundingKey of_step = rounding_key({7, 3, 0}, i, k / 2, 0);
        over_steps += round_stochastically(value, rounding_bits(of_step, 5), k) == 0x3f81;
      }
      CAPTURE(fraction);
      CAPTURE(k);
      CHECK(std::fabs(over_elements / static_cast<double>(kCount) - fraction) <= tolerance);
      CHECK(std::fabs(over_steps / static_cast<double>(kCount) - fraction) <= tolerance);
    }
  }
}

// Bit by bit: each of the 32 random bits agrees with that of another sequence half of the time.
void check_independent(const std::vector<std::uint32_t>& a, const std::vector<std::uint32_t>& b) {
  std::array<int, 32> agreements = {};
  for (std::size_t i = 0; i < a.size(); ++i) {
    for (int bit = 0; bit < 32; ++bit) agreements[bit] += ((a[i] ^ b[i]) >> bit & 1) == 0;
  }
  const double n = static_cast<double>(a.size());
  for (const int agreement : agreements)
    CHECK(std::fabs(agreement / n - 0.5) <= 3.0 / std::sqrt(n));
}

TEST_CASE("seed, parameter, step, pair, and both halves of the position give other bits") {
  constexpr std::size_t kCount = 1 << 16;
  const auto sequence = [](RoundingSeed seed, std::uint64_t step, std::size_t pair,
                           std::uint32_t high, std::uint32_t shift) {
    const RoundingKey key = rounding_key(seed, step, pair, high);
    std::vector<std::uint32_t> bits(kCount);
    for (std::size_t i = 0; i < kCount; ++i) {
      bits[i] = rounding_bits(key, static_cast<std::uint32_t>(i) + shift);
    }
    return bits;
  };
  const std::vector<std::uint32_t> base = sequence({1, 2, 0}, 3, 0, 0, 0);
  check_independent(base, sequence({2, 2, 0}, 3, 0, 0, 0));
  check_independent(base, sequence({1, 3, 0}, 3, 0, 0, 0));
  check_independent(base, sequence({1, 2, 0}, 4, 0, 0, 0));
  check_independent(base, sequence({1, 2, 0}, 3, 1, 0, 0));
  check_independent(base, sequence({1, 2, 0}, 3, 0, 1, 0));
  check_independent(base, sequence({1, 2, 0}, 3, 0, 0, 1));
  check_independent(base, sequence({2, 1, 0}, 3, 0, 0, 0));
  check_independent(sequence({0, 0, 0}, 0, 0, 0, 0), sequence({0, 0, 0}, 1, 0, 0, 0));
}

// One update in pieces of `piece` elements (a multiple of kQuantBlock) instead of at once.
Operands in_pieces(Isa isa, const Problem& problem, std::size_t piece) {
  Operands out = problem.in;
  for (std::size_t first = 0; first < problem.n; first += piece) {
    UpdateArrays arrays;
    arrays.n = std::min(piece, problem.n - first);
    const std::size_t element = element_bytes(problem.format.param);
    const std::size_t state = element_bytes(problem.format.state);
    arrays.param = arrays.param_out = out.param.data() + first * element;
    arrays.grad = out.grad.data() + first * element;
    if (problem.format.has_master()) {
      arrays.master = arrays.master_out = reinterpret_cast<float*>(out.master.data() + 4 * first);
    }
    for (std::size_t k = 0; k < state_count(problem.hyper); ++k) {
      arrays.state[k] = arrays.state_out[k] = out.state[k].data() + first * state;
      if (problem.format.state != StateFormat::kInt8) continue;
      auto* scales = reinterpret_cast<float*>(out.scale[k].data());
      arrays.scale[k] = arrays.scale_out[k] = scales + first / kQuantBlock;
    }
    RoundingSeed seed = problem.seed;
    seed.first += first;
    update_isa(isa, problem.hyper, problem.format, {problem.factors.data(), problem.factors.size()},
               seed, arrays);
  }
  return out;
}

TEST_CASE("an update has the same bits in whatever pieces, across 2^32 elements too") {
  std::mt19937 random(2);
  for (const Rule rule : kRules) {
    for (const StateFormat state :
         {StateFormat::kFloat32, StateFormat::kBfloat16, StateFormat::kInt8}) {
      for (const ElementType param : {ElementType::kFloat32, ElementType::kBfloat16}) {
        Problem problem =
            random_problem(random_hyper(rule, random), {param, state}, 5000, false, random);
        problem.hyper.rounding = {};
        problem.seed.first = (std::uint64_t{1} << 32) - 1024;
        const Operands want = run(Isa::kScalar, problem, true, 0);
        for (const Isa isa : kIsas) {
          if (!isa_available(isa)) continue;
          for (const std::size_t piece : {256, 768, 1024, 2048}) {
            CAPTURE(isa_name(isa));
            CAPTURE(piece);
            check_same(problem.format, in_pieces(isa, problem, piece), want);
          }
        }
      }
    }
  }
}

TEST_CASE("bfloat16 states take small changes with the right frequency") {
  // exp_avg of a constant gradient: each change is a hundredth of what bfloat16 can hold.
  Problem problem;
  problem.hyper = {.rule = Rule::kLion, .lr = 0.0, .beta1 = 0.9, .beta2 = 0.9999};
  problem.format.state = StateFormat::kBfloat16;
  problem.n = 4096;
  problem.in.param = problem.in.grad = to_bytes(std::vector<float>(problem.n, 1.0f));
  set_state(problem, 0, std::vector<float>(problem.n, 0.5f));
  const int steps = 400;
  for (int step = 1; step <= steps; ++step) {
    problem.hyper.step = step;
    problem.in.state[0] = run(best_isa(), problem, true, 0).state[0];
  }
  std::vector<float> values(problem.n);
  decode_state(problem.hyper, problem.format.state, 0, problem.in.state[0].data(), nullptr,
               values.data(), problem.n);
  double mean = 0.0;
  for (const float value : values) mean += value / static_cast<double>(problem.n);
  const double exact = 1.0 - 0.5 * std::pow(0.9999, steps);
  CHECK(std::fabs(mean - exact) < 0.05 * (exact - 0.5));
  CHECK(from_bfloat16(to_bfloat16(0.5f + 0.5e-4f)) == 0.5f);  // to nearest, it would stand still
}

}  // namespace
}  // namespace offload
