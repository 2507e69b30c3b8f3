#include "mem/cuda_registrar.h"

#include <mutex>

#include "cuda/host_registration.h"

namespace offload {

Result<std::shared_ptr<CudaRegistrar>> CudaRegistrar::create() {
  const Status usable = check_cuda_device();
  if (!usable.is_ok()) return usable.with_context("host memory cannot be page-locked for CUDA");
  static std::mutex mutex;
  static std::weak_ptr<CudaRegistrar> made;
  std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<CudaRegistrar> registrar = made.lock();
  if (registrar == nullptr) made = registrar = std::shared_ptr<CudaRegistrar>(new CudaRegistrar());
  return registrar;
}

Status CudaRegistrar::register_range(std::byte* base, std::uint64_t nbytes) {
  return cuda_register_host(base, nbytes);
}

Status CudaRegistrar::unregister_range(std::byte* base, std::uint64_t) {
  return cuda_unregister_host(base);
}

}  // namespace offload
