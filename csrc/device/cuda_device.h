// CudaDevice: a GPU, through the CUDA runtime.
//
// Copies are made by two streams of its own, which do not wait for the legacy default stream. The
// compute stream is whatever set_compute_stream() was last given, at first the default one. Every
// call leaves the calling thread's current device as it was.
#pragma once

#include <memory>

#include "base/status.h"
#include "device/device.h"

namespace offload {

// Whether this build has CUDA at all.
bool cuda_devices_in_this_build();

// How the device with this index gets at the host's memory. Errors: those of make_cuda_device().
Result<Device::HostAccess> cuda_host_access(int index);

// kUnsupported in a build without CUDA or where no device can be used; kInvalid when there is none
// with this index.
Result<std::shared_ptr<Device>> make_cuda_device(int index, bool check = false);

}  // namespace offload
