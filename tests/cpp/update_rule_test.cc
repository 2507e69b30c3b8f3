// Every rule and format: the bits of the scalar reference on each instruction set.
#include "optim/update_rule.h"

#include <array>
#include <string>
#include <tuple>

#include "optim/rule_kernels.h"
#include "update_rule_testing.h"

namespace offload {
namespace {

constexpr ElementType kParams[] = {ElementType::kFloat32, ElementType::kBfloat16,
                                   ElementType::kFloat16};
constexpr StateFormat kStates[] = {StateFormat::kFloat32, StateFormat::kBfloat16,
                                   StateFormat::kInt8};

void check_all(const Problem& problem, std::mt19937& random) {
  const Operands want = run(Isa::kScalar, problem, false, 0);
  // Narrow states know no rule for square roots but IEEE 754's.
  const bool narrow = problem.format.state != StateFormat::kFloat32;
  for (const Isa isa : kIsas) {
    if (!isa_available(isa)) continue;
    if (!narrow && !sqrt_rule_available(isa, problem.hyper.rounding.sqrt)) continue;
    CAPTURE(isa_name(isa));
    check_same(problem.format, run(isa, problem, false, random() % 17), want);
    check_same(problem.format, run(isa, problem, true, random() % 17), want);
  }
}

TEST_CASE("every rule has the reference's bits on every instruction set: fp32") {
  std::mt19937 random(1);
  for (const Rule rule : kRules) {
    for (std::size_t n = 0; n <= 300; n += n < 70 ? 1 : 23) {
      for (const SqrtRule sqrt : kSqrtRules) {
        if (!sqrt_rule_available(Isa::kScalar, sqrt)) continue;
        RuleHyper hyper = random_hyper(rule, random);
        hyper.rounding.sqrt = sqrt;
        CAPTURE(static_cast<int>(rule));
        CAPTURE(sqrt_rule_name(sqrt));
        CAPTURE(n);
        check_all(random_problem(hyper, {}, n, random() % 4 != 0, random), random);
      }
    }
  }
}

TEST_CASE("every rule has the reference's bits on every instruction set: other formats") {
  std::mt19937 random(2);
  const std::size_t sizes[] = {1, 15, 17, 64, 255, 256, 257, 511, 1024, 1025, 1300, 3001};
  for (const Rule rule : kRules) {
    for (const ElementType param : kParams) {
      for (const StateFormat state : kStates) {
        for (const std::size_t n : sizes) {
          for (const bool special : {false, true}) {
            RuleHyper hyper = random_hyper(rule, random);
            hyper.rounding.sqrt = kSqrtRules[random() % 4];
            if (!sqrt_rule_available(Isa::kScalar, hyper.rounding.sqrt)) hyper.rounding = {};
            CAPTURE(static_cast<int>(rule));
            CAPTURE(static_cast<int>(param));
            CAPTURE(static_cast<int>(state));
            CAPTURE(special);
            CAPTURE(n);
            check_all(random_problem(hyper, {param, state}, n, special, random), random);
          }
        }
      }
    }
  }
}

TEST_CASE("a division by a constant is exact: AdamW's denominators over all mantissas") {
  // The quotient of sqrt(v) and a constant, by multiplication, is v's only way into the parameter.
  std::mt19937 random(3);
  for (int round = 0; round < 40; ++round) {
    RuleHyper hyper{.lr = 1.0, .beta1 = 0.9, .beta2 = 1.0};
    hyper.beta2 = 1.0 - std::pow(10.0, -0.01 * static_cast<double>(random() % 800));
    hyper.step = 1.0 + static_cast<double>(random() % 100);
    Problem problem;
    problem.hyper = hyper;
    problem.n = 1 << 16;
    std::vector<float> v(problem.n);
    for (float& x : v) {
      x = std::bit_cast<float>(static_cast<std::uint32_t>(random() % 0x7f000000u));
    }
    problem.in.param = to_bytes(std::vector<float>(problem.n, 0.0f));
    problem.in.grad = to_bytes(std::vector<float>(problem.n, 0.0f));
    problem.in.state[0] = to_bytes(std::vector<float>(problem.n, 1.0f));
    problem.in.state[1] = to_bytes(v);
    check_all(problem, random);
  }
}

#if defined(__x86_64__)

TEST_CASE("a reciprocal by an estimate has the divider's bits: in every rule that divides") {
  if (!isa_available(Isa::kAvx512)) return;
  std::mt19937 random(4);
  int estimates = 0;
  for (const Rule rule : kRules) {
    for (const StateFormat state : {StateFormat::kBfloat16, StateFormat::kInt8}) {
      for (int round = 0; round < 12; ++round) {
        RuleHyper hyper = random_hyper(rule, random);
        if (round % 2 == 0) hyper.eps = 1e-8;
        const Problem problem =
            random_problem(hyper, {.state = state}, 700, round % 3 == 0, random);
        const auto by = [&](bool divider) {
          const auto step = [&](const UpdateArrays& arrays) {
            update_internal::UpdateCall call = update_internal::make_call(
                hyper, problem.format, {problem.factors.data(), problem.factors.size()},
                problem.seed, arrays);
            const float eps = call.scalars.eps;
            if (eps < 0x1p-60f) divider = true;
            if (!divider) ++estimates;
            call.scalars.by_divider = divider;
            update_internal::update_avx512(call);
          };
          return run_by(step, problem, false, 0);
        };
        CAPTURE(static_cast<int>(rule));
        CAPTURE(round);
        check_same(problem.format, by(false), by(true));
      }
    }
  }
  CHECK(estimates > 6 * 2 * 6 - 1);
}

TEST_CASE("a reciprocal by an estimate is correctly rounded: all mantissas") {
  if (!isa_available(Isa::kAvx512)) return;
  // The denominator is |g| + eps, rounded: g. The parameter, 1, becomes 1 - g * (1 / g): what the
  // reciprocal lacks, and exact.
  const RuleHyper hyper{.rule = Rule::kAdagrad, .lr = 1.0, .eps = 0x1p-60};
  constexpr std::size_t kPart = 1 << 16;
  std::vector<float> grad(kPart), param(kPart), want(kPart);
  for (std::uint32_t first = 0; first < 1u << 23; first += kPart) {
    for (std::uint32_t i = 0; i < kPart; ++i) {
      grad[i] = std::bit_cast<float>(0x3f800000u + first + i);
    }
    const auto step = [&](bool divider, std::vector<float>& to) {
      std::fill(to.begin(), to.end(), 1.0f);
      std::vector<std::uint16_t> sum(kPart, 0);
      UpdateArrays arrays;
      arrays.n = kPart;
      arrays.param = arrays.param_out = to.data();
      arrays.grad = grad.data();
      arrays.state[0] = arrays.state_out[0] = sum.data();
      update_internal::UpdateCall call =
          update_internal::make_call(hyper, {.state = StateFormat::kBfloat16}, {}, {}, arrays);
      call.scalars.by_divider = divider;
      update_internal::update_avx512(call);
    };
    step(false, param);
    step(true, want);
    REQUIRE(param == want);
  }
}

#endif

// Recorded from torch 2.13's own mul_, lerp_, addcmul_, div, add_ and addcdiv_ under its AVX512 and
// DEFAULT dispatch, with a correctly rounded square root in place of MKL's.
TEST_CASE("AdamW has torch's bits on recorded steps") {
  using Words = std::array<std::uint32_t, 8>;
  const auto bytes = [](const Words& words) {
    Bytes made(sizeof(words));
    std::memcpy(made.data(), words.data(), sizeof(words));
    return made;
  };
  const Words param = {0x3aa13d19, 0x3e98f52d, 0xbe8c5bcc, 0xbf63fdd4,
                       0xbee8ca9c, 0xbf7ddc8c, 0x3d765923, 0x3fab8c2c};
  const Words grad = {0xbefc027e, 0xbf1ed771, 0x3efacc94, 0x3eb6b9e5,
                      0x3dd7e36d, 0xbf6e3327, 0xbcefa185, 0x3f31ff64};
  const Words exp_avg = {0xbe09a5c7, 0xbd3b707e, 0xbe42af6a, 0xbe040c75,
                         0xbe3c97fb, 0xbcc0962f, 0xbe01c959, 0x3cde3842};
  const Words exp_avg_sq = {0x39bb1142, 0x3ba8b801, 0x3b98c432, 0x3c1644ce,
                            0x3bce2f53, 0x3ba87750, 0x3ba2d0c4, 0x3b22361d};
  struct Recorded {
    RuleHyper hyper;
    Words param, exp_avg, exp_avg_sq;
  };
  const auto hyper = [](double beta1, double beta2, double eps, double decay, double step,
                        bool fma) {
    RuleHyper made{.lr = 1e-2, .beta1 = beta1, .beta2 = beta2, .eps = eps, .weight_decay = decay};
    made.step = step;
    made.rounding.fma = fma;
    return made;
  };
  const Recorded cases[] = {
      {hyper(0.9, 0.999, 1e-8, 0.1, 3.0, true),
       {0x3c7624d8, 0x3e9a59c9, 0xbe8a885c, 0xbf635c80, 0xbee68e6d, 0xbf7cc5d5, 0x3d81f210,
        0x3faae497},
       {0xbe35b1a0, 0xbde619cc, 0xbdeb5de2, 0xbd99da53, 0xbe1d5a65, 0xbe02f3bb, 0xbdf07cb5,
        0x3dd5547f},
       {0x3a30fe3a, 0x3bb9259a, 0x3ba2f527, 0x3c18dd2a, 0x3bce752e, 0x3bcd9ef2, 0x3ba2b087,
        0x3b4bbb58}},
      {hyper(0.3, 0.95, 1e-6, 0.01, 1000.0, true),
       {0x3d10de0b, 0x3ea80530, 0xbe98743e, 0xbf68d27a, 0xbeea9ae2, 0xbf76128f, 0x3d8d6374,
        0x3fa79b80},
       {0xbedefc5b, 0xbf030c63, 0x3eac29f0, 0x3e7dce9a, 0x3cf0b8e8, 0xbf410e5e, 0xbd7bf193,
        0x3f10ff62},
       {0x3c855404, 0x3cf787f7, 0x3ca59507, 0x3c8c0359, 0x3bdbd3eb, 0x3d7d4698, 0x3b9c84e4,
        0x3d0be3ba}},
      {hyper(0.9, 0.999, 1e-8, 0.1, 3.0, false),
       {0x3c7624d8, 0x3e9a59c9, 0xbe8a885c, 0xbf635c80, 0xbee68e6d, 0xbf7cc5d5, 0x3d81f210,
        0x3faae497},
       {0xbe35b1a0, 0xbde619cc, 0xbdeb5de2, 0xbd99da54, 0xbe1d5a65, 0xbe02f3bb, 0xbdf07cb5,
        0x3dd55480},
       {0x3a30fe3a, 0x3bb9259a, 0x3ba2f527, 0x3c18dd2a, 0x3bce752e, 0x3bcd9ef2, 0x3ba2b087,
        0x3b4bbb58}},
      {hyper(0.3, 0.95, 1e-6, 0.01, 1000.0, false),
       {0x3d10de0b, 0x3ea80530, 0xbe98743e, 0xbf68d27a, 0xbeea9ae2, 0xbf76128f, 0x3d8d6374,
        0x3fa79b80},
       {0xbedefc5a, 0xbf030c63, 0x3eac29f0, 0x3e7dce9a, 0x3cf0b8e8, 0xbf410e5e, 0xbd7bf193,
        0x3f10ff62},
       {0x3c855403, 0x3cf787f8, 0x3ca59506, 0x3c8c0358, 0x3bdbd3eb, 0x3d7d4698, 0x3b9c84e4,
        0x3d0be3ba}},
  };
  for (const Recorded& recorded : cases) {
    Problem problem;
    problem.hyper = recorded.hyper;
    problem.n = 8;
    problem.factors = {0.37f, 3.1f};
    problem.in.param = bytes(param);
    problem.in.grad = bytes(grad);
    problem.in.state[0] = bytes(exp_avg);
    problem.in.state[1] = bytes(exp_avg_sq);
    Operands want = problem.in;
    want.param = bytes(recorded.param);
    want.state[0] = bytes(recorded.exp_avg);
    want.state[1] = bytes(recorded.exp_avg_sq);
    for (const Isa isa : kIsas) {
      if (!isa_available(isa)) continue;
      CAPTURE(isa_name(isa));
      CAPTURE(recorded.hyper.rounding.fma);
      check_same({}, run(isa, problem, true, 0), want);
    }
  }
}

// On every instruction set whose bits were compared above.
TEST_CASE("a division of narrow states is within 1.01 units of the last place of the quotient") {
  std::mt19937 random(7);
  double worst = 0.0;
  for (const int exponent : {-126, -40, -1, 0, 1, 60, 124}) {
    // RMSprop from a state that is kept: p = -g / (sqrt(v) + eps), with v = 0 and eps the divisor.
    for (int round = 0; round < 400; ++round) {
      const double mantissa = 1.0 + static_cast<double>(random() % (1 << 23)) * 0x1p-23;
      const double divisor = std::ldexp(mantissa, exponent);
      RuleHyper hyper{.rule = Rule::kRmsprop, .lr = 1.0, .eps = divisor, .alpha = 1.0};
      Problem problem;
      problem.hyper = hyper;
      problem.format.state = StateFormat::kBfloat16;
      problem.n = 1;
      problem.in.param = to_bytes({0.0f});
      problem.in.grad = to_bytes({-1.0f});
      problem.in.state[0] = Bytes(2);
      const double got = to_floats(run(Isa::kScalar, problem, true, 0).param)[0];
      const double want = 1.0 / divisor;
      const double ulp = std::ldexp(1.0, std::ilogb(want) - 23);
      worst = std::max(worst, std::fabs(got - want) / ulp);
    }
  }
  CHECK(worst > 0.3);
  CHECK(worst <= 1.01);
}

TEST_CASE("narrow states: what is broken does not become sound") {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const StateFormat state : {StateFormat::kBfloat16, StateFormat::kInt8}) {
    for (const float g : {0.0f, nan, inf, -inf}) {
      // 0 / 0 where eps is zero; nothing where it is not.
      for (const double eps : {0.0, 1e-8}) {
        Problem problem;
        problem.hyper = {.lr = 1e-3, .beta1 = 0.9, .beta2 = 0.999, .eps = eps, .step = 3.0};
        problem.format.state = state;
        problem.n = 300;
        problem.in.param = to_bytes(std::vector<float>(problem.n, 1.0f));
        problem.in.grad = to_bytes(std::vector<float>(problem.n, g));
        for (std::size_t k = 0; k < 2; ++k) set_state(problem, k, std::vector<float>(problem.n));
        for (const Isa isa : kIsas) {
          if (!isa_available(isa)) continue;
          CAPTURE(isa_name(isa));
          CAPTURE(g);
          CAPTURE(eps);
          const bool sound = g == 0.0f && eps != 0.0;
          for (const float p : to_floats(run(isa, problem, true, 1).param)) {
            CHECK(std::isfinite(p) == sound);
          }
        }
      }
    }
  }
}

TEST_CASE("gradient factors apply one after another, in order, each rounded to its type") {
  std::mt19937 random(4);
  for (const ElementType param : kParams) {
    const RuleHyper hyper{.lr = 1e-3, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .step = 5.0};
    Problem problem = random_problem(hyper, {param, StateFormat::kFloat32}, 37, false, random);
    const bool half = param == ElementType::kFloat16;
    const float big = half ? 3e4f : 1e30f;
    for (const auto& factors : {std::vector<float>{big, 1.0f / big, 0.37f},
                                std::vector<float>{1e-3f / big, big, 0.37f}}) {
      problem.factors = factors;
      Problem multiplied = problem;
      multiplied.factors.clear();
      std::vector<float> g(problem.n);
      for (std::size_t i = 0; i < g.size(); ++i) {
        if (param == ElementType::kFloat32) {
          g[i] = to_floats(problem.in.grad)[i];
          for (const float factor : factors) g[i] *= factor;
          continue;
        }
        std::uint16_t bits;
        std::memcpy(&bits, problem.in.grad.data() + 2 * i, sizeof(bits));
        for (const float factor : factors) {
          bits = update_internal::narrow(param, update_internal::widen(param, bits) * factor);
        }
        g[i] = update_internal::widen(param, bits);
      }
      multiplied.in.grad = narrowed(param, g);
      for (const Isa isa : kIsas) {
        if (!isa_available(isa)) continue;
        CAPTURE(isa_name(isa));
        Operands want = run(isa, multiplied, false, 1);
        check_same(problem.format, run(isa, problem, false, 1), want);
      }
    }
  }
}

TEST_CASE("a 16-bit parameter is its master, rounded") {
  std::mt19937 random(5);
  for (const auto& [param, state, unscale] :
       {std::tuple(ElementType::kBfloat16, StateFormat::kFloat32, 1.0f),
        std::tuple(ElementType::kFloat16, StateFormat::kFloat32, 1.0f),
        std::tuple(ElementType::kFloat16, StateFormat::kFloat32, 0x1p-24f),
        std::tuple(ElementType::kBfloat16, StateFormat::kBfloat16, 0.37f),
        std::tuple(ElementType::kFloat16, StateFormat::kInt8, 0.37f)}) {
    const RuleHyper hyper{
        .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .step = 5.0, .unscale = unscale};
    const Problem problem = random_problem(hyper, {param, state}, 300, true, random);
    const Operands out = run(best_isa(), problem, true, 3);
    CHECK(out.param == narrowed(param, to_floats(out.master)));
    // The master takes the steps that the parameter is too coarse for.
    Problem widened = problem;
    widened.format = {ElementType::kFloat32, state};
    widened.in.param = problem.in.master;
    widened.in.grad = to_bytes(std::vector<float>(problem.n));
    for (std::size_t i = 0; i < problem.n; ++i) {
      std::uint16_t bits;
      std::memcpy(&bits, problem.in.grad.data() + 2 * i, sizeof(bits));
      float g = update_internal::widen(param, bits);
      for (const float factor : problem.factors) {
        g = update_internal::widen(param, update_internal::narrow(param, g * factor));
      }
      g *= unscale;  // in fp32
      std::memcpy(widened.in.grad.data() + 4 * i, &g, sizeof(g));
    }
    widened.factors.clear();
    CHECK(same_floats(run(best_isa(), widened, true, 0).param, out.master));
  }
}

TEST_CASE("update is update_isa on the best instruction set") {
  std::mt19937 random(6);
  const RuleHyper hyper = random_hyper(Rule::kAdam, random);
  Problem problem = random_problem(hyper, {}, 133, false, random);
  const Operands want = run(best_isa(), problem, false, 0);
  UpdateArrays arrays;
  arrays.n = problem.n;
  arrays.param = arrays.param_out = problem.in.param.data();
  arrays.grad = problem.in.grad.data();
  for (std::size_t k = 0; k < state_count(hyper); ++k) {
    arrays.state[k] = arrays.state_out[k] = problem.in.state[k].data();
  }
  update(hyper, {}, {problem.factors.data(), problem.factors.size()}, problem.seed, arrays);
  check_same({}, problem.in, want);
}

TEST_CASE("state counts and bytes") {
  RuleHyper hyper;
  const auto count = [&](Rule rule) {
    hyper.rule = rule;
    return state_count(hyper);
  };
  CHECK(count(Rule::kAdamW) == 2);
  CHECK(count(Rule::kSgd) == 0);
  CHECK(count(Rule::kAdagrad) == 1);
  CHECK(count(Rule::kRmsprop) == 1);
  CHECK(count(Rule::kLion) == 1);
  hyper.amsgrad = hyper.centered = true;
  hyper.momentum = 0.5;
  CHECK(count(Rule::kAdam) == 3);
  CHECK(count(Rule::kSgd) == 1);
  CHECK(count(Rule::kRmsprop) == 3);
  CHECK(state_is_unsigned(hyper, 0));
  CHECK_FALSE(state_is_unsigned(hyper, 1));
  CHECK_FALSE(state_is_unsigned(hyper, 2));
  CHECK(element_bytes(ElementType::kFloat32) == 4);
  CHECK(element_bytes(ElementType::kFloat16) == 2);
  CHECK(element_bytes(StateFormat::kFloat32) == 4);
  CHECK(element_bytes(StateFormat::kBfloat16) == 2);
  CHECK(element_bytes(StateFormat::kInt8) == 1);
}

}  // namespace
}  // namespace offload
