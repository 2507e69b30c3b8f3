// Block-wise dynamic quantization to 8 bits: Dettmers et al., "8-bit Optimizers via Block-wise
// Quantization", 2022.
//
// kQuantBlock elements share a scale, the largest magnitude among them. Each element is the code of
// a value of the map, times the scale. The values are those of bitsandbytes' dynamic maps: zero,
// one, and seven decades (10^-7, 10^-6] to (0.1, 1], each cut into equal cells of which the centres
// are taken: decade i has 2^i cells in the signed map, where they occur with both signs, and
// 2^(i+1) in the unsigned one. An element gets the cell that it lies in, so it is wrong by half a
// cell at most. One gets what is nearer to it than to the last centre. Below the first cell,
//
//   signed    is zero;
//   unsigned  is the first cell, and only zero itself is zero (or what is below 2^-54 of the
//             scale): these are squares, which rules divide by the roots of, and a zero in their
//             place would make a huge step of what is a small one.
//
// The bytes are this library's own, chosen so that the position of a code's leading bit is its
// decade and neither way needs a gather:
//
//   unsigned  0: zero; 1: one; 2^(i+1) + j: cell j of decade i
//   signed    the byte is a number t in [-128, 127]; with m = |t|
//             m = 0: zero; t = -128: one; m = 2^i + j: cell j of decade i, negative where t > 0
//
// Decoding: the values of a decade are a line, (slope * scale) * m + intercept * scale: one fused
// multiply-add, by products that are the same for a whole block.
// Encoding: z = |element| * (1 / scale) + kQuantOffset, a fused multiply-add; the number of
// thresholds that are <= z gives the segment; m is the integer part of slope * z + intercept,
// fused. The offset keeps all z within 31 binades, and lines and thresholds are shifted by it. No
// two thresholds lie in one binade. Every instruction set does these fp32 operations, so all give
// the same bits.
//
// The scale is no smaller than kSmallestScale: below it the products would not be normal numbers. A
// block that is zero throughout has scale and codes zero. One that holds an infinity or NaN has
// scale NaN and codes zero, and decodes to NaN throughout: a broken state must not look sound.
// Pure: thread-safe.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "optim/update_rule.h"

namespace offload::update_internal {

inline constexpr std::size_t kDecades = 7;
// zero | below the first cell | decades ... | one
inline constexpr std::size_t kSegments = kDecades + 3;
inline constexpr std::size_t kThresholds = kSegments - 1;
inline constexpr float kQuantNanScale = __builtin_nanf("");
inline constexpr float kSmallestScale = 0x1p-80f;
inline constexpr float kQuantOffset = 0x1p-30f;

struct QuantMap {
  bool is_signed;
  // Encoding: segment s lies below threshold[s] and not below threshold[s - 1].
  float threshold[kThresholds];
  float slope[kSegments];
  float intercept[kSegments];
  // Decoding, by decade.
  float value_slope[kDecades];
  float value_intercept[kDecades];
};

consteval QuantMap make_quant_map(bool is_signed) {
  QuantMap map = {};
  map.is_signed = is_signed;
  const double offset = kQuantOffset;
  const double first_cells = is_signed ? 1.0 : 2.0;
  map.threshold[0] = std::bit_cast<float>(std::bit_cast<std::uint32_t>(kQuantOffset) + 1);
  map.intercept[1] = is_signed ? 0.0f : 2.0f;
  double top = 1e-6;  // of the decade
  double cells = first_cells;
  double last_cell = 0.0;
  for (std::size_t i = 0; i < kDecades; ++i) {
    const double cell = 0.9 * top / cells;
    const double bottom = 0.1 * top;
    map.threshold[i + 1] = static_cast<float>(bottom + offset);
    map.slope[i + 2] = static_cast<float>(1.0 / cell);
    // A little more, so that no rounding makes a code of the first decade the one below.
    constexpr double kGuard = 0x1p-14;
    map.intercept[i + 2] = static_cast<float>(cells - (bottom + offset) / cell + kGuard);
    map.value_slope[i] = static_cast<float>(cell);
    map.value_intercept[i] = static_cast<float>(bottom + 0.5 * cell - cells * cell);
    last_cell = cell;
    // 10^-k correctly rounded at every k, where multiplying by ten would gather errors.
    constexpr double kTops[] = {1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0};
    top = kTops[i];
    cells *= 2.0;
  }
  map.threshold[kThresholds - 1] = static_cast<float>(1.0 - 0.25 * last_cell);
  map.intercept[kSegments - 1] = is_signed ? 128.0f : 1.0f;
  return map;
}

inline constexpr QuantMap kSignedMap = make_quant_map(true);
inline constexpr QuantMap kUnsignedMap = make_quant_map(false);

// The scale of a block, by the bits of its largest magnitude. (Above those of infinity are the
// NaNs.)
[[nodiscard]] constexpr float block_scale(std::uint32_t largest_bits) {
  constexpr std::uint32_t kInfinityBits = 0x7f800000;
  if (largest_bits == 0) return 0.0f;
  if (largest_bits >= kInfinityBits) return kQuantNanScale;
  const auto largest = std::bit_cast<float>(largest_bits);
  return largest < kSmallestScale ? kSmallestScale : largest;
}

// The reference, for one block of n <= kQuantBlock elements.
void quantize_block(const QuantMap& map, const float* values, std::uint8_t* codes, float* scale,
                    std::size_t n);
void dequantize_block(const QuantMap& map, const std::uint8_t* codes, float scale, float* values,
                      std::size_t n);

}  // namespace offload::update_internal
