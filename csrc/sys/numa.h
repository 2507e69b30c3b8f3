// NUMA: which nodes there are, which one a thread runs on, and placing memory on one.
//
// Free functions over sysfs, getcpu(2) and mbind(2); no libnuma. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"

namespace offload {

inline constexpr const char* kNumaRoot = "/sys/devices/system/node";

// The online nodes in ascending order, never none. `root` stands in for the kernel's folder in
// tests; where it does not exist the kernel has no NUMA and there is node 0 alone. kInvalid when
// the list cannot be understood.
Result<std::vector<int>> online_numa_nodes(const std::string& root = kNumaRoot);

// The node of the processor that the calling thread runs on at this moment.
Result<int> current_numa_node();

// Pages of [base, base + nbytes) that are first touched from now on come from `node` while it has
// any free. REQUIRES: `base` is page aligned, `node` >= 0. EINVAL: no such node, or the process may
// not use it; EPERM or ENOSYS: no mbind(2) here (some containers).
Status prefer_numa_node(std::byte* base, std::uint64_t nbytes, int node);

}  // namespace offload
