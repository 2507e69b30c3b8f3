// bfloat16 and IEEE half precision, one element at a time: the reference of the vector kernels.
//
// Widening is exact. Rounding is to nearest, ties to even, and gives infinity beyond the type's
// range; every NaN becomes one quiet NaN. Pure: thread-safe.
#pragma once

#include <cstdint>

#include "optim/update_rule.h"

namespace offload::update_internal {

inline constexpr std::uint16_t kBfloat16Nan = 0x7fc0;
inline constexpr std::uint16_t kFloat16Nan = 0x7e00;

[[nodiscard]] float from_bfloat16(std::uint16_t bits);
[[nodiscard]] std::uint16_t to_bfloat16(float value);
[[nodiscard]] float from_float16(std::uint16_t bits);
[[nodiscard]] std::uint16_t to_float16(float value);

// By type, for the two types of 16 bits. REQUIRES: `type` is one of them.
[[nodiscard]] float widen(ElementType type, std::uint16_t bits);
[[nodiscard]] std::uint16_t narrow(ElementType type, float value);

}  // namespace offload::update_internal
