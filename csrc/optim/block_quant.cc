#include "optim/block_quant.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

namespace offload::update_internal {
namespace {

std::uint8_t encode(const QuantMap& map, float y) {
  const float magnitude = std::fabs(y);
  std::size_t segment = 0;
  while (segment < kThresholds && magnitude >= map.threshold[segment]) ++segment;
  const float position = std::fma(map.slope[segment], magnitude, map.intercept[segment]);
  const int m = static_cast<int>(std::min(position, map.cap[segment]));
  if (!map.is_signed) return static_cast<std::uint8_t>(m);
  // There is no code for minus one: its neighbour is the nearest.
  return static_cast<std::uint8_t>(std::signbit(y) ? std::min(m, 127) : -m);
}

float decode(const QuantMap& map, std::uint8_t code) {
  const int t = map.is_signed ? static_cast<std::int8_t>(code) : code;
  const auto m = static_cast<unsigned>(t < 0 ? -t : t);
  if (m == 0) return 0.0f;
  if (m == (map.is_signed ? 128u : 1u)) return 1.0f;
  const int decade = std::bit_width(m) - (map.is_signed ? 1 : 2);
  const float value =
      std::fma(map.value_slope[decade], static_cast<float>(m), map.value_intercept[decade]);
  return map.is_signed && t > 0 ? -value : value;
}

}  // namespace

void quantize_block(const QuantMap& map, const float* values, std::uint8_t* codes, float* scale,
                    std::size_t n) {
  // By the bits of the magnitudes: above those of infinity are the NaNs, which compare with none.
  std::uint32_t largest = 0;
  for (std::size_t i = 0; i < n; ++i) {
    largest = std::max(largest, std::bit_cast<std::uint32_t>(values[i]) & 0x7fffffff);
  }
  const float magnitude = std::bit_cast<float>(largest);
  if (!(magnitude >= kSmallestScale) || std::isinf(magnitude)) {
    *scale = magnitude < kSmallestScale ? 0.0f : kQuantNanScale;
    std::memset(codes, 0, n);
    return;
  }
  *scale = magnitude;
  const float inverse = 1.0f / magnitude;
  for (std::size_t i = 0; i < n; ++i) codes[i] = encode(map, values[i] * inverse);
}

void dequantize_block(const QuantMap& map, const std::uint8_t* codes, float scale, float* values,
                      std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) values[i] = decode(map, codes[i]) * scale;
}

}  // namespace offload::update_internal
