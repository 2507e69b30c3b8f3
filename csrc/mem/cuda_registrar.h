// CudaRegistrar: page-locks the memory of arenas for CUDA, for all of the process's devices at
// once: each device has the same one, since no range may be page-locked twice.
//
// Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "base/status.h"
#include "mem/memory_registrar.h"

namespace offload {

class CudaRegistrar final : public MemoryRegistrar {
 public:
  // kUnsupported where this build has no CUDA or no device can be used.
  static Result<std::shared_ptr<CudaRegistrar>> create();

  Status register_range(std::byte* base, std::uint64_t nbytes) override;
  Status unregister_range(std::byte* base, std::uint64_t nbytes) override;

 private:
  CudaRegistrar() = default;
};

}  // namespace offload
