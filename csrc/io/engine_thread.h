// How engines start their threads.
#pragma once

#include <functional>
#include <thread>

#include "base/status.h"

namespace offload {

// Starts a thread named `name` (at most 15 characters) that runs `body` with all signals blocked,
// so that Ctrl-C interrupts a thread of the caller's and never an engine. kOsError when there can
// be no more threads.
Result<std::thread> start_engine_thread(const char* name, std::function<void()> body);

}  // namespace offload
