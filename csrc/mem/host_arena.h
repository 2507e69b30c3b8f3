// HostArena: a reserved range of addresses, who has which part of it, and the pages behind it.
//
// The arena reserves `capacity` bytes of addresses, aligned for huge pages, and commits pages from
// the low end, in steps, as blocks first need them: a process under RLIMIT_DATA is charged only for
// what was used so far. Placement is best fit, of equal fits the lowest address; free ranges
// coalesce. Where there is more than one NUMA node, pages come from one of them while it has any.
//
// With a MemoryRegistrar every committed range is registered, and unregistered before it is
// unmapped. A registration that fails fails the allocation that needed it; what is committed
// already goes on being used.
//
// Thread-safe. What it does not do, wrappers do: see host_memory.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"
#include "mem/free_ranges.h"
#include "mem/host_memory.h"
#include "mem/memory_registrar.h"
#include "sys/numa.h"

namespace offload {

struct HostArenaOptions {
  // Null: pages are not registered.
  std::shared_ptr<MemoryRegistrar> registrar;
  // Pages are committed, and registered, up to multiples of this; a power of two of at least a
  // page. 0: kCommitStep, or kRegisteredCommitStep with a registrar.
  std::uint64_t commit_step = 0;
  // The NUMA node that pages are to come from. Nothing: that of the creating thread, where there is
  // more than one.
  std::optional<int> numa_node;
  std::string numa_root = kNumaRoot;
};

class HostArena final : public HostMemory {
 public:
  // One huge page. Steps keep the numbers of mprotect calls and of kernel mappings small.
  static constexpr std::uint64_t kCommitStep = std::uint64_t{2} << 20;
  // A registration costs a call to the driver and ends where copies must be split.
  static constexpr std::uint64_t kRegisteredCommitStep = std::uint64_t{32} << 20;

  // `capacity` is rounded down to whole pages. kInvalid when less than one page is left, the commit
  // step is none or the NUMA node is not online; kNoMemory when the address space cannot be
  // reserved. Memory that cannot be placed on the creating thread's node, or on any since mbind(2)
  // is forbidden, is placed anywhere and note() says so.
  static Result<std::shared_ptr<HostArena>> create(std::uint64_t capacity,
                                                   const HostArenaOptions& options = {});
  ~HostArena() override;

  Result<Block> allocate_block(std::uint64_t nbytes) override;
  void give_back(Block block) override;
  Usage usage() const override;  // without peak and allocations

  std::byte* base() const override { return base_; }
  std::uint64_t capacity() const override { return capacity_; }
  const std::string& note() const override { return note_; }

  std::uint64_t commit_step() const override { return commit_step_; }
  // The node that pages come from; nothing when no node was preferred.
  std::optional<int> numa_node() const { return numa_node_; }

 private:
  HostArena(std::byte* base, std::uint64_t capacity, const HostArenaOptions& options);
  Status choose_node(const HostArenaOptions& options);
  Status commit_to(std::uint64_t end);                           // REQUIRES: mutex_ held
  Status drop_pages(std::uint64_t begin, std::uint64_t nbytes);  // back to inaccessible

  std::byte* const base_;
  const std::uint64_t capacity_;
  const std::uint64_t commit_step_;
  const std::shared_ptr<MemoryRegistrar> registrar_;
  std::optional<int> numa_node_;  // constant after create()
  std::string note_;              // constant after create()

  mutable std::mutex mutex_;  // guards all below
  FreeRanges free_;
  std::uint64_t committed_ = 0;
  std::vector<std::uint64_t> registered_ends_;  // of adjacent ranges, the first from 0
};

}  // namespace offload
