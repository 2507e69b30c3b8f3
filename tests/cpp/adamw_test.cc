#include "optim/adamw.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <random>
#include <vector>

#include "doctest/doctest.h"

namespace offload {
namespace {

constexpr Isa kIsas[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kNeon};
constexpr SqrtRule kRules[] = {SqrtRule::kIeee, SqrtRule::kRsqrt, SqrtRule::kRsqrtFma,
                               SqrtRule::kRsqrt14Fma};
constexpr float kGuard = 12345.0f;

// The same bits, or both NaN.
bool same(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!same(a[i], b[i])) return false;
  }
  return true;
}

struct Arrays {
  std::vector<float> param, grad, exp_avg, exp_avg_sq;
};

// Ordinary numbers, any bit pattern, and special values.
Arrays random_arrays(std::size_t n, std::mt19937& random) {
  const float inf = std::numeric_limits<float>::infinity();
  const float special[] = {
      0.0f,   -0.0f,    inf,     -inf, std::numeric_limits<float>::quiet_NaN(), 1e-45f, -1e-45f,
      1e-38f, -3.4e38f, 3.4e38f, 1.0f};
  std::normal_distribution<float> normal;
  const auto number = [&] {
    const unsigned kind = random() % 8;
    if (kind == 0) return std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    if (kind == 1) return special[random() % std::size(special)];
    return normal(random);
  };
  Arrays arrays;
  for (auto* array : {&arrays.param, &arrays.grad, &arrays.exp_avg, &arrays.exp_avg_sq}) {
    for (std::size_t i = 0; i < n; ++i) array->push_back(number());
  }
  for (float& v : arrays.exp_avg_sq) v = std::fabs(v);
  return arrays;
}

// Runs one step on copies whose first elements are `offset` floats into their buffers, and checks
// that nothing around the outputs and no input (but for in-place outputs) was written.
Arrays run(Isa isa, const AdamWHyper& hyper, const std::vector<float>& factors, const Arrays& in,
           bool in_place, std::size_t offset) {
  const std::size_t n = in.param.size();
  const auto padded = [&](const std::vector<float>& from, std::size_t shift) {
    std::vector<float> buffer(n + 64, kGuard);
    std::copy(from.begin(), from.end(), buffer.begin() + static_cast<std::ptrdiff_t>(shift));
    return buffer;
  };
  const std::size_t shift[4] = {offset % 17, (3 * offset) % 17, (5 * offset) % 17,
                                (7 * offset) % 17};
  std::vector<float> p = padded(in.param, shift[0]), g = padded(in.grad, shift[1]);
  std::vector<float> m = padded(in.exp_avg, shift[2]), v = padded(in.exp_avg_sq, shift[3]);
  const std::vector<float> p_before = p, g_before = g, m_before = m, v_before = v;
  std::vector<float> p_other = padded({}, 0), m_other = padded({}, 0), v_other = padded({}, 0);
  std::vector<float>& p_out = in_place ? p : p_other;
  std::vector<float>& m_out = in_place ? m : m_other;
  std::vector<float>& v_out = in_place ? v : v_other;

  adamw_update_isa(isa, hyper, {factors.data(), factors.size()}, p.data() + shift[0],
                   g.data() + shift[1], m.data() + shift[2], v.data() + shift[3],
                   p_out.data() + shift[0], m_out.data() + shift[2], v_out.data() + shift[3], n);

  CHECK(same(g, g_before));
  if (!in_place) {
    CHECK(same(p, p_before));
    CHECK(same(m, m_before));
    CHECK(same(v, v_before));
  }
  const auto cut = [&](const std::vector<float>& buffer, std::size_t first) {
    for (std::size_t i = 0; i < buffer.size(); ++i) {
      if (i < first || i >= first + n) REQUIRE(buffer[i] == kGuard);
    }
    const auto begin = buffer.begin() + static_cast<std::ptrdiff_t>(first);
    return std::vector<float>(begin, begin + static_cast<std::ptrdiff_t>(n));
  };
  return {cut(p_out, shift[0]), in.grad, cut(m_out, shift[2]), cut(v_out, shift[3])};
}

void check_same(const Arrays& got, const Arrays& want) {
  CHECK(same(got.param, want.param));
  CHECK(same(got.exp_avg, want.exp_avg));
  CHECK(same(got.exp_avg_sq, want.exp_avg_sq));
}

TEST_CASE("adamw has the scalar reference's bits on every instruction set") {
  std::mt19937 random(1);
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  const double beta1s[] = {0.9, 0.3, 0.5, 0.0};
  for (std::size_t n = 0; n <= 300; n += n < 70 ? 1 : 23) {
    for (const SqrtRule rule : kRules) {
      for (const bool fma : {true, false}) {
        if (!sqrt_rule_available(Isa::kScalar, rule)) continue;
        const AdamWHyper hyper{.lr = 1e-3,
                               .beta1 = beta1s[random() % 4],
                               .beta2 = 0.999,
                               .eps = 1e-8,
                               .weight_decay = random() % 2 == 0 ? 0.0 : 0.1,
                               .step = 1.0 + static_cast<double>(random() % 1000),
                               .maximize = random() % 2 == 0,
                               .rounding = {.fma = fma, .sqrt = rule}};
        std::vector<float> factors(random() % 4);
        for (float& factor : factors) factor = static_cast<float>(2.0 * uniform(random) - 0.5);
        const Arrays in = random_arrays(n, random);
        const Arrays want = run(Isa::kScalar, hyper, factors, in, false, 0);
        for (const Isa isa : kIsas) {
          if (!sqrt_rule_available(isa, rule)) continue;
          CAPTURE(isa_name(isa));
          CAPTURE(sqrt_rule_name(rule));
          CAPTURE(n);
          check_same(run(isa, hyper, factors, in, false, random() % 17), want);
          check_same(run(isa, hyper, factors, in, true, random() % 17), want);
        }
      }
    }
  }
}

std::vector<float> from_bits(const std::array<std::uint32_t, 8>& bits) {
  std::vector<float> values;
  for (const std::uint32_t word : bits) values.push_back(std::bit_cast<float>(word));
  return values;
}

// Recorded from torch 2.13's own mul_, lerp_, addcmul_, div, add_ and addcdiv_ under its AVX512 and
// DEFAULT dispatch, with a correctly rounded square root in place of MKL's.
TEST_CASE("adamw has torch's bits on recorded steps") {
  const Arrays in{from_bits({0x3aa13d19, 0x3e98f52d, 0xbe8c5bcc, 0xbf63fdd4, 0xbee8ca9c, 0xbf7ddc8c,
                             0x3d765923, 0x3fab8c2c}),
                  from_bits({0xbefc027e, 0xbf1ed771, 0x3efacc94, 0x3eb6b9e5, 0x3dd7e36d, 0xbf6e3327,
                             0xbcefa185, 0x3f31ff64}),
                  from_bits({0xbe09a5c7, 0xbd3b707e, 0xbe42af6a, 0xbe040c75, 0xbe3c97fb, 0xbcc0962f,
                             0xbe01c959, 0x3cde3842}),
                  from_bits({0x39bb1142, 0x3ba8b801, 0x3b98c432, 0x3c1644ce, 0x3bce2f53, 0x3ba87750,
                             0x3ba2d0c4, 0x3b22361d})};
  struct Recorded {
    AdamWHyper hyper;
    std::array<std::uint32_t, 8> param, exp_avg, exp_avg_sq;
  };
  const Recorded cases[] = {
      {{1e-2, 0.9, 0.999, 1e-8, 0.1, 3.0, false, {.fma = true}},
       {0x3c7624d8, 0x3e9a59c9, 0xbe8a885c, 0xbf635c80, 0xbee68e6d, 0xbf7cc5d5, 0x3d81f210,
        0x3faae497},
       {0xbe35b1a0, 0xbde619cc, 0xbdeb5de2, 0xbd99da53, 0xbe1d5a65, 0xbe02f3bb, 0xbdf07cb5,
        0x3dd5547f},
       {0x3a30fe3a, 0x3bb9259a, 0x3ba2f527, 0x3c18dd2a, 0x3bce752e, 0x3bcd9ef2, 0x3ba2b087,
        0x3b4bbb58}},
      {{1e-2, 0.3, 0.95, 1e-6, 0.01, 1000.0, false, {.fma = true}},
       {0x3d10de0b, 0x3ea80530, 0xbe98743e, 0xbf68d27a, 0xbeea9ae2, 0xbf76128f, 0x3d8d6374,
        0x3fa79b80},
       {0xbedefc5b, 0xbf030c63, 0x3eac29f0, 0x3e7dce9a, 0x3cf0b8e8, 0xbf410e5e, 0xbd7bf193,
        0x3f10ff62},
       {0x3c855404, 0x3cf787f7, 0x3ca59507, 0x3c8c0359, 0x3bdbd3eb, 0x3d7d4698, 0x3b9c84e4,
        0x3d0be3ba}},
      {{1e-2, 0.9, 0.999, 1e-8, 0.1, 3.0, false, {.fma = false}},
       {0x3c7624d8, 0x3e9a59c9, 0xbe8a885c, 0xbf635c80, 0xbee68e6d, 0xbf7cc5d5, 0x3d81f210,
        0x3faae497},
       {0xbe35b1a0, 0xbde619cc, 0xbdeb5de2, 0xbd99da54, 0xbe1d5a65, 0xbe02f3bb, 0xbdf07cb5,
        0x3dd55480},
       {0x3a30fe3a, 0x3bb9259a, 0x3ba2f527, 0x3c18dd2a, 0x3bce752e, 0x3bcd9ef2, 0x3ba2b087,
        0x3b4bbb58}},
      {{1e-2, 0.3, 0.95, 1e-6, 0.01, 1000.0, false, {.fma = false}},
       {0x3d10de0b, 0x3ea80530, 0xbe98743e, 0xbf68d27a, 0xbeea9ae2, 0xbf76128f, 0x3d8d6374,
        0x3fa79b80},
       {0xbedefc5a, 0xbf030c63, 0x3eac29f0, 0x3e7dce9a, 0x3cf0b8e8, 0xbf410e5e, 0xbd7bf193,
        0x3f10ff62},
       {0x3c855403, 0x3cf787f8, 0x3ca59506, 0x3c8c0358, 0x3bdbd3eb, 0x3d7d4698, 0x3b9c84e4,
        0x3d0be3ba}},
  };
  for (const Recorded& recorded : cases) {
    const Arrays want{from_bits(recorded.param), in.grad, from_bits(recorded.exp_avg),
                      from_bits(recorded.exp_avg_sq)};
    for (const Isa isa : kIsas) {
      if (!isa_available(isa)) continue;
      CAPTURE(isa_name(isa));
      CAPTURE(recorded.hyper.rounding.fma);
      check_same(run(isa, recorded.hyper, {0.37f, 3.1f}, in, true, 0), want);
    }
  }
}

TEST_CASE("adamw applies gradient factors one after another, in order") {
  std::mt19937 random(2);
  Arrays in = random_arrays(37, random);
  for (float& g : in.grad) g = 1e-20f + 1e-22f * static_cast<float>(random() % 100);
  const AdamWHyper hyper{1e-3, 0.9, 0.999, 1e-8, 0.1, 5.0, false};
  const std::vector<float> up_first = {1e30f, 1e-30f, 0.37f}, down_first = {1e-30f, 1e30f, 0.37f};
  for (const Isa isa : kIsas) {
    if (!isa_available(isa)) continue;
    CAPTURE(isa_name(isa));
    for (const auto& factors : {up_first, down_first}) {
      Arrays multiplied = in;
      for (float& g : multiplied.grad) {
        for (const float factor : factors) g *= factor;
      }
      check_same(run(isa, hyper, factors, in, false, 1), run(isa, hyper, {}, multiplied, false, 1));
    }
    CHECK_FALSE(same(run(isa, hyper, up_first, in, false, 0).exp_avg,
                     run(isa, hyper, down_first, in, false, 0).exp_avg));
  }
}

TEST_CASE("adamw maximizes by negating the gradient") {
  std::mt19937 random(3);
  const Arrays in = random_arrays(41, random);
  Arrays negated = in;
  for (float& g : negated.grad) g = -g;
  for (const Isa isa : kIsas) {
    if (!isa_available(isa)) continue;
    check_same(run(isa, {1e-3, 0.9, 0.999, 1e-8, 0.1, 5.0, true}, {}, in, false, 2),
               run(isa, {1e-3, 0.9, 0.999, 1e-8, 0.1, 5.0, false}, {}, negated, false, 2));
  }
}

TEST_CASE("adamw_update is adamw_update_isa on the best instruction set") {
  std::mt19937 random(4);
  const Arrays in = random_arrays(133, random);
  const AdamWHyper hyper{1e-3, 0.9, 0.999, 1e-8, 0.1, 5.0, false};
  const Arrays want = run(best_isa(), hyper, {0.5f}, in, false, 0);
  Arrays got = in;
  const float factor = 0.5f;
  adamw_update(hyper, {&factor, 1}, got.param.data(), got.grad.data(), got.exp_avg.data(),
               got.exp_avg_sq.data(), got.param.data(), got.exp_avg.data(), got.exp_avg_sq.data(),
               got.param.size());
  check_same(got, want);
}

}  // namespace
}  // namespace offload
