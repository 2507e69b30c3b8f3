// Block-wise dynamic quantization to 8 bits: Dettmers et al., "8-bit Optimizers via Block-wise
// Quantization", 2022.
//
// kQuantBlock elements share a scale, the largest magnitude among them. Each element is the code of
// the map's value that is nearest to element / scale. The values are those of bitsandbytes'
// dynamic maps: zero, one, and seven decades (10^-7, 10^-6] to (0.1, 1], each cut into equal cells
// of which the centres are taken: decade i has 2^i cells in the signed map, where they occur with
// both signs, and 2^(i+1) in the unsigned one. The bytes are this library's own, chosen so that the
// position of a code's leading bit is its decade and neither way needs a gather:
//
//   unsigned  0: zero; 1: one; 2^(i+1) + j: cell j of decade i
//   signed    the byte is a number t in [-128, 127]; with m = |t|
//             m = 0: zero; t = -128: one; m = 2^i + j: cell j of decade i, negative where t > 0
//
// In both, the values of a decade are a line: value = intercept + slope * m, one fused
// multiply-add, times the scale. The other way, with y = |element| * (1 / scale): the number of
// thresholds (midpoints of neighbouring values at the edges of decades) that are <= y gives the
// segment, and m is the integer part of min(intercept + slope * y, cap), again one fused
// multiply-add; the cap counts where the last cell of a decade reaches up to its threshold. Every
// instruction set does these fp32 operations, so all give the same bits.
//
// A block that is zero throughout, or all below the smallest normal number, has scale and codes
// zero. One that holds an infinity or NaN has scale NaN and codes zero, and decodes to NaN
// throughout: a broken state must not look sound. Pure: thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>

#include "optim/update_rule.h"

namespace offload::update_internal {

inline constexpr std::size_t kDecades = 7;
inline constexpr std::size_t kThresholds = kDecades + 1;  // zero | decades ... | one
inline constexpr float kQuantNanScale = __builtin_nanf("");
inline constexpr float kSmallestScale = 0x1p-126f;

struct QuantMap {
  bool is_signed;
  // Encoding: segment s lies below threshold[s] and not below threshold[s - 1].
  float threshold[kThresholds];
  float slope[kThresholds + 1];
  float intercept[kThresholds + 1];
  float cap[kThresholds + 1];
  // Decoding, by decade.
  float value_slope[kDecades];
  float value_intercept[kDecades];
};

consteval QuantMap make_quant_map(bool is_signed) {
  QuantMap map = {};
  map.is_signed = is_signed;
  const double first_cells = is_signed ? 1.0 : 2.0;
  double top = 1e-6;  // of the decade
  double cells = first_cells;
  double last_value = 0.0;  // the largest value below the decade
  for (std::size_t i = 0; i < kDecades; ++i) {
    const double cell = 0.9 * top / cells;
    const double bottom = 0.1 * top;
    const double first_value = bottom + 0.5 * cell;
    map.threshold[i] = static_cast<float>(0.5 * (last_value + first_value));
    map.slope[i + 1] = static_cast<float>(1.0 / cell);
    map.intercept[i + 1] = static_cast<float>(cells - bottom / cell);
    // Inside the decade's last code, whose integer part is 2 * cells - 1.
    map.cap[i + 1] = static_cast<float>(2.0 * cells - 0.5);
    map.value_slope[i] = static_cast<float>(cell);
    map.value_intercept[i] = static_cast<float>(first_value - cells * cell);
    last_value = top - 0.5 * cell;
    // 10^-k correctly rounded at every k, where multiplying by ten would gather errors.
    constexpr double kTops[] = {1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0};
    top = kTops[i];
    cells *= 2.0;
  }
  map.threshold[kDecades] = static_cast<float>(0.5 * (last_value + 1.0));
  const float one = is_signed ? 128.0f : 1.0f;
  map.intercept[kThresholds] = one;
  map.cap[kThresholds] = one;
  return map;
}

inline constexpr QuantMap kSignedMap = make_quant_map(true);
inline constexpr QuantMap kUnsignedMap = make_quant_map(false);

// The reference, for one block of n <= kQuantBlock elements.
void quantize_block(const QuantMap& map, const float* values, std::uint8_t* codes, float* scale,
                    std::size_t n);
void dequantize_block(const QuantMap& map, const std::uint8_t* codes, float scale, float* values,
                      std::size_t n);

}  // namespace offload::update_internal
