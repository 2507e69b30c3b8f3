// Optimizer update rules: one step of one parameter, or of a run of its elements.
//
// A rule reads a parameter, its gradient and its states, and gives the new parameter and states.
// The arithmetic is fp32 whatever the formats in memory are: what is narrower is widened in
// registers, and rounded when it is stored.
//
// Contract, on every Isa, for every n, position and alignment:
//   - fp32 parameters with fp32 states get the bits of the for-loop path of the torch.optim class
//     (see update_scalar.cc, the reference, for each rule's operations in order), provided
//     RuleHyper::rounding is that of the ATen in use. Left open are the payload and sign of a NaN
//     and, where a decay is 0, the sign of a state that is zero.
//   - the other formats get the bits of the reference, which all instruction sets share. With fp32
//     states that is the same rule on the master copy. With narrower ones it is the rule on the
//     decoded states, rounded by the format; the step rounds as rule_scalars.h says, whatever
//     RuleHyper::rounding is.
// REQUIRES the default floating-point environment. Thread-safe on disjoint outputs; allocates
// nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "optim/aten_rounding.h"
#include "optim/isa.h"

namespace offload {

enum class Rule : std::uint8_t { kAdamW, kAdam, kSgd, kAdagrad, kRmsprop, kLion };

inline constexpr std::size_t kMaxStates = 3;

// One step's hyperparameters. A rule ignores the fields that it does not know.
struct RuleHyper {
  Rule rule = Rule::kAdamW;
  double lr = 0;
  double beta1 = 0;         // Adam, AdamW, Lion
  double beta2 = 0;         // likewise
  double eps = 0;           // Adam, AdamW, Adagrad, RMSprop
  double weight_decay = 0;  // decoupled in AdamW and Lion; elsewhere added to the gradient
  double momentum = 0;      // SGD, RMSprop: 0 means there is no momentum buffer
  double dampening = 0;     // SGD
  double alpha = 0;         // RMSprop
  double lr_decay = 0;      // Adagrad
  double step = 1;          // the count after the increment, >= 1
  bool maximize = false;
  bool amsgrad = false;   // Adam, AdamW: a third state, max_exp_avg_sq
  bool nesterov = false;  // SGD
  bool centered = false;  // RMSprop: a state grad_avg
  // SGD: the momentum buffer has no value yet and becomes a copy of the gradient.
  bool first = false;
  // Multiplied onto the gradient of a 16-bit parameter in fp32, after all factors: a loss scale's
  // inverse. (In its own type, what the scale has kept from underflow would underflow.)
  float unscale = 1;
  AtenRounding rounding = {};
};

// How many states the rule has, in the order of torch's names:
//   Adam, AdamW: exp_avg, exp_avg_sq, [max_exp_avg_sq]     SGD: [momentum_buffer]
//   Adagrad: sum     RMSprop: square_avg, [momentum_buffer], [grad_avg]     Lion: exp_avg
[[nodiscard]] std::size_t state_count(const RuleHyper& hyper);
// Whether state `k` is never negative (squares and their maxima): it may use the unsigned code.
[[nodiscard]] bool state_is_unsigned(const RuleHyper& hyper, std::size_t k);

enum class ElementType : std::uint8_t { kFloat32, kBfloat16, kFloat16 };
enum class StateFormat : std::uint8_t {
  kFloat32,
  kBfloat16,  // stochastic rounding, see stochastic_rounding.h
  kInt8,      // block-wise dynamic quantization, see block_quant.h: one byte and 1/64 of a scale
};

// Elements that share one scale of kInt8. A call that has such a state starts at a multiple of it
// from the parameter's first element, and ends at one or at the parameter's end.
inline constexpr std::size_t kQuantBlock = 256;

// What the arrays of a parameter hold. With a 16-bit `param` the gradient has the same type, and an
// fp32 master copy of the parameter is one more array: the rule works on it, and `param` is written
// from it, rounded to nearest even, and not read.
struct UpdateFormat {
  ElementType param = ElementType::kFloat32;
  StateFormat state = StateFormat::kFloat32;

  [[nodiscard]] bool has_master() const { return param != ElementType::kFloat32; }
};

[[nodiscard]] std::size_t element_bytes(ElementType type);
[[nodiscard]] std::size_t element_bytes(StateFormat format);

// Factors by which the gradient is still to be multiplied (unscaling, clipping), applied one after
// another, values[0] first, each product rounded to the gradient's type: the bits of as many
// grad.mul_() calls.
struct GradFactors {
  const float* values = nullptr;
  std::size_t count = 0;
};

// Element i of each array belongs together. Every output either equals its input or overlaps no
// array at all. No pointer needs more than the alignment of its elements.
struct UpdateArrays {
  const void* param = nullptr;    // not read where there is a master
  const float* master = nullptr;  // fp32 master copy, with a 16-bit parameter
  const void* grad = nullptr;
  const void* state[kMaxStates] = {};
  const float* scale[kMaxStates] = {};  // kInt8: of each kQuantBlock elements
  void* param_out = nullptr;
  float* master_out = nullptr;
  void* state_out[kMaxStates] = {};
  float* scale_out[kMaxStates] = {};
  std::size_t n = 0;
};

// What stochastic rounding depends on besides the element's position: the same bits in whatever
// pieces and threads a parameter is updated.
struct RoundingSeed {
  std::uint64_t seed = 0;       // the user's
  std::uint64_t parameter = 0;  // its number in the optimizer
  std::uint64_t first = 0;      // position in the parameter of the arrays' element 0
};

// One step by best_isa(), or by a given one. REQUIRES: isa_available(isa) and, with fp32 states,
// sqrt_rule_available(isa, hyper.rounding.sqrt).
void update(const RuleHyper& hyper, const UpdateFormat& format, GradFactors factors,
            const RoundingSeed& seed, const UpdateArrays& arrays);
void update_isa(Isa isa, const RuleHyper& hyper, const UpdateFormat& format, GradFactors factors,
                const RoundingSeed& seed, const UpdateArrays& arrays);

// Sets state `k` of the rule to `value` everywhere (Adagrad's initial accumulator). A state that is
// zero is all zero bytes in every format, scales included.
void fill_state(const RuleHyper& hyper, StateFormat format, std::size_t k, float value, void* state,
                float* scale, std::size_t n);
// To and from fp32: what state_dict exchanges. Encoding kBfloat16 rounds to nearest here.
void decode_state(const RuleHyper& hyper, StateFormat format, std::size_t k, const void* state,
                  const float* scale, float* out, std::size_t n);
void encode_state(const RuleHyper& hyper, StateFormat format, std::size_t k, const float* values,
                  void* state, float* scale, std::size_t n);

}  // namespace offload
