#include "cuda/host_registration.h"

#include <string>

#ifdef OFFLOAD_HAVE_CUDA
#include <cuda_runtime_api.h>
#endif

namespace offload {

#ifdef OFFLOAD_HAVE_CUDA

namespace {

Code code_of(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return Code::kNoMemory;
    case cudaErrorInvalidValue:
    case cudaErrorHostMemoryAlreadyRegistered:
    case cudaErrorHostMemoryNotRegistered:
      return Code::kInvalid;
    default:
      return Code::kUnsupported;
  }
}

Status to_status(cudaError_t error, const std::string& call) {
  if (error == cudaSuccess) return Status::ok();
  // Returns and clears the pending error, which is `error` once more.
  static_cast<void>(cudaGetLastError());
  return Status::error(code_of(error), call + ": " + cudaGetErrorName(error) + " (" +
                                           cudaGetErrorString(error) + ")");
}

}  // namespace

bool cuda_in_this_build() {
  return true;
}

Status check_cuda_device() {
  int count = 0;
  OFFLOAD_RETURN_IF_ERROR(to_status(cudaGetDeviceCount(&count), "cudaGetDeviceCount"));
  if (count == 0) return Status::error(Code::kUnsupported, "there is no CUDA device");
  return Status::ok();
}

Status cuda_register_host(std::byte* base, std::uint64_t nbytes) {
  return to_status(cudaHostRegister(base, nbytes, cudaHostRegisterPortable),
                   "cudaHostRegister of " + std::to_string(nbytes) + " bytes");
}

Status cuda_unregister_host(std::byte* base) {
  return to_status(cudaHostUnregister(base), "cudaHostUnregister");
}

#else

namespace {

Status no_cuda() {
  return Status::error(Code::kUnsupported, "this build has no CUDA");
}

}  // namespace

bool cuda_in_this_build() {
  return false;
}

Status check_cuda_device() {
  return no_cuda();
}

Status cuda_register_host(std::byte*, std::uint64_t) {
  return no_cuda();
}

Status cuda_unregister_host(std::byte*) {
  return no_cuda();
}

#endif

}  // namespace offload
