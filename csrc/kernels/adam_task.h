// One update of a slab by Adam or AdamW, as a kernel is given it, and the parts of it that one
// thread does.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/adam_step.h"
#include "kernels/element.h"
#include "optim/block_quant.h"
#include "optim/update_rule.h"

namespace offload::kernels {

struct AdamTask {
  AdamScalars scalars;
  ElementType type = ElementType::kFloat32;
  UpdateArrays arrays;
  // Of kInt8 states. A device cannot index what is constant on the host.
  update_internal::QuantMap signed_map = update_internal::kSignedMap;
  update_internal::QuantMap unsigned_map = update_internal::kUnsignedMap;
};

OFFLOAD_HD inline float load_param(const AdamTask& task, std::size_t i) {
  return task.type == ElementType::kFloat32 ? static_cast<const float*>(task.arrays.param)[i]
                                            : task.arrays.master[i];
}

OFFLOAD_HD inline void store_param(const AdamTask& task, std::size_t i, float value) {
  if (task.type != ElementType::kFloat32) task.arrays.master_out[i] = value;
  store(task.type, task.arrays.param_out, i, value);
}

OFFLOAD_HD inline float load_grad(const AdamTask& task, std::size_t i) {
  return scaled_grad(task.scalars, task.type, load(task.type, task.arrays.grad, i));
}

// States of fp32: all of element i.
OFFLOAD_HD inline void adam_float32(const AdamTask& task, std::size_t i) {
  const UpdateArrays& a = task.arrays;
  AdamElement e{load_param(task, i), static_cast<const float*>(a.state[0])[i],
                static_cast<const float*>(a.state[1])[i]};
  adam_step(task.scalars, load_grad(task, i), e);
  store_param(task, i, e.param);
  static_cast<float*>(a.state_out[0])[i] = e.exp_avg;
  static_cast<float*>(a.state_out[1])[i] = e.exp_avg_sq;
}

// States of 8 bits: element i up to the values of its new states.
OFFLOAD_HD inline AdamElement adam_int8(const AdamTask& task, std::size_t i) {
  const UpdateArrays& a = task.arrays;
  const std::size_t block = i / kQuantBlock;
  AdamElement e{
      load_param(task, i),
      decode(task.signed_map, static_cast<const std::uint8_t*>(a.state[0])[i], a.scale[0][block]),
      decode(task.unsigned_map, static_cast<const std::uint8_t*>(a.state[1])[i],
             a.scale[1][block])};
  adam_step(task.scalars, load_grad(task, i), e);
  store_param(task, i, e.param);
  return e;
}

// Its new codes, when the scales of its block are known.
OFFLOAD_HD inline void store_int8(const AdamTask& task, std::size_t i, const AdamElement& e,
                                  float scale0, float scale1) {
  const UpdateArrays& a = task.arrays;
  static_cast<std::uint8_t*>(a.state_out[0])[i] = encode_scaled(task.signed_map, e.exp_avg, scale0);
  static_cast<std::uint8_t*>(a.state_out[1])[i] =
      encode_scaled(task.unsigned_map, e.exp_avg_sq, scale1);
}

}  // namespace offload::kernels
