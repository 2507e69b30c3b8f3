#include "optim/stochastic_rounding.h"

#include <bit>
#include <cmath>

#include "optim/narrow_float.h"

namespace offload::update_internal {
namespace {

// The output function of splitmix64: a bijection that spreads every input bit over all others.
std::uint64_t spread(std::uint64_t x) {
  x ^= x >> 30;
  x *= 0xbf58476d1ce4e5b9;
  x ^= x >> 27;
  x *= 0x94d049bb133111eb;
  return x ^ x >> 31;
}

}  // namespace

RoundingKey rounding_key(const RoundingSeed& seed, std::uint64_t step, std::size_t pair,
                         std::uint32_t position_high) {
  constexpr std::uint64_t kIncrement = 0x9e3779b97f4a7c15;  // so that zeros do not stay zeros
  std::uint64_t key = spread(seed.seed + kIncrement);
  key = spread(key + seed.parameter + kIncrement);
  key = spread(key + step + kIncrement);
  key = spread(key + (static_cast<std::uint64_t>(position_high) << 8 | pair) + kIncrement);
  return {static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32)};
}

std::uint32_t rounding_bits(RoundingKey key, std::uint32_t position_low) {
  std::uint32_t x = position_low + key.add;
  x ^= x >> 16;
  x *= kHashMultiplier1;
  x ^= x >> 15;
  x += key.mix;
  x *= kHashMultiplier2;
  return x ^ x >> 15;
}

std::uint16_t round_stochastically(float value, std::uint32_t bits, std::size_t k) {
  if (std::isnan(value)) return kBfloat16Nan;
  const std::uint32_t random = k % 2 == 0 ? bits & 0xffff : bits >> 16;
  return static_cast<std::uint16_t>((std::bit_cast<std::uint32_t>(value) + random) >> 16);
}

}  // namespace offload::update_internal
