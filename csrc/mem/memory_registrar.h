// MemoryRegistrar: told of the memory an arena commits, to page-lock it for a device.
//
// Contract: an arena registers each range right after it became writable and before any lease lies
// in it, and unregisters each before it is unmapped. Ranges are disjoint, whole pages, and adjacent
// ranges stay separate registrations: one device copy may not cross from one into the next (CUDA
// answers cudaErrorInvalidValue), so long copies are split where HostMemory::commit_step() says.
// Calls for one arena never overlap; a registrar shared by several arenas must be thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/status.h"

namespace offload {

class MemoryRegistrar {
 public:
  virtual ~MemoryRegistrar() = default;

  // After a failure the range is not registered.
  virtual Status register_range(std::byte* base, std::uint64_t nbytes) = 0;
  // REQUIRES: exactly a range that was registered. After a failure the arena leaves the range
  // mapped for good: a device may still hold its pages.
  virtual Status unregister_range(std::byte* base, std::uint64_t nbytes) = 0;
};

}  // namespace offload
