// The 8-bit code against bitsandbytes' dynamic map, built here from its definition.
#include "optim/block_quant.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <vector>

#include "doctest/doctest.h"
#include "optim/update_rule.h"

namespace offload {
namespace {

using update_internal::dequantize_block;
using update_internal::kSignedMap;
using update_internal::kSmallestScale;
using update_internal::kUnsignedMap;
using update_internal::quantize_block;
using update_internal::QuantMap;

// bitsandbytes.functional.create_dynamic_map(signed, max_exponent_bits=7, total_bits=8): for each
// of the seven decades below one the centres of equal cells, with both signs where signed, and zero
// and one.
std::vector<double> dynamic_map(bool is_signed) {
  std::vector<double> values = {0.0, 1.0};
  for (int i = 0; i < 7; ++i) {
    const int cells = is_signed ? 1 << i : 2 << i;
    const double top = std::pow(10.0, i - 6);
    for (int j = 0; j < cells; ++j) {
      const double low = 0.1 + 0.9 * j / cells, high = 0.1 + 0.9 * (j + 1) / cells;
      values.push_back(top * 0.5 * (low + high));
      if (is_signed) values.push_back(-values.back());
    }
  }
  std::sort(values.begin(), values.end());
  return values;
}

// What the map makes of a magnitude <= 1: the centre of its cell.
double cell_centre(bool is_signed, double y) {
  if (y < 1e-7) return is_signed || y == 0.0 ? 0.0 : 1e-7 + 0.5 * 0.45e-6;
  for (int i = 0; i < 7; ++i) {
    const int cells = is_signed ? 1 << i : 2 << i;
    const double top = std::pow(10.0, i - 6), cell = 0.9 * top / cells;
    if (y >= top && i < 6) continue;
    if (i == 6 && y >= 1.0 - 0.25 * cell) return 1.0;
    return 0.1 * top + cell * (std::floor((y - 0.1 * top) / cell) + 0.5);
  }
  return 1.0;
}

// Half the width of its cell.
double most_error(bool is_signed, double y) {
  if (y < 1e-7) return is_signed ? 1e-7 : 1e-7 + 0.5 * 0.45e-6;
  int i = 0;
  while (i < 6 && y >= std::pow(10.0, i - 6)) ++i;
  return 0.45 * std::pow(10.0, i - 6) / (is_signed ? 1 << i : 2 << i);
}

std::vector<float> decoded(const QuantMap& map, const std::vector<std::uint8_t>& codes,
                           float scale) {
  std::vector<float> values(codes.size());
  dequantize_block(map, codes.data(), scale, values.data(), codes.size());
  return values;
}

TEST_CASE("the 256 codes are the values of the dynamic map") {
  for (const QuantMap* map : {&kSignedMap, &kUnsignedMap}) {
    CAPTURE(map->is_signed);
    std::vector<std::uint8_t> codes(256);
    for (std::size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<std::uint8_t>(i);
    std::vector<float> values = decoded(*map, codes, 1.0f);
    CHECK(values[0] == 0.0f);
    CHECK(std::count(values.begin(), values.end(), 1.0f) == 1);
    std::sort(values.begin(), values.end());
    const std::vector<double> want = dynamic_map(map->is_signed);
    REQUIRE(want.size() == 256);
    for (std::size_t i = 0; i < 256; ++i) {
      CAPTURE(i);
      // The line's intercept is up to eight times the value that is left: its rounding counts more.
      CHECK(std::fabs(values[i] - want[i]) <= 1e-6 * std::fabs(want[i]));
    }
  }
}

TEST_CASE("every code survives decoding and encoding, at every scale") {
  for (const QuantMap* map : {&kSignedMap, &kUnsignedMap}) {
    for (const float scale : {1.0f, 0.3f, 1.7e-20f, kSmallestScale, 2.9e38f}) {
      CAPTURE(map->is_signed);
      CAPTURE(scale);
      // One is the code that keeps the scale.
      const std::uint8_t one = map->is_signed ? 0x80 : 1;
      for (unsigned code = 0; code < 256; ++code) {
        const std::vector<std::uint8_t> codes = {one, static_cast<std::uint8_t>(code)};
        const std::vector<float> values = decoded(*map, codes, scale);
        std::vector<std::uint8_t> again(2);
        float scale_again = -1.0f;
        quantize_block(*map, values.data(), again.data(), &scale_again, 2);
        CHECK(scale_again == scale);
        CHECK(again == codes);
      }
    }
  }
}

TEST_CASE("the code is that of the cell, and wrong by half its width at most") {
  std::mt19937 random(1);
  for (const QuantMap* map : {&kSignedMap, &kUnsignedMap}) {
    const bool is_signed = map->is_signed;
    std::vector<float> values;
    // At and around every edge of a cell, and all over the decades.
    for (int i = 0; i < 7; ++i) {
      const int cells = is_signed ? 1 << i : 2 << i;
      for (int j = 0; j <= cells; ++j) {
        const double edge = std::pow(10.0, i - 6) * (0.1 + 0.9 * j / cells);
        for (const double factor : {0.999, 0.99999, 1.0, 1.00001, 1.001}) {
          values.push_back(static_cast<float>(std::min(1.0, edge * factor)));
        }
      }
    }
    std::uniform_real_distribution<double> exponent(-12.0, 0.0);
    for (int i = 0; i < 20000; ++i) {
      const auto value = static_cast<float>(std::pow(10.0, exponent(random)));
      values.push_back(is_signed && i % 2 == 0 ? -value : value);
    }
    for (std::size_t i = 0; i < values.size(); i += kQuantBlock - 1) {
      std::vector<float> block = {1.0f};  // so that the scale is one
      const std::size_t end = std::min(values.size(), i + kQuantBlock - 1);
      block.insert(block.end(), values.begin() + static_cast<std::ptrdiff_t>(i),
                   values.begin() + static_cast<std::ptrdiff_t>(end));
      std::vector<std::uint8_t> codes(block.size());
      float scale = 0.0f;
      quantize_block(*map, block.data(), codes.data(), &scale, block.size());
      REQUIRE(scale == 1.0f);
      const std::vector<float> got = decoded(*map, codes, scale);
      for (std::size_t j = 0; j < block.size(); ++j) {
        CAPTURE(block[j]);
        CAPTURE(is_signed);
        const double y = std::fabs(block[j]), value = std::fabs(got[j]);
        // Beside an edge either cell, which are as good.
        const double centre = cell_centre(is_signed, y);
        const double below = cell_centre(is_signed, y * (1.0 - 2e-5));
        const double above = cell_centre(is_signed, y * (1.0 + 2e-5));
        const auto near = [value](double c) { return std::fabs(value - c) <= 1e-6 * c; };
        // There is no code for minus one.
        const bool last = is_signed && block[j] < 0.0f && centre == 1.0;
        CHECK((last || near(centre) || near(below) || near(above)));
        CHECK(std::signbit(got[j]) == (std::signbit(block[j]) && got[j] != 0.0f));
        CHECK(std::fabs(value - y) <= 1.001 * most_error(is_signed, y * (1.0 + 2e-5)) + 1e-5 * y);
      }
    }
  }
}

TEST_CASE("an unsigned element that is not zero does not become zero") {
  for (const float scale : {1.0f, 3e-9f, 0x1p-80f, 1e30f}) {
    const std::vector<float> values = {scale, scale * 0x1p-25f, scale * 0x1p-50f, 0.0f};
    std::vector<std::uint8_t> codes(values.size());
    float got = 0.0f;
    quantize_block(kUnsignedMap, values.data(), codes.data(), &got, values.size());
    CHECK(got == scale);
    CHECK(codes == std::vector<std::uint8_t>{1, 2, 2, 0});
  }
}

TEST_CASE("blocks of zeros, of very small numbers and with what is not finite") {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const QuantMap* map : {&kSignedMap, &kUnsignedMap}) {
    const auto quantized = [&](std::vector<float> values, float* scale) {
      std::vector<std::uint8_t> codes(values.size(), 0xee);
      quantize_block(*map, values.data(), codes.data(), scale, values.size());
      return codes;
    };
    float scale = -1.0f;
    CHECK(quantized({0.0f, -0.0f}, &scale) == std::vector<std::uint8_t>{0, 0});
    CHECK(scale == 0.0f);
    // Relative to the smallest scale: too small for the signed map, and not zero in the other.
    const std::uint8_t least = map->is_signed ? 0 : 2;
    CHECK(quantized({0x1p-110f, 0.0f}, &scale) == std::vector<std::uint8_t>{least, 0});
    CHECK(scale == kSmallestScale);
    CHECK(quantized({1e-44f, 0.0f}, &scale) == std::vector<std::uint8_t>{0, 0});
    CHECK(scale == kSmallestScale);
    const std::uint8_t one = map->is_signed ? 0x80 : 1;
    CHECK(quantized({kSmallestScale}, &scale) == std::vector<std::uint8_t>{one});
    for (const float bad : {inf, -inf, nan, -nan}) {
      CHECK(quantized({1.0f, bad, 2.0f}, &scale) == std::vector<std::uint8_t>{0, 0, 0});
      CHECK(std::isnan(scale));
      for (const float value : decoded(*map, {0, 0, 0}, scale)) CHECK(std::isnan(value));
    }
    CHECK(decoded(*map, {0, 0}, 0.0f) == std::vector<float>{0.0f, 0.0f});
  }
}

TEST_CASE("states are filled, encoded and decoded in every format") {
  RuleHyper hyper;  // AdamW: a signed state and an unsigned one
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (const StateFormat format :
       {StateFormat::kFloat32, StateFormat::kBfloat16, StateFormat::kInt8}) {
    for (const std::size_t k : {std::size_t{0}, std::size_t{1}}) {
      const std::size_t n = 700;
      std::vector<float> values(n), out(n, -1.0f), scales((n + kQuantBlock - 1) / kQuantBlock);
      for (float& value : values) value = k == 1 ? std::fabs(normal(random)) : normal(random);
      std::vector<std::byte> state(n * element_bytes(format), std::byte{0xee});
      encode_state(hyper, format, k, values.data(), state.data(), scales.data(), n);
      decode_state(hyper, format, k, state.data(), scales.data(), out.data(), n);
      const float bound = format == StateFormat::kFloat32    ? 0.0f
                          : format == StateFormat::kBfloat16 ? 0x1p-8f
                                                             : 0.04f;
      for (std::size_t i = 0; i < n; ++i) CHECK(std::fabs(out[i] - values[i]) <= bound * 4.0f);
      fill_state(hyper, format, k, 0.5f, state.data(), scales.data(), n);
      decode_state(hyper, format, k, state.data(), scales.data(), out.data(), n);
      CHECK(out == std::vector<float>(n, 0.5f));
      fill_state(hyper, format, k, 0.0f, state.data(), scales.data(), n);
      CHECK(state == std::vector<std::byte>(state.size(), std::byte{0}));
      if (format == StateFormat::kInt8) CHECK(scales == std::vector<float>(scales.size(), 0.0f));
    }
  }
}

}  // namespace
}  // namespace offload
