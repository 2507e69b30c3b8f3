// The reference: every rule and format spelled out, one element at a time. Compiled with
// -ffp-contract=off: each operation is rounded once, and so is fma(a, b, c) where ATen contracts
// (AtenRounding::fma) and where states are narrow (RuleScalars::fused).
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "optim/block_quant.h"
#include "optim/narrow_float.h"
#include "optim/rule_kernels.h"
#include "optim/stochastic_rounding.h"

namespace offload::update_internal {
namespace {

struct Reference {
  const RuleScalars& s;

  float fma(float a, float b, float c) const {
    if (s.fused || s.rounding.fma) return std::fma(a, b, c);
    const float product = a * b;
    return product + c;
  }
  float sqrt(float x) const {
    if (s.fused) return std::sqrt(x);
    float root;
    sqrt_by_rule(s.rounding.sqrt, &x, &root, 1);
    return root;
  }
  float lerp(float state, float g) const {
    return fma(s.lerp_weight, g - state, s.lerp_to_grad ? g : state);
  }
  // mul_(beta2).addcmul_(g, g, value=1 - beta2)
  float square_average(float state, float g) const {
    if (s.fused) return std::fma(-s.one_minus_beta2, std::fma(-g, g, state), state);
    const float kept = state * s.beta2;
    return fma(s.one_minus_beta2 * g, g, kept);
  }
  // c + a / b
  float add_quotient(float c, float a, float b) const {
    if (s.fused) return std::fma(a, 1.0f / b, c);
    const float quotient = a / b;
    return c + quotient;
  }
  // param.addcdiv_(a, b, value=-lr)
  float step_by_quotient(float p, float a, float b) const {
    return add_quotient(p, s.neg_step_size * a, b);
  }

  // AdamW, Adam. States: exp_avg, exp_avg_sq, max_exp_avg_sq.
  void adam(float& p, float g, float* state) const {
    p = p * s.param_decay;
    state[0] = lerp(state[0], g);
    state[1] = square_average(state[1], g);
    float square = state[1];
    if (s.amsgrad) {
      // torch.maximum: NaN if either is.
      const bool keep = state[2] > square || std::isnan(state[2]);
      square = state[2] = keep ? state[2] : square;
    }
    const float root = s.fused ? sqrt(square) : sqrt(square) / s.bias_correction2_sqrt;
    const float denominator = root + s.eps;
    p = step_by_quotient(p, state[0], denominator);
  }

  // State: momentum_buffer.
  void sgd(float& p, float g, float* state) const {
    if (s.has_momentum) {
      const float kept = state[0] * s.momentum;
      state[0] = s.first ? g : fma(s.one_minus_dampening, g, kept);
      g = s.nesterov ? fma(s.momentum, state[0], g) : state[0];
    }
    p = fma(s.neg_step_size, g, p);
  }

  // State: sum.
  void adagrad(float& p, float g, float* state) const {
    state[0] = fma(g, g, state[0]);
    p = step_by_quotient(p, g, sqrt(state[0]) + s.eps);
  }

  // States: square_avg, momentum_buffer, grad_avg.
  void rmsprop(float& p, float g, float* state) const {
    state[0] = square_average(state[0], g);
    float variance = state[0];
    if (s.centered) {
      float& average = state[s.has_momentum ? 2 : 1];
      average = lerp(average, g);
      variance = fma(-average, average, variance);
    }
    const float denominator = sqrt(variance) + s.eps;
    if (s.has_momentum) {
      state[1] = add_quotient(state[1] * s.momentum, g, denominator);
      p = fma(s.neg_step_size, state[1], p);
    } else {
      p = step_by_quotient(p, g, denominator);
    }
  }

  // State: exp_avg. The paper's algorithm; torch has no such class:
  //   p.mul_(1 - lr * weight_decay)
  //   p.add_((exp_avg * beta1 + grad * (1 - beta1)).sign(), alpha=-lr)
  //   exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)
  void lion(float& p, float g, float* state) const {
    p = p * s.param_decay;
    const float kept = state[0] * s.beta1;
    const float added = g * s.one_minus_beta1;
    const float direction = kept + added;
    const float sign = direction > 0.0f ? 1.0f : direction < 0.0f ? -1.0f : 0.0f;  // NaN: 0
    p = fma(s.neg_step_size, sign, p);
    state[0] = fma(s.one_minus_beta2, g, state[0] * s.beta2);
  }

  void step(float& p, float g, float* state) const {
    if (s.maximize) g = -g;
    if (s.decays_grad) g = fma(s.weight_decay, p, g);
    switch (s.rule) {
      case Rule::kAdamW:
      case Rule::kAdam:
        return adam(p, g, state);
      case Rule::kSgd:
        return sgd(p, g, state);
      case Rule::kAdagrad:
        return adagrad(p, g, state);
      case Rule::kRmsprop:
        return rmsprop(p, g, state);
      case Rule::kLion:
        return lion(p, g, state);
    }
  }
};

template <typename T>
T load(const void* array, std::size_t i) {
  T value;
  std::memcpy(&value, static_cast<const std::byte*>(array) + i * sizeof(T), sizeof(T));
  return value;
}

template <typename T>
void store(void* array, std::size_t i, T value) {
  std::memcpy(static_cast<std::byte*>(array) + i * sizeof(T), &value, sizeof(T));
}

// The gradient, multiplied by the factors, each product rounded to its type; one of 16 bits then by
// what unscales it, in fp32.
float load_grad(const UpdateCall& call, std::size_t i) {
  const RuleScalars& s = call.scalars;
  const ElementType type = call.format.param;
  if (type == ElementType::kFloat32) {
    float g = load<float>(call.arrays.grad, i);
    for (std::size_t k = 0; k < s.factor_count; ++k) g *= s.factors[k];
    return g;
  }
  float g = widen(type, load<std::uint16_t>(call.arrays.grad, i));
  for (std::size_t k = 0; k < s.factor_count; ++k) g = widen(type, narrow(type, g * s.factors[k]));
  return s.unscale == 1.0f ? g : g * s.unscale;
}

// Elements [first, first + n), n <= kQuantBlock; with kInt8 one block.
void update_block(const UpdateCall& call, std::size_t first, std::size_t n) {
  const UpdateArrays& a = call.arrays;
  float states[kMaxStates][kQuantBlock];
  for (std::size_t k = 0; k < call.states; ++k) {
    const auto* codes = static_cast<const std::uint8_t*>(a.state[k]) + first;
    const QuantMap& map = call.state_unsigned[k] ? kUnsignedMap : kSignedMap;
    for (std::size_t i = 0; i < n; ++i) {
      if (call.format.state == StateFormat::kFloat32) {
        states[k][i] = load<float>(a.state[k], first + i);
      } else if (call.format.state == StateFormat::kBfloat16) {
        states[k][i] = from_bfloat16(load<std::uint16_t>(a.state[k], first + i));
      }
    }
    if (call.format.state == StateFormat::kInt8) {
      dequantize_block(map, codes, a.scale[k][first / kQuantBlock], states[k], n);
    }
  }

  const Reference reference{call.scalars};
  for (std::size_t i = 0; i < n; ++i) {
    const bool master = call.format.has_master();
    float p = master ? a.master[first + i] : load<float>(a.param, first + i);
    float state[kMaxStates] = {};
    for (std::size_t k = 0; k < call.states; ++k) state[k] = states[k][i];
    reference.step(p, load_grad(call, first + i), state);
    for (std::size_t k = 0; k < call.states; ++k) states[k][i] = state[k];
    if (master) {
      a.master_out[first + i] = p;
      store(a.param_out, first + i, narrow(call.format.param, p));
    } else {
      store(a.param_out, first + i, p);
    }
  }

  for (std::size_t k = 0; k < call.states; ++k) {
    for (std::size_t i = 0; i < n; ++i) {
      if (call.format.state == StateFormat::kFloat32) {
        store(a.state_out[k], first + i, states[k][i]);
      } else if (call.format.state == StateFormat::kBfloat16) {
        const std::uint64_t position = call.seed.first + first + i;
        const RoundingKey key =
            rounding_key(call.seed, call.step, k / 2, static_cast<std::uint32_t>(position >> 32));
        const std::uint32_t bits = rounding_bits(key, static_cast<std::uint32_t>(position));
        store(a.state_out[k], first + i, round_stochastically(states[k][i], bits, k));
      }
    }
    if (call.format.state == StateFormat::kInt8) {
      quantize_block(call.state_unsigned[k] ? kUnsignedMap : kSignedMap, states[k],
                     static_cast<std::uint8_t*>(a.state_out[k]) + first,
                     a.scale_out[k] + first / kQuantBlock, n);
    }
  }
}

}  // namespace

void update_scalar(const UpdateCall& call) {
  for (std::size_t first = 0; first < call.arrays.n; first += kQuantBlock) {
    update_block(call, first, std::min(kQuantBlock, call.arrays.n - first));
  }
}

}  // namespace offload::update_internal
