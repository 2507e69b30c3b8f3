// Page-locking of host memory for CUDA devices.
//
// Free functions, thread-safe. In a build without CUDA each answers kUnsupported; in one with CUDA
// the runtime is linked statically and looks for the driver at the first call, so that the same
// build serves machines without a GPU. Every failure names the CUDA error and leaves no pending
// error behind for the caller's next CUDA call to stumble on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/status.h"

namespace offload {

// Whether this build has CUDA at all.
bool cuda_in_this_build();

// kUnsupported where no CUDA device can be used: no driver, too old a driver, no device.
Status check_cuda_device();

// [base, base + nbytes) becomes page-locked, for every device. Touches all its pages. kNoMemory
// when that much cannot be locked; kInvalid when a part of it is registered already. REQUIRES:
// whole pages.
Status cuda_register_host(std::byte* base, std::uint64_t nbytes);

// REQUIRES: `base` is where a registered range starts, and no copy from or to it is in flight.
Status cuda_unregister_host(std::byte* base);

}  // namespace offload
