#include "mem/make_host_memory.h"

#include <utility>

#include "mem/counted_memory.h"
#include "mem/poisoned_memory.h"

namespace offload {

Result<std::shared_ptr<HostMemory>> make_host_memory(std::uint64_t capacity,
                                                     const HostMemoryOptions& options) {
  Result<std::shared_ptr<HostArena>> arena = HostArena::create(capacity, options.arena);
  if (!arena.is_ok()) return arena.status();
  std::shared_ptr<HostMemory> memory = arena.take();
  if (options.budget != nullptr) {
    memory = BudgetedMemory::wrap(std::move(memory), options.budget);
  }
  if (options.poison) memory = PoisonedMemory::wrap(std::move(memory));
  return std::shared_ptr<HostMemory>(CountedMemory::wrap(std::move(memory)));
}

}  // namespace offload
