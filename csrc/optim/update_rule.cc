#include "optim/update_rule.h"

#include <algorithm>
#include <cstring>

#include "optim/block_quant.h"
#include "optim/narrow_float.h"
#include "optim/rule_kernels.h"

namespace offload {
namespace {

using update_internal::QuantMap;
using update_internal::UpdateCall;

const QuantMap& map_of(const RuleHyper& hyper, std::size_t k) {
  return state_is_unsigned(hyper, k) ? update_internal::kUnsignedMap : update_internal::kSignedMap;
}

}  // namespace

UpdateCall update_internal::make_call(const RuleHyper& hyper, const UpdateFormat& format,
                                      GradFactors factors, const RoundingSeed& seed,
                                      const UpdateArrays& arrays) {
  UpdateCall call;
  const bool narrow = format.state != StateFormat::kFloat32;
  call.scalars = make_scalars(hyper, factors, narrow);
  call.format = format;
  call.seed = seed;
  call.step = static_cast<std::uint64_t>(hyper.step);
  call.states = state_count(hyper);
  for (std::size_t k = 0; k < kMaxStates; ++k) call.state_unsigned[k] = state_is_unsigned(hyper, k);
  call.arrays = arrays;
  return call;
}

std::size_t state_count(const RuleHyper& hyper) {
  switch (hyper.rule) {
    case Rule::kAdamW:
    case Rule::kAdam:
      return hyper.amsgrad ? 3 : 2;
    case Rule::kSgd:
      return hyper.momentum != 0.0 ? 1 : 0;
    case Rule::kRmsprop:
      return std::size_t{1} + (hyper.momentum != 0.0 ? 1 : 0) + (hyper.centered ? 1 : 0);
    case Rule::kAdagrad:
    case Rule::kLion:
      return 1;
  }
  return 0;
}

bool state_is_unsigned(const RuleHyper& hyper, std::size_t k) {
  switch (hyper.rule) {
    case Rule::kAdamW:
    case Rule::kAdam:
      return k >= 1;
    case Rule::kAdagrad:
    case Rule::kRmsprop:
      return k == 0;
    case Rule::kSgd:
    case Rule::kLion:
      return false;
  }
  return false;
}

std::size_t element_bytes(ElementType type) {
  return type == ElementType::kFloat32 ? 4 : 2;
}

std::size_t element_bytes(StateFormat format) {
  switch (format) {
    case StateFormat::kFloat32:
      return 4;
    case StateFormat::kBfloat16:
      return 2;
    case StateFormat::kInt8:
      return 1;
  }
  return 0;
}

void update_isa(Isa isa, const RuleHyper& hyper, const UpdateFormat& format, GradFactors factors,
                const RoundingSeed& seed, const UpdateArrays& arrays) {
  const UpdateCall call = update_internal::make_call(hyper, format, factors, seed, arrays);
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return update_internal::update_avx2(call);
    case Isa::kAvx512:
      return update_internal::update_avx512(call);
#elif defined(__aarch64__)
    case Isa::kNeon:
      return update_internal::update_neon(call);
#endif
    default:
      return update_internal::update_scalar(call);
  }
}

void update(const RuleHyper& hyper, const UpdateFormat& format, GradFactors factors,
            const RoundingSeed& seed, const UpdateArrays& arrays) {
  update_isa(best_isa(), hyper, format, factors, seed, arrays);
}

void fill_state(const RuleHyper& hyper, StateFormat format, std::size_t k, float value, void* state,
                float* scale, std::size_t n) {
  float values[kQuantBlock];
  std::fill_n(values, kQuantBlock, value);
  auto* bytes = static_cast<std::byte*>(state);
  for (std::size_t i = 0; i < n; i += kQuantBlock) {
    encode_state(hyper, format, k, values, bytes + i * element_bytes(format),
                 scale == nullptr ? nullptr : scale + i / kQuantBlock,
                 std::min(kQuantBlock, n - i));
  }
}

void decode_state(const RuleHyper& hyper, StateFormat format, std::size_t k, const void* state,
                  const float* scale, float* out, std::size_t n) {
  switch (format) {
    case StateFormat::kFloat32:
      if (n > 0) std::memcpy(out, state, n * sizeof(float));
      return;
    case StateFormat::kBfloat16:
      for (std::size_t i = 0; i < n; ++i) {
        std::uint16_t bits;
        std::memcpy(&bits, static_cast<const std::byte*>(state) + 2 * i, sizeof(bits));
        out[i] = update_internal::from_bfloat16(bits);
      }
      return;
    case StateFormat::kInt8:
      for (std::size_t i = 0; i < n; i += kQuantBlock) {
        update_internal::dequantize_block(
            map_of(hyper, k), static_cast<const std::uint8_t*>(state) + i, scale[i / kQuantBlock],
            out + i, std::min(kQuantBlock, n - i));
      }
      return;
  }
}

void encode_state(const RuleHyper& hyper, StateFormat format, std::size_t k, const float* values,
                  void* state, float* scale, std::size_t n) {
  switch (format) {
    case StateFormat::kFloat32:
      if (n > 0) std::memcpy(state, values, n * sizeof(float));
      return;
    case StateFormat::kBfloat16:
      for (std::size_t i = 0; i < n; ++i) {
        const std::uint16_t bits = update_internal::to_bfloat16(values[i]);
        std::memcpy(static_cast<std::byte*>(state) + 2 * i, &bits, sizeof(bits));
      }
      return;
    case StateFormat::kInt8:
      for (std::size_t i = 0; i < n; i += kQuantBlock) {
        update_internal::quantize_block(map_of(hyper, k), values + i,
                                        static_cast<std::uint8_t*>(state) + i,
                                        scale + i / kQuantBlock, std::min(kQuantBlock, n - i));
      }
      return;
  }
}

}  // namespace offload
