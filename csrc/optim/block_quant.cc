#include "optim/block_quant.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

namespace offload::update_internal {
namespace {

std::uint8_t encode(const QuantMap& map, float value, float inverse) {
  const float z = std::fma(std::fabs(value), inverse, kQuantOffset);
  std::size_t segment = 0;
  while (segment < kThresholds && z >= map.threshold[segment]) ++segment;
  const int m = static_cast<int>(std::fma(map.slope[segment], z, map.intercept[segment]));
  if (!map.is_signed) return static_cast<std::uint8_t>(m);
  // There is no code for minus one: the last cell is the nearest.
  return static_cast<std::uint8_t>(std::signbit(value) ? std::min(m, 127) : -m);
}

float decode(const QuantMap& map, std::uint8_t code, float scale) {
  const int t = map.is_signed ? static_cast<std::int8_t>(code) : code;
  const auto m = static_cast<unsigned>(t < 0 ? -t : t);
  float slope = 0.0f, intercept = 0.0f;
  if (m == (map.is_signed ? 128u : 1u)) {
    intercept = 1.0f;
  } else if (m != 0) {
    const int decade = std::bit_width(m) - (map.is_signed ? 1 : 2);
    slope = map.value_slope[decade];
    intercept = map.value_intercept[decade];
  }
  const float value = std::fma(slope * scale, static_cast<float>(m), intercept * scale);
  return map.is_signed && t > 0 ? -value : value;
}

}  // namespace

void quantize_block(const QuantMap& map, const float* values, std::uint8_t* codes, float* scale,
                    std::size_t n) {
  std::uint32_t largest = 0;
  for (std::size_t i = 0; i < n; ++i) {
    largest = std::max(largest, std::bit_cast<std::uint32_t>(values[i]) & 0x7fffffff);
  }
  *scale = block_scale(largest);
  if (!(*scale > 0.0f)) {
    std::memset(codes, 0, n);
    return;
  }
  const float inverse = 1.0f / *scale;
  for (std::size_t i = 0; i < n; ++i) codes[i] = encode(map, values[i], inverse);
}

void dequantize_block(const QuantMap& map, const std::uint8_t* codes, float scale, float* values,
                      std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) values[i] = decode(map, codes[i], scale);
}

}  // namespace offload::update_internal
