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

double nearest_distance(const std::vector<double>& map, double value) {
  double best = std::numeric_limits<double>::infinity();
  for (const double candidate : map) best = std::min(best, std::fabs(candidate - value));
  return best;
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
    for (const float scale : {1.0f, 0.3f, 1.7e-20f, 4.4e-38f, 2.9e38f}) {
      CAPTURE(map->is_signed);
      CAPTURE(scale);
      // One is the code that keeps the scale; at a small scale others leave fp32's normal range.
      const std::uint8_t one = map->is_signed ? 0x80 : 1;
      for (unsigned code = 0; code < 256; ++code) {
        const std::vector<std::uint8_t> codes = {one, static_cast<std::uint8_t>(code)};
        const std::vector<float> values = decoded(*map, codes, scale);
        if (std::fabs(values[1]) < 1e-37f && values[1] != 0.0f) continue;
        std::vector<std::uint8_t> again(2);
        float scale_again = -1.0f;
        quantize_block(*map, values.data(), again.data(), &scale_again, 2);
        CHECK(scale_again == scale);
        CHECK(again == codes);
      }
    }
  }
}

TEST_CASE("the code is the nearest: no value of the map is closer") {
  std::mt19937 random(1);
  for (const QuantMap* map : {&kSignedMap, &kUnsignedMap}) {
    const std::vector<double> want = dynamic_map(map->is_signed);
    std::vector<float> values = {1.0f};
    // At and around every midpoint, and all over the decades.
    for (std::size_t i = 0; i + 1 < want.size(); ++i) {
      const auto middle = static_cast<float>(0.5 * (want[i] + want[i + 1]));
      for (const float factor : {0.999f, 0.99999f, 1.0f, 1.00001f, 1.001f}) {
        values.push_back(middle * factor);
      }
    }
    std::uniform_real_distribution<double> exponent(-8.5, 0.0);
    for (int i = 0; i < 20000; ++i) {
      const auto value = static_cast<float>(std::pow(10.0, exponent(random)));
      values.push_back(map->is_signed && i % 2 == 0 ? -value : value);
    }
    for (float& value : values) {
      if (!map->is_signed) value = std::fabs(value);
    }
    for (std::size_t i = 1; i < values.size(); i += kQuantBlock - 1) {
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
        const double distance = std::fabs(static_cast<double>(got[j]) - block[j]);
        CHECK(distance <= nearest_distance(want, block[j]) + 1e-6 * std::fabs(block[j]));
      }
    }
  }
}

TEST_CASE("the error is at most half a cell of the decade") {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  for (int round = 0; round < 100; ++round) {
    std::vector<float> values(kQuantBlock);
    for (float& value : values) value = 1e-3f * normal(random);
    std::vector<std::uint8_t> codes(values.size());
    float scale = 0.0f;
    quantize_block(kSignedMap, values.data(), codes.data(), &scale, values.size());
    const std::vector<float> got = decoded(kSignedMap, codes, scale);
    for (std::size_t i = 0; i < values.size(); ++i) {
      const float y = std::fabs(values[i]) / scale;
      // In the first decade below the scale cells are 0.9 / 64 wide, in the next 0.09 / 32.
      const float bound = y > 0.1f ? 0.45f / 64 : y > 0.01f ? 0.045f / 32 : 0.0045f / 16 + 1e-6f;
      // Beside a decade's edge the cell reaches as far as to the midpoint of the two neighbours.
      CHECK(std::fabs(got[i] - values[i]) <= 2.0f * bound * scale);
      if (y > 0.11f) CHECK(std::fabs(got[i] - values[i]) <= 1.0001f * bound * scale);
    }
  }
}

TEST_CASE("blocks of zeros, of too small numbers and with what is not finite") {
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
    CHECK(quantized({1e-39f, 0.0f}, &scale) == std::vector<std::uint8_t>{0, 0});
    CHECK(scale == 0.0f);
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
