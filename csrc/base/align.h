// Alignment arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

namespace offload {

// Slabs, extents and staging buffers are multiples of this and start on it: the page size of the
// supported machines and at least every O_DIRECT alignment that statx reports in practice.
inline constexpr std::size_t kPageBytes = 4096;

// REQUIRES: `alignment` is a power of two.
constexpr std::uint64_t align_up(std::uint64_t value, std::uint64_t alignment) {
  return (value + alignment - 1) & ~(alignment - 1);
}

constexpr bool is_aligned(std::uint64_t value, std::uint64_t alignment) {
  return (value & (alignment - 1)) == 0;
}

}  // namespace offload
