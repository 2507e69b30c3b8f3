#include "optim/aten_rounding.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "doctest/doctest.h"

namespace offload {
namespace {

constexpr SqrtRule kRules[] = {SqrtRule::kIeee, SqrtRule::kRsqrt, SqrtRule::kRsqrtFma,
                               SqrtRule::kRsqrt14Fma};
constexpr Isa kIsas[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kNeon};

float by_rule(SqrtRule rule, float x) {
  float root = -1.0f;
  sqrt_by_rule(rule, &x, &root, 1);
  return root;
}

TEST_CASE("every available square root is within one unit in the last place") {
  for (const SqrtRule rule : kRules) {
    if (!sqrt_rule_available(Isa::kScalar, rule)) continue;
    CAPTURE(sqrt_rule_name(rule));
    for (std::uint32_t bits = 1; bits < 0x7f800000; bits += 40961) {
      const float x = std::bit_cast<float>(bits);
      const auto got = std::bit_cast<std::int32_t>(by_rule(rule, x));
      const auto want = std::bit_cast<std::int32_t>(std::sqrt(x));
      const std::int32_t distance = std::abs(got - want);
      CAPTURE(x);
      REQUIRE(distance <= (rule == SqrtRule::kIeee ? 0 : 1));
    }
  }
}

TEST_CASE("square roots of zeros, infinities, NaN and negative numbers are IEEE's") {
  const float inf = std::numeric_limits<float>::infinity();
  for (const SqrtRule rule : kRules) {
    if (!sqrt_rule_available(Isa::kScalar, rule)) continue;
    CAPTURE(sqrt_rule_name(rule));
    CHECK(std::bit_cast<std::uint32_t>(by_rule(rule, 0.0f)) == 0);
    CHECK(std::bit_cast<std::uint32_t>(by_rule(rule, -0.0f)) == 0x80000000);
    CHECK(by_rule(rule, inf) == inf);
    CHECK(std::isnan(by_rule(rule, -inf)));
    CHECK(std::isnan(by_rule(rule, -1.0f)));
    CHECK(std::isnan(by_rule(rule, -1e-45f)));
    CHECK(std::isnan(by_rule(rule, std::numeric_limits<float>::quiet_NaN())));
  }
}

TEST_CASE("the rules without correct rounding are told apart by some argument") {
  for (const SqrtRule rule : {SqrtRule::kRsqrt, SqrtRule::kRsqrt14Fma}) {
    if (!sqrt_rule_available(Isa::kScalar, rule)) continue;
    CAPTURE(sqrt_rule_name(rule));
    int different = 0;
    for (std::uint32_t bits = 0x3f800000; bits < 0x40800000; bits += 97) {
      const float x = std::bit_cast<float>(bits);
      different += by_rule(rule, x) != std::sqrt(x) ? 1 : 0;
    }
    CHECK(different > 0);
  }
}

TEST_CASE("the correctly rounded square root is available wherever the instruction set is") {
  for (const Isa isa : kIsas) {
    CHECK(sqrt_rule_available(isa, SqrtRule::kIeee) == isa_available(isa));
    if (isa_available(isa)) continue;
    for (const SqrtRule rule : kRules) CHECK_FALSE(sqrt_rule_available(isa, rule));
  }
  CHECK(isa_available(Isa::kScalar));
  CHECK(isa_available(best_isa()));
}

TEST_CASE("the best instruction set follows every rule that the reference follows") {
  for (const SqrtRule rule : kRules) {
    if (best_isa() == Isa::kScalar) continue;
    CHECK(sqrt_rule_available(best_isa(), rule) == sqrt_rule_available(Isa::kScalar, rule));
  }
}

TEST_CASE("names") {
  CHECK(std::string(isa_name(Isa::kScalar)) == "scalar");
  CHECK(std::string(isa_name(Isa::kAvx2)) == "avx2");
  CHECK(std::string(isa_name(Isa::kAvx512)) == "avx512");
  CHECK(std::string(isa_name(Isa::kNeon)) == "neon");
  CHECK(std::string(sqrt_rule_name(SqrtRule::kIeee)) == "ieee");
  CHECK(std::string(sqrt_rule_name(SqrtRule::kRsqrt)) == "rsqrt");
  CHECK(std::string(sqrt_rule_name(SqrtRule::kRsqrtFma)) == "rsqrt-fma");
  CHECK(std::string(sqrt_rule_name(SqrtRule::kRsqrt14Fma)) == "rsqrt14-fma");
}

}  // namespace
}  // namespace offload
