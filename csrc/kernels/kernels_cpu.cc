// The kernels' code on the CPU, and what does not depend on where they run.
#include <algorithm>
#include <string>

#include "kernels/kernels.h"

namespace offload::kernels {
namespace {

void adam_block_int8(const AdamTask& task, std::size_t first, std::size_t n) {
  AdamElement elements[kQuantBlock];
  std::uint32_t largest0 = 0;
  std::uint32_t largest1 = 0;
  for (std::size_t i = 0; i < n; ++i) {
    elements[i] = adam_int8(task, first + i);
    largest0 = std::max(largest0, std::bit_cast<std::uint32_t>(elements[i].exp_avg) & 0x7fffffff);
    largest1 =
        std::max(largest1, std::bit_cast<std::uint32_t>(elements[i].exp_avg_sq) & 0x7fffffff);
  }
  const float scale0 = block_scale(largest0);
  const float scale1 = block_scale(largest1);
  for (std::size_t i = 0; i < n; ++i) store_int8(task, first + i, elements[i], scale0, scale1);
  task.arrays.scale_out[0][first / kQuantBlock] = scale0;
  task.arrays.scale_out[1][first / kQuantBlock] = scale1;
}

Status check_gather(const GatherTask& task) {
  if (task.count <= kMaxGatherTensors) return Status::ok();
  return Status::error(Code::kInvalid, "one gather takes " + std::to_string(kMaxGatherTensors) +
                                           " tensors, not " + std::to_string(task.count));
}

}  // namespace

Status check_adam(const RuleHyper& hyper, const UpdateFormat& format, std::size_t factor_count) {
  const bool adam = hyper.rule == Rule::kAdam || hyper.rule == Rule::kAdamW;
  const bool state = format.state == StateFormat::kFloat32 || format.state == StateFormat::kInt8;
  if (adam && !hyper.amsgrad && state && factor_count <= kMaxFactors) return Status::ok();
  return Status::error(Code::kUnsupported,
                       "device kernels update by Adam and AdamW without amsgrad, with states of "
                       "fp32 or 8 bits and at most " +
                           std::to_string(kMaxFactors) + " factors");
}

Result<AdamTask> make_adam_task(const RuleHyper& hyper, const UpdateFormat& format,
                                GradFactors factors, const UpdateArrays& arrays) {
  OFFLOAD_RETURN_IF_ERROR(check_adam(hyper, format, factors.count));
  const bool narrow = format.state == StateFormat::kInt8;
  const update_internal::RuleScalars all = update_internal::make_scalars(hyper, factors, narrow);
  AdamTask task;
  task.type = format.param;
  task.arrays = arrays;
  AdamScalars& s = task.scalars;
  s.fused = all.fused;
  s.fma = all.rounding.fma;
  s.sqrt = all.rounding.sqrt;
  s.unscale = all.unscale;
  s.maximize = all.maximize;
  s.decays_grad = all.decays_grad;
  s.lerp_to_grad = all.lerp_to_grad;
  s.weight_decay = all.weight_decay;
  s.param_decay = all.param_decay;
  s.lerp_weight = all.lerp_weight;
  s.beta2 = all.beta2;
  s.one_minus_beta2 = all.one_minus_beta2;
  s.bias_correction2_sqrt = all.bias_correction2_sqrt;
  s.eps = all.eps;
  s.neg_step_size = all.neg_step_size;
  s.factor_count = static_cast<std::uint32_t>(factors.count);
  std::copy_n(factors.values, factors.count, s.factors);
  return task;
}

void run_adam(const AdamTask& task, StateFormat state) {
  const std::size_t n = task.arrays.n;
  if (state == StateFormat::kInt8) {
    for (std::size_t first = 0; first < n; first += kQuantBlock) {
      adam_block_int8(task, first, std::min(kQuantBlock, n - first));
    }
    return;
  }
  for (std::size_t i = 0; i < n; ++i) adam_float32(task, i);
}

std::uint64_t gather_chunks(const GatherTask& task) {
  std::uint64_t chunks = 0;
  for (std::uint32_t t = 0; t < task.count; ++t) chunks += chunks_of(task.tensors[t].n);
  return chunks;
}

Status run_gather(const GatherTask& task) {
  OFFLOAD_RETURN_IF_ERROR(check_gather(task));
  for (std::uint32_t t = 0; t < task.count; ++t) {
    double sum = 0.0;
    for (std::uint64_t chunk = 0; chunk < chunks_of(task.tensors[t].n); ++chunk) {
      double lanes[kLanes];
      bool bad = false;
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        lanes[lane] = gather_lane(task, t, chunk, lane, bad);
      }
      for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
        for (std::size_t lane = 0; lane < half; ++lane) {
          lanes[lane] = lanes[lane] + lanes[lane + half];
        }
      }
      sum = sum + lanes[0];
      if (bad) *task.nonfinite = 1;
    }
    task.sum_squares[t] = sum;
  }
  return Status::ok();
}

#ifndef OFFLOAD_HAVE_CUDA_KERNELS

namespace {

Status no_kernels() {
  return Status::error(Code::kUnsupported, "this build has no CUDA kernels");
}

}  // namespace

bool can_launch_adam(const RuleHyper&, const UpdateFormat&) {
  return false;
}

Status launch_adam(const AdamTask&, StateFormat, std::uintptr_t) {
  return no_kernels();
}

Status launch_gather(const GatherTask&, std::uintptr_t) {
  return no_kernels();
}

#endif

}  // namespace offload::kernels
