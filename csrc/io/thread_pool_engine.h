// The IoEngine of machines without io_uring: threads that each move one request at a time with
// pread/pwrite.
#pragma once

#include <memory>

#include "base/status.h"
#include "io/io_engine.h"

namespace offload {

// Requests in flight: the smaller of options.threads and options.queue_depth.
Result<std::unique_ptr<IoEngine>> make_thread_pool_engine(const IoEngineOptions& options);

}  // namespace offload
