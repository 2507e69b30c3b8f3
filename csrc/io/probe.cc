#include "io/probe.h"

#include <utility>

#include "io/io_scheduler.h"
#include "io/thread_pool_engine.h"
#include "io/uring_engine.h"

namespace offload {

Result<EngineChoice> make_engine(EngineKind kind, const IoEngineOptions& options) {
  // Checked first: a bad option is the caller's error, not a reason to fall back.
  OFFLOAD_RETURN_IF_ERROR(validate_options(options));
  std::string reason = "threads: requested";
  if (kind != EngineKind::kThreads) {
    Result<std::unique_ptr<IoEngine>> ring = make_uring_engine(options);
    if (ring.is_ok()) {
      reason = kind == EngineKind::kUring ? "io_uring: requested"
                                          : "io_uring: the kernel supports all that is needed";
      reason += " (" + ring.value()->describe() + ")";
      return EngineChoice{ring.take(), std::move(reason)};
    }
    if (kind == EngineKind::kUring) return ring.status();
    reason = "threads: no io_uring, " + ring.status().to_string();
  }
  Result<std::unique_ptr<IoEngine>> pool = make_thread_pool_engine(options);
  if (!pool.is_ok()) return pool.status();
  return EngineChoice{pool.take(), std::move(reason)};
}

}  // namespace offload
