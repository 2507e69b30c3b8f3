// Which IoEngine this machine gets, and why.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "base/status.h"
#include "io/io_engine.h"

namespace offload {

enum class EngineKind : std::uint8_t {
  kAuto,     // a ring where the kernel gives one, threads elsewhere
  kUring,    // a ring or an error
  kThreads,  // pread/pwrite threads
};

struct EngineChoice {
  std::unique_ptr<IoEngine> engine;
  std::string reason;  // one line: what was chosen and why; after a fallback, the refusal
};

Result<EngineChoice> make_engine(EngineKind kind, const IoEngineOptions& options);

}  // namespace offload
