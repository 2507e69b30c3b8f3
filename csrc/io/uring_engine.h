// The IoEngine of Linux 5.6 and later: one io_uring, driven by one thread.
#pragma once

#include <memory>

#include "base/status.h"
#include "io/io_engine.h"

namespace offload {

// kUnsupported in a build without liburing, or when the ring lacks what the engine needs; kOsError
// when the kernel refuses a ring (EPERM: disabled or filtered; ENOMEM: locked-memory limit).
Result<std::unique_ptr<IoEngine>> make_uring_engine(const IoEngineOptions& options);

}  // namespace offload
