// What a call of the CUDA runtime answered, as a Status. Only in a build with CUDA.
#pragma once

#ifdef OFFLOAD_HAVE_CUDA

#include <cuda_runtime_api.h>

#include <string_view>

#include "base/status.h"

namespace offload {

// Names `call`, CUDA's name of the error and its sentence. Clears the pending error, so that no
// later call of anybody's finds it; kUnsupported where no device can be used, kDevice where one
// failed. Thread-safe.
Status cuda_status(cudaError_t error, std::string_view call);

}  // namespace offload

#endif
