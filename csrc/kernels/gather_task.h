// Gathering gradients into a slab, and what is known of them afterwards, in one pass: scaled, cast,
// perhaps added, with the sum of squares of each tensor and whether all are finite.
//
// The sum is in fp64 and in one order, whatever runs it: a chunk of kChunk elements has kLanes
// lanes, of which lane l adds elements l, l + kLanes, ...; lanes are added by halves, and the
// chunks of a tensor in turn. Squares of fp32 are exact in fp64, so nothing overflows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/element.h"
#include "optim/update_rule.h"

namespace offload::kernels {

inline constexpr std::size_t kLanes = 256;
inline constexpr std::size_t kChunk = 4096;
// What one launch takes, so that it fits the arguments of a kernel.
inline constexpr std::size_t kMaxGatherTensors = 64;

struct GatherTensor {
  const void* grad = nullptr;  // of GatherTask::from
  std::uint64_t n = 0;
  std::uint64_t offset = 0;  // of its first element in the slab
};

struct GatherTask {
  GatherTensor tensors[kMaxGatherTensors];
  std::uint32_t count = 0;
  ElementType from = ElementType::kFloat32;
  ElementType to = ElementType::kFloat32;
  float scale = 1;
  bool add = false;  // to what is in the slab
  void* slab = nullptr;
  double* partial = nullptr;           // gather_chunks() of them: scratch
  double* sum_squares = nullptr;       // of each tensor, as it is in the slab; set
  std::uint32_t* nonfinite = nullptr;  // becomes 1 when an element in the slab is not finite
};

OFFLOAD_HD inline std::uint64_t chunks_of(std::uint64_t n) {
  return (n + kChunk - 1) / kChunk;
}

// The sum of squares of a lane of a chunk of tensor t; adds to `bad` what is not finite.
OFFLOAD_HD inline double gather_lane(const GatherTask& task, std::size_t t, std::uint64_t chunk,
                                     std::size_t lane, bool& bad) {
  const GatherTensor& tensor = task.tensors[t];
  const std::uint64_t end = (chunk + 1) * kChunk < tensor.n ? (chunk + 1) * kChunk : tensor.n;
  double sum = 0.0;
  for (std::uint64_t i = chunk * kChunk + lane; i < end; i += kLanes) {
    float value = load(task.from, tensor.grad, i) * task.scale;
    if (task.add) {
      value = load(task.to, task.slab, tensor.offset + i) + rounded(task.to, value);
    }
    value = rounded(task.to, value);
    store(task.to, task.slab, tensor.offset + i, value);
    bad = bad || !is_finite(value);
    const double wide = value;
    sum = sum + wide * wide;
  }
  return sum;
}

}  // namespace offload::kernels
