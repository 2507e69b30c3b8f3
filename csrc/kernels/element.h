// Numbers as the device kernels hold them: the conversions of optim/narrow_float.h, one element at
// a time, for the host and for a device. Pure.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "optim/narrow_float.h"
#include "optim/update_rule.h"

#ifdef __CUDACC__
#define OFFLOAD_HD __host__ __device__
#else
#define OFFLOAD_HD
#endif

namespace offload::kernels {

OFFLOAD_HD inline bool is_nan(float x) {
  return x != x;
}

OFFLOAD_HD inline bool is_finite(float x) {
  return (std::bit_cast<std::uint32_t>(x) & 0x7f800000) != 0x7f800000;
}

OFFLOAD_HD inline float from_bfloat16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

OFFLOAD_HD inline std::uint16_t to_bfloat16(float value) {
  if (is_nan(value)) return update_internal::kBfloat16Nan;
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

OFFLOAD_HD inline float from_float16(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1f;
  const std::uint32_t fraction = bits & 0x3ff;
  float magnitude = 0.0f;
  if (exponent == 0) {
    magnitude = static_cast<float>(fraction) * 0x1p-24f;
  } else {
    const std::uint32_t wide = exponent == 0x1f ? 0xff : exponent + (127 - 15);
    magnitude = std::bit_cast<float>(wide << 23 | fraction << 13);
  }
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(magnitude) | sign);
}

OFFLOAD_HD inline std::uint16_t to_float16(float value) {
  if (is_nan(value)) return update_internal::kFloat16Nan;
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 16 & 0x8000;
  const float magnitude = fabsf(value);
  if (magnitude >= 65520.0f) return static_cast<std::uint16_t>(sign | 0x7c00);
  if (magnitude < 0x1p-14f) {
    return static_cast<std::uint16_t>(sign |
                                      static_cast<std::uint32_t>(rintf(magnitude * 0x1p24f)));
  }
  const std::uint32_t shifted = (bits & 0x7fffffff) - ((127u - 15u) << 23);
  return static_cast<std::uint16_t>(sign | ((shifted + 0xfff + ((shifted >> 13) & 1)) >> 13));
}

// Element i of an array of `type`. REQUIRES: aligned to its elements.
OFFLOAD_HD inline float load(ElementType type, const void* array, std::size_t i) {
  if (type == ElementType::kFloat32) return static_cast<const float*>(array)[i];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(array)[i];
  return type == ElementType::kBfloat16 ? from_bfloat16(bits) : from_float16(bits);
}

OFFLOAD_HD inline void store(ElementType type, void* array, std::size_t i, float value) {
  if (type == ElementType::kFloat32) {
    static_cast<float*>(array)[i] = value;
  } else {
    static_cast<std::uint16_t*>(array)[i] =
        type == ElementType::kBfloat16 ? to_bfloat16(value) : to_float16(value);
  }
}

// `value` as an array of `type` keeps it.
OFFLOAD_HD inline float rounded(ElementType type, float value) {
  if (type == ElementType::kFloat32) return value;
  return type == ElementType::kBfloat16 ? from_bfloat16(to_bfloat16(value))
                                        : from_float16(to_float16(value));
}

}  // namespace offload::kernels
