#include "cuda/host_registration.h"

#include <string>

#include "cuda/cuda_status.h"

namespace offload {

#ifdef OFFLOAD_HAVE_CUDA

bool cuda_in_this_build() {
  return true;
}

Status check_cuda_device() {
  int count = 0;
  OFFLOAD_RETURN_IF_ERROR(cuda_status(cudaGetDeviceCount(&count), "cudaGetDeviceCount"));
  if (count == 0) return Status::error(Code::kUnsupported, "there is no CUDA device");
  return Status::ok();
}

Status cuda_register_host(std::byte* base, std::uint64_t nbytes) {
  return cuda_status(cudaHostRegister(base, nbytes, cudaHostRegisterPortable),
                     "cudaHostRegister of " + std::to_string(nbytes) + " bytes");
}

Status cuda_unregister_host(std::byte* base) {
  return cuda_status(cudaHostUnregister(base), "cudaHostUnregister");
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
