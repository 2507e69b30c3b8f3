// The kernels. Their arithmetic is in adam_task.h and gather_task.h; what is here is who does which
// part, and the sums and maxima of a block of threads.
#include <algorithm>
#include <cstdint>
#include <string>

#include "cuda/cuda_status.h"
#include "kernels/kernels.h"

namespace offload::kernels {
namespace {

constexpr unsigned kThreads = 256;
constexpr std::size_t kMostBlocks = 65536;  // beyond it threads go round again
static_assert(kThreads == kQuantBlock, "a block of threads is a block of codes");
static_assert(kThreads == kLanes, "a thread is a lane");

__global__ void __launch_bounds__(kThreads) adam_float32_kernel(const AdamTask task) {
  const std::size_t step = static_cast<std::size_t>(gridDim.x) * kThreads;
  for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x;
       i < task.arrays.n; i += step) {
    adam_float32(task, i);
  }
}

// The largest of all threads' numbers, for all of them. `shared` has room for a warp's.
__device__ std::uint32_t largest_of_block(std::uint32_t value, std::uint32_t* shared) {
  value = __reduce_max_sync(0xffffffff, value);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  std::uint32_t largest = 0;
  for (unsigned warp = 0; warp < kThreads / 32; ++warp) largest = max(largest, shared[warp]);
  __syncthreads();  // before the next use of `shared`
  return largest;
}

__global__ void __launch_bounds__(kThreads) adam_int8_kernel(const AdamTask task) {
  __shared__ std::uint32_t shared[kThreads / 32];
  const std::size_t blocks = (task.arrays.n + kQuantBlock - 1) / kQuantBlock;
  for (std::size_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const std::size_t i = block * kQuantBlock + threadIdx.x;
    const bool inside = i < task.arrays.n;
    AdamElement e{0.0f, 0.0f, 0.0f};
    if (inside) e = adam_int8(task, i);
    // A barrier inside: every thread has read the block's old scales before one writes the new.
    const float scale0 =
        block_scale(largest_of_block(std::bit_cast<std::uint32_t>(e.exp_avg) & 0x7fffffff, shared));
    const float scale1 = block_scale(
        largest_of_block(std::bit_cast<std::uint32_t>(e.exp_avg_sq) & 0x7fffffff, shared));
    if (inside) store_int8(task, i, e, scale0, scale1);
    if (threadIdx.x == 0) {
      task.arrays.scale_out[0][block] = scale0;
      task.arrays.scale_out[1][block] = scale1;
    }
  }
}

// One block of threads for each chunk of each tensor.
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const GatherTask task, std::uint64_t chunks) {
  __shared__ double lanes[kLanes];
  for (std::uint64_t global = blockIdx.x; global < chunks; global += gridDim.x) {
    std::uint64_t chunk = global;
    std::size_t t = 0;
    while (chunk >= chunks_of(task.tensors[t].n)) chunk -= chunks_of(task.tensors[t++].n);
    bool bad = false;
    lanes[threadIdx.x] = gather_lane(task, t, chunk, threadIdx.x, bad);
    if (__syncthreads_or(bad) != 0 && threadIdx.x == 0) atomicOr(task.nonfinite, 1u);
    for (unsigned half = kLanes / 2; half > 0; half /= 2) {
      if (threadIdx.x < half) lanes[threadIdx.x] = lanes[threadIdx.x] + lanes[threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0) task.partial[global] = lanes[0];
    __syncthreads();
  }
}

// A thread for each tensor: chunks are added in turn.
__global__ void gather_sums_kernel(const GatherTask task) {
  const unsigned t = threadIdx.x;
  if (t >= task.count) return;
  std::uint64_t first = 0;
  for (unsigned before = 0; before < t; ++before) first += chunks_of(task.tensors[before].n);
  double sum = 0.0;
  for (std::uint64_t c = 0; c < chunks_of(task.tensors[t].n); ++c)
    sum = sum + task.partial[first + c];
  task.sum_squares[t] = sum;
}

unsigned blocks_for(std::size_t n) {
  return static_cast<unsigned>(std::min(kMostBlocks, (n + kThreads - 1) / kThreads));
}

}  // namespace

bool can_launch_adam(const RuleHyper& hyper, const UpdateFormat& format) {
  return format.state == StateFormat::kInt8 || hyper.rounding.sqrt == SqrtRule::kIeee;
}

Status launch_adam(const AdamTask& task, StateFormat state, std::uintptr_t stream) {
  if (!task.scalars.fused && task.scalars.sqrt != SqrtRule::kIeee) {
    return Status::error(Code::kUnsupported, "the Adam kernel takes IEEE square roots only");
  }
  if (task.arrays.n == 0) return Status::ok();
  const unsigned blocks = blocks_for(task.arrays.n);
  auto* const on = reinterpret_cast<cudaStream_t>(stream);
  if (state == StateFormat::kInt8) {
    adam_int8_kernel<<<blocks, kThreads, 0, on>>>(task);
  } else {
    adam_float32_kernel<<<blocks, kThreads, 0, on>>>(task);
  }
  return cuda_status(cudaGetLastError(), "launch of the Adam kernel");
}

Status launch_gather(const GatherTask& task, std::uintptr_t stream) {
  if (task.count > kMaxGatherTensors) {
    return Status::error(Code::kInvalid, "one gather takes " + std::to_string(kMaxGatherTensors) +
                                             " tensors, not " + std::to_string(task.count));
  }
  if (task.count == 0) return Status::ok();
  const std::uint64_t chunks = gather_chunks(task);
  auto* const on = reinterpret_cast<cudaStream_t>(stream);
  if (chunks > 0) {
    const auto blocks = static_cast<unsigned>(std::min<std::uint64_t>(kMostBlocks, chunks));
    gather_kernel<<<blocks, kThreads, 0, on>>>(task, chunks);
    OFFLOAD_RETURN_IF_ERROR(cuda_status(cudaGetLastError(), "launch of the gather kernel"));
  }
  gather_sums_kernel<<<1, kMaxGatherTensors, 0, on>>>(task);
  return cuda_status(cudaGetLastError(), "launch of the gather kernel");
}

}  // namespace offload::kernels
