// make_host_memory: the usual stack, from the outside in: CountedMemory, PoisonedMemory where asked
// for, BudgetedMemory where there is a budget beside the arena's own size, HostArena.
#pragma once

#include <cstdint>
#include <memory>

#include "base/status.h"
#include "mem/budgeted_memory.h"
#include "mem/host_arena.h"

namespace offload {

struct HostMemoryOptions {
  bool poison = false;
  // Shared with other memories; null: the arena's size is the limit.
  std::shared_ptr<Budget> budget = nullptr;
  HostArenaOptions arena = {};
};

// Errors: those of HostArena::create().
Result<std::shared_ptr<HostMemory>> make_host_memory(std::uint64_t capacity,
                                                     const HostMemoryOptions& options = {});

}  // namespace offload
