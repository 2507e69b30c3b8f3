#include "optim/narrow_float.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "doctest/doctest.h"

namespace offload::update_internal {
namespace {

constexpr ElementType kTypes[] = {ElementType::kBfloat16, ElementType::kFloat16};

TEST_CASE("every 16-bit number survives widening and narrowing") {
  for (const ElementType type : kTypes) {
    for (unsigned bits = 0; bits < 65536; ++bits) {
      const auto narrowed = static_cast<std::uint16_t>(bits);
      const float value = widen(type, narrowed);
      const std::uint16_t nan = type == ElementType::kBfloat16 ? kBfloat16Nan : kFloat16Nan;
      CHECK(narrow(type, value) == (std::isnan(value) ? nan : narrowed));
    }
  }
}

TEST_CASE("narrowing is to nearest, ties to even") {
  for (const ElementType type : kTypes) {
    const unsigned largest = type == ElementType::kBfloat16 ? 0x7f7f : 0x7bff;
    for (unsigned bits = 0; bits < largest; ++bits) {
      const float low = widen(type, static_cast<std::uint16_t>(bits));
      const float high = widen(type, static_cast<std::uint16_t>(bits + 1));
      const float middle = low + 0.5f * (high - low);
      const float inf = std::numeric_limits<float>::infinity();
      const unsigned even = bits % 2 == 0 ? bits : bits + 1;
      CHECK(narrow(type, middle) == even);
      CHECK(narrow(type, -middle) == (even | 0x8000));
      CHECK(narrow(type, std::nextafter(middle, 0.0f)) == bits);
      CHECK(narrow(type, std::nextafter(middle, inf)) == bits + 1);
    }
  }
}

TEST_CASE("known values") {
  CHECK(from_float16(0x3c00) == 1.0f);
  CHECK(from_float16(0x0001) == 0x1p-24f);
  CHECK(from_float16(0x7bff) == 65504.0f);
  CHECK(from_float16(0xfc00) == -std::numeric_limits<float>::infinity());
  CHECK(to_float16(65519.0f) == 0x7bff);
  CHECK(to_float16(65520.0f) == 0x7c00);
  CHECK(from_bfloat16(0x3f80) == 1.0f);
  CHECK(to_bfloat16(std::numeric_limits<float>::max()) == 0x7f80);
}

}  // namespace
}  // namespace offload::update_internal
