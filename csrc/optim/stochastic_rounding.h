// Rounding fp32 to bfloat16 at random, so that the rounded value is right on average: small changes
// of a state are kept with the right frequency where rounding to nearest would lose them all.
//
// The random bits are a function of (seed, parameter, step, state, element) and nothing else: an
// update has the same bits in whatever chunks, threads and instruction sets it is done, and may be
// repeated. A hash of the element's position is keyed by the rest:
//
//   x = low 32 bits of the position + key.add
//   x ^= x >> 16;  x *= 0x21f0aaad;  x ^= x >> 15;  x += key.mix;  x *= 0xd35a2d97;  x ^= x >> 15
//
// (a 32-bit integer hash with low bias; `mix` makes the sequences of two keys more than shifted
// copies of each other). Two states share a hash: the even one takes its low 16 bits, the odd one
// the high 16. They are added below the 16 bits that are kept; the sum's upper half is the result.
// Infinities stay, NaN becomes one quiet NaN, and beyond the largest finite bfloat16 the neighbour
// is infinity. Pure: thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>

#include "optim/update_rule.h"

namespace offload::update_internal {

inline constexpr std::uint32_t kHashMultiplier1 = 0x21f0aaad;
inline constexpr std::uint32_t kHashMultiplier2 = 0xd35a2d97;

struct RoundingKey {
  std::uint32_t add;
  std::uint32_t mix;
};

// For states 2 * pair and 2 * pair + 1 and the elements whose position has these high 32 bits.
[[nodiscard]] RoundingKey rounding_key(const RoundingSeed& seed, std::uint64_t step,
                                       std::size_t pair, std::uint32_t position_high);

// 32 random bits for the element whose position has these low 32 bits.
[[nodiscard]] std::uint32_t rounding_bits(RoundingKey key, std::uint32_t position_low);

// The reference of one element: its state `k` with the pair's bits.
[[nodiscard]] std::uint16_t round_stochastically(float value, std::uint32_t bits, std::size_t k);

}  // namespace offload::update_internal
