// One rule over an fp32 parameter with narrower states: decoded, updated and encoded in registers
// (bfloat16), or with the new values of a block in the first cache (8 bits, whose scale is known
// only at the end of a block).
//
// Beside what rules_simd.h asks of `V`, for arrays of any alignment:
//   load_bfloat16(from)                          kLanes elements, widened
//   store_bfloat16_random<k>(to, v, random)      2 * kLanes elements: v[0..1] + 16 bits of each
//                                                lane of random[0..1], the low ones or, where k is
//                                                odd, the high ones
//   Int: lanes of 32 bits with iota(), broadcast(u), + * (modulo 2^32), xor_shifted<k>(a)
//        (a ^ a >> k)
//   larger_magnitude<is_signed>(largest, v)      of each lane as bits, in an Int; unsigned v have
//                                                no sign bit, but NaNs may
//   largest(a)                                   of an Int's lanes, without their sign bits
//   Decoder: made by of<is_signed>(scale); decode<is_signed>(codes, to): 4 * kLanes elements, see
//            block_quant.h
//   quantize<is_signed>(from, inverse, codes)    likewise
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

template <typename V, typename Rule>
struct NarrowLoop {
  static constexpr std::size_t kStates = Rule::kStates;
  static constexpr std::size_t kGroup = 4 * V::kLanes;
  static_assert(kQuantBlock % kGroup == 0);
  using Int = typename V::Int;

  explicit NarrowLoop(const RuleScalars& s) : loop(s) {}

  // For the elements [i, i + kGroup), which are used next.
  template <std::size_t kStateBytes>
  [[gnu::always_inline]] static void prefetch_group(const NarrowArrays& a, std::size_t i,
                                                    std::size_t ahead) {
    prefetch<kGroup * sizeof(float)>(a.param + i, ahead);
    prefetch<kGroup * sizeof(float)>(a.grad + i, ahead);
    for (std::size_t k = 0; k < kStates; ++k) {
      prefetch<kGroup * kStateBytes>(static_cast<const std::byte*>(a.state[k]) + i * kStateBytes,
                                     ahead);
    }
  }

  [[gnu::always_inline]] static Int random_bits(RoundingKey key, Int position) {
    Int x = Int::template xor_shifted<16>(position) * Int::broadcast(kHashMultiplier1);
    x = Int::template xor_shifted<15>(x) + Int::broadcast(key.mix);
    return Int::template xor_shifted<15>(x * Int::broadcast(kHashMultiplier2));
  }

  void run_bfloat16(const NarrowArrays& arrays) const {
    loop.is_plain() ? run_bfloat16<true>(arrays) : run_bfloat16<false>(arrays);
  }
  void run_int8(const NarrowArrays& arrays) const {
    loop.is_plain() ? run_int8<true>(arrays) : run_int8<false>(arrays);
  }

 private:
  // The loops use copies of what they are given: a store of bytes might change anything else, which
  // would be loaded again after each.

  template <bool kPlain>
  void run_bfloat16(const NarrowArrays& arrays) const {
    const NarrowArrays a = arrays;
    const RuleLoop<V, Rule> update = loop;
    const Int iota = Int::iota();
    for (std::size_t i = 0; i < a.n; i += kGroup) {
      prefetch_group<sizeof(std::uint16_t)>(a, i, update.prefetch_bytes);
#pragma GCC unroll 2
      for (std::size_t j = i; j < i + kGroup; j += 2 * V::kLanes) {
        V state[2][kStates + 1];  // no array of none
        for (std::size_t half = 0; half < 2; ++half) {
          const std::size_t at = j + half * V::kLanes;
          V p = V::load(a.param + at);
          for (std::size_t k = 0; k < kStates; ++k) {
            state[half][k] = V::load_bfloat16(static_cast<const std::uint16_t*>(a.state[k]) + at);
          }
          update.template step<kPlain>(p, V::load(a.grad + at), state[half]);
          V::store(a.param_out + at, p);
        }
        Int bits[2];
        for_each_state<kStates>([&](auto k) {
          if constexpr (k % 2 == 0) {
            const auto low = static_cast<std::uint32_t>(j) + a.position + a.key[k / 2].add;
            bits[0] = random_bits(a.key[k / 2], iota + Int::broadcast(low));
            bits[1] = random_bits(a.key[k / 2], iota + Int::broadcast(low + V::kLanes));
          }
          const V both[2] = {state[0][k], state[1][k]};
          V::template store_bfloat16_random<k>(static_cast<std::uint16_t*>(a.state_out[k]) + j,
                                               both, bits);
        });
      }
    }
  }

  // The new states of a block and, once it is complete, the inverse of its scale: zero where all
  // codes are to be zero, and the states are zero then.
  struct Fresh {
    alignas(64) float state[kStates + 1][kQuantBlock];
    float inverse[kStates + 1];
  };

  // Of the last block, which has `count` elements: what lies beyond is no part of it.
  template <bool kSigned>
  [[gnu::noinline]] static std::uint32_t largest_of_part(float* state, std::size_t count) {
    std::fill(state + count, state + kQuantBlock, 0.0f);
    Int largest = Int::broadcast(0);
    for (std::size_t i = 0; i < kQuantBlock; i += V::kLanes) {
      largest = V::template larger_magnitude<kSigned>(largest, V::load(state + i));
    }
    return V::largest(largest);
  }

  // `largest`: of the block's states where it is whole.
  [[gnu::always_inline]] static void set_scales(const NarrowArrays& a, std::size_t block,
                                                const Int* largest, Fresh& fresh) {
    const std::size_t count = std::min(kQuantBlock, a.n - block);
    for_each_state<kStates>([&](auto k) {
      const float scale = block_scale(
          count == kQuantBlock ? V::largest(largest[k])
                               : largest_of_part<!Rule::is_unsigned(k)>(fresh.state[k], count));
      const bool sound = scale > 0.0f;
      if (!sound) std::fill_n(fresh.state[k], kQuantBlock, 0.0f);
      fresh.inverse[k] = sound ? 1.0f / scale : 0.0f;
      a.scale_out[k][block / kQuantBlock] = scale;
    });
  }

  // A block is updated and then encoded, each in a loop of its own: short chains of what waits for
  // one another, of which many fit into the window in which a core reorders.
  template <bool kPlain>
  void run_int8(const NarrowArrays& arrays) const {
    const NarrowArrays a = arrays;
    const RuleLoop<V, Rule> update = loop;
    Fresh fresh;
    for (std::size_t block = 0; block < a.n; block += kQuantBlock) {
      typename V::Decoder decoder[kStates + 1];
      Int largest[kStates + 1];
      for_each_state<kStates>([&](auto k) {
        decoder[k] =
            V::Decoder::template of<!Rule::is_unsigned(k)>(a.scale[k][block / kQuantBlock]);
        largest[k] = Int::broadcast(0);
      });
      for (std::size_t i = 0; i < kQuantBlock; i += kGroup) {
        prefetch_group<1>(a, block + i, update.prefetch_bytes);
        V group[kStates + 1][4];
        for_each_state<kStates>([&](auto k) {
          decoder[k].template decode<!Rule::is_unsigned(k)>(
              static_cast<const std::uint8_t*>(a.state[k]) + block + i, group[k]);
        });
#pragma GCC unroll 4
        for (std::size_t j = 0; j < 4; ++j) {
          const std::size_t at = block + i + j * V::kLanes;
          V p = V::load(a.param + at);
          V state[kStates + 1];
          for (std::size_t k = 0; k < kStates; ++k) state[k] = group[k][j];
          update.template step<kPlain>(p, V::load(a.grad + at), state);
          V::store(a.param_out + at, p);
          for_each_state<kStates>([&](auto k) {
            V::store(fresh.state[k] + i + j * V::kLanes, state[k]);
            largest[k] = V::template larger_magnitude<!Rule::is_unsigned(k)>(largest[k], state[k]);
          });
        }
      }
      set_scales(a, block, largest, fresh);
      for_each_state<kStates>([&](auto k) {
        auto* codes = static_cast<std::uint8_t*>(a.state_out[k]) + block;
        for (std::size_t i = 0; i < kQuantBlock; i += kGroup) {
          V::template quantize<!Rule::is_unsigned(k)>(fresh.state[k] + i, fresh.inverse[k],
                                                      codes + i);
        }
      });
    }
  }

  RuleLoop<V, Rule> loop;
};

}  // namespace offload::update_internal
