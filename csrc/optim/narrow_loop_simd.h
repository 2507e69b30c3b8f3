// One rule over an fp32 parameter with narrower states: decoded, updated and encoded in registers
// (bfloat16), or with the new values of two blocks in the first cache (8 bits, whose scale is known
// only at the end of a block).
//
// Beside what rules_simd.h asks of `V`, for arrays of any alignment:
//   load_bfloat16(from)                          kLanes elements, widened
//   store_bfloat16_random(to, v, random)         + the low 16 bits of each lane of `random`
//   Int: lanes of 32 bits with iota(), broadcast(u), + * (modulo 2^32), xor_shifted<k>(a)
//        (a ^ a >> k) and shifted<k>(a)
//   dequantize<is_signed>(codes, scale, to)      4 * kLanes elements, see block_quant.h
//   quantize<is_signed>(from, inverse, codes)    likewise
//   largest_magnitude(from, n)                   as bits; n a multiple of kLanes
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "optim/block_quant.h"
#include "optim/rule_loop_simd.h"
#include "optim/stochastic_rounding.h"

namespace offload::update_internal {

// All arrays may be read and written up to the next multiple of kQuantBlock elements.
struct NarrowArrays {
  const float* param;
  const float* grad;
  const void* state[kMaxStates];
  const float* scale[kMaxStates];
  float* param_out;
  void* state_out[kMaxStates];
  float* scale_out[kMaxStates];
  std::size_t n;
  // bfloat16: the position of element 0, whose upper half is the same for all, and the keys of its
  // two pairs of states.
  std::uint32_t position;
  RoundingKey key[(kMaxStates + 1) / 2];
};

template <std::size_t kCount, typename Body>
[[gnu::always_inline]] inline void for_each_state(Body body) {
  [&]<std::size_t... k>(std::index_sequence<k...>) {
    (body(std::integral_constant<std::size_t, k>{}), ...);
  }(std::make_index_sequence<kCount>{});
}

template <typename V, typename Rule, bool kFma>
struct NarrowLoop {
  static constexpr std::size_t kStates = Rule::kStates;
  static constexpr std::size_t kGroup = 4 * V::kLanes;
  static_assert(kQuantBlock % kGroup == 0);
  using Int = typename V::Int;

  explicit NarrowLoop(const RuleScalars& s) : loop(s) {}

  // How far ahead of the loads the inputs are requested, in elements. On a Sapphire Rapids core 256
  // to 2048, and into the second cache instead of the first, made no difference.
  static constexpr std::size_t kAhead = 512;
  static constexpr std::size_t kLineBytes = 64;

  // The lines of elements [i + kAhead, i + kAhead + kGroup).
  static void prefetch_group(const NarrowArrays& a, std::size_t i, std::size_t state_bytes) {
    for (std::size_t j = 0; j < kGroup; j += kLineBytes / sizeof(float)) {
      prefetch(a.param, i + j + kAhead);
      prefetch(a.grad, i + j + kAhead);
    }
    for (std::size_t k = 0; k < kStates; ++k) {
      const auto* bytes = static_cast<const std::uint8_t*>(a.state[k]);
      for (std::size_t j = 0; j < kGroup * state_bytes; j += kLineBytes) {
        prefetch(bytes, (i + kAhead) * state_bytes + j);
      }
    }
  }

  static Int random_bits(RoundingKey key, Int position) {
    Int x = Int::template xor_shifted<16>(position) * Int::broadcast(kHashMultiplier1);
    x = Int::template xor_shifted<15>(x) + Int::broadcast(key.mix);
    return Int::template xor_shifted<15>(x * Int::broadcast(kHashMultiplier2));
  }

  void run_bfloat16(const NarrowArrays& a) const {
    const Int iota = Int::iota();
    for (std::size_t i = 0; i < a.n; i += kGroup) {
      prefetch_group(a, i, sizeof(std::uint16_t));
#pragma GCC unroll 4  // a tenth of the time in cache
      for (std::size_t j = i; j < i + kGroup; j += V::kLanes) {
        V p = V::load(a.param + j);
        V state[kStates + 1];  // no array of none
        for (std::size_t k = 0; k < kStates; ++k) {
          state[k] = V::load_bfloat16(static_cast<const std::uint16_t*>(a.state[k]) + j);
        }
        loop.step(p, V::load(a.grad + j), state);
        V::store(a.param_out + j, p);
        Int bits[kStates + 1];
        for (std::size_t k = 0; k < kStates; k += 2) {
          const auto low = static_cast<std::uint32_t>(j) + a.position + a.key[k / 2].add;
          bits[k] = random_bits(a.key[k / 2], iota + Int::broadcast(low));
          if (k + 1 < kStates) bits[k + 1] = Int::template shifted<16>(bits[k]);
        }
        for (std::size_t k = 0; k < kStates; ++k) {
          V::store_bfloat16_random(static_cast<std::uint16_t*>(a.state_out[k]) + j, state[k],
                                   bits[k]);
        }
      }
    }
  }

  // The new states of a block and, once it is complete, the inverse of its scale: zero where all
  // codes are to be zero.
  struct Fresh {
    alignas(64) float state[kStates + 1][kQuantBlock];
    float inverse[kStates + 1];
  };

  static void set_scales(const NarrowArrays& a, std::size_t block, Fresh& fresh) {
    const std::size_t count = std::min(kQuantBlock, a.n - block);
    for (std::size_t k = 0; k < kStates; ++k) {
      std::fill(fresh.state[k] + count, fresh.state[k] + kQuantBlock, 0.0f);
      const float largest = std::bit_cast<float>(V::largest_magnitude(fresh.state[k], kQuantBlock));
      const bool finite = largest <= aten_rounding_internal::kMaxFinite;  // and not NaN
      const bool tiny = largest < kSmallestScale;
      fresh.inverse[k] = tiny || !finite ? 0.0f : 1.0f / largest;
      a.scale_out[k][block / kQuantBlock] = tiny ? 0.0f : finite ? largest : kQuantNanScale;
    }
  }

  static void encode_group(const NarrowArrays& a, std::size_t block, std::size_t i,
                           const Fresh& fresh) {
    for_each_state<kStates>([&](auto k) {
      auto* codes = static_cast<std::uint8_t*>(a.state_out[k]) + block + i;
      if (fresh.inverse[k] == 0.0f) {
        std::memset(codes, 0, kGroup);
      } else {
        V::template quantize<!Rule::is_unsigned(k)>(fresh.state[k] + i, fresh.inverse[k], codes);
      }
    });
  }

  // One block is updated while the one before it is encoded: what either waits for, the other fills
  // in, and memory is asked for at an even pace.
  void run_int8(const NarrowArrays& a) const {
    Fresh fresh[2];
    for (std::size_t block = 0; block < a.n; block += kQuantBlock) {
      const std::size_t parity = block / kQuantBlock % 2;
      Fresh& now = fresh[parity];
      const Fresh& before = fresh[1 - parity];
      for (std::size_t i = 0; i < kQuantBlock; i += kGroup) {
        prefetch_group(a, block + i, 1);
        V group[kStates + 1][4];
        for_each_state<kStates>([&](auto k) {
          V::template dequantize<!Rule::is_unsigned(k)>(
              static_cast<const std::uint8_t*>(a.state[k]) + block + i,
              a.scale[k][block / kQuantBlock], group[k]);
        });
#pragma GCC unroll 4
        for (std::size_t j = 0; j < 4; ++j) {
          const std::size_t at = block + i + j * V::kLanes;
          V p = V::load(a.param + at);
          V state[kStates + 1];
          for (std::size_t k = 0; k < kStates; ++k) state[k] = group[k][j];
          loop.step(p, V::load(a.grad + at), state);
          V::store(a.param_out + at, p);
          for (std::size_t k = 0; k < kStates; ++k) {
            V::store(now.state[k] + i + j * V::kLanes, state[k]);
          }
        }
        if (block > 0) encode_group(a, block - kQuantBlock, i, before);
      }
      set_scales(a, block, now);
    }
    const std::size_t last = (a.n - 1) / kQuantBlock * kQuantBlock;
    for (std::size_t i = 0; i < kQuantBlock; i += kGroup) {
      encode_group(a, last, i, fresh[last / kQuantBlock % 2]);
    }
  }

  RuleLoop<V, Rule, kFma> loop;
};

}  // namespace offload::update_internal
