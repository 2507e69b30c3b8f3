#include "optim/narrow_float.h"

#include <bit>
#include <cmath>

namespace offload::update_internal {

float from_bfloat16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

std::uint16_t to_bfloat16(float value) {
  if (std::isnan(value)) return kBfloat16Nan;
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float from_float16(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1f;
  const std::uint32_t fraction = bits & 0x3ff;
  float magnitude;
  if (exponent == 0) {
    magnitude = static_cast<float>(fraction) * 0x1p-24f;
  } else {
    const std::uint32_t wide = exponent == 0x1f ? 0xff : exponent + (127 - 15);
    magnitude = std::bit_cast<float>(wide << 23 | fraction << 13);
  }
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(magnitude) | sign);
}

std::uint16_t to_float16(float value) {
  if (std::isnan(value)) return kFloat16Nan;
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return static_cast<std::uint16_t>(sign | 0x7c00);
  if (magnitude <
      0x1p-14f) {  // denormal in half precision: a multiple of 2^-24, or the first normal
    const float multiple = std::nearbyint(magnitude * 0x1p24f);
    return static_cast<std::uint16_t>(sign | static_cast<std::uint16_t>(multiple));
  }
  const std::uint32_t shifted = (bits & 0x7fffffff) - ((127u - 15u) << 23);
  return static_cast<std::uint16_t>(sign | ((shifted + 0xfff + ((shifted >> 13) & 1)) >> 13));
}

float widen(ElementType type, std::uint16_t bits) {
  return type == ElementType::kBfloat16 ? from_bfloat16(bits) : from_float16(bits);
}

std::uint16_t narrow(ElementType type, float value) {
  return type == ElementType::kBfloat16 ? to_bfloat16(value) : to_float16(value);
}

}  // namespace offload::update_internal
