#include "cuda/cuda_status.h"

#ifdef OFFLOAD_HAVE_CUDA

#include <string>

namespace offload {
namespace {

Code code_of(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return Code::kNoMemory;
    case cudaErrorInvalidValue:
    case cudaErrorHostMemoryAlreadyRegistered:
    case cudaErrorHostMemoryNotRegistered:
      return Code::kInvalid;
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorNotSupported:
    case cudaErrorStubLibrary:
      return Code::kUnsupported;
    default:
      return Code::kDevice;
  }
}

}  // namespace

Status cuda_status(cudaError_t error, std::string_view call) {
  if (error == cudaSuccess) return Status::ok();
  // Returns and clears the pending error, which is `error` once more.
  static_cast<void>(cudaGetLastError());
  return Status::error(code_of(error), std::string(call) + ": " + cudaGetErrorName(error) + " (" +
                                           cudaGetErrorString(error) + ")");
}

}  // namespace offload

#endif
