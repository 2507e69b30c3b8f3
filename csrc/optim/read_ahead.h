// Asking for memory before it is needed, in loops that go through several arrays from front to
// back.
//
// The prefetch instruction is dropped where the page's address is not in the TLB, which in every
// array is so at every page; and the CPU's own prefetcher stops at the end of a page. So a byte of
// the next page is read in time, once per page. Measured on a Sapphire Rapids core, in a virtual
// machine with pages of 4 KiB: AdamW with 8-bit states 54 -> 41 ms for 100M elements, with bfloat16
// states 51 -> 41 ms.
#pragma once

#include <cstddef>
#include <cstdint>

namespace offload::update_internal {

inline constexpr std::size_t kLineBytes = 64;
inline constexpr std::size_t kPageBytes = 4096;
// How far ahead lines are requested, and pages touched. 1 to 2 KiB and 2 to 4 KiB are alike.
inline constexpr std::size_t kPrefetchBytes = 1536;
inline constexpr std::size_t kTouchBytes = 3072;

// Before the `step` bytes at `at` of an array of `size` bytes are used, and those at `at + step`
// next. Reads nothing beyond the array. (Always inlined: see IsaSources in CONTRIBUTING.md.)
[[gnu::always_inline]] inline void read_ahead(const void* array, std::size_t at, std::size_t step,
                                              std::size_t size) {
  // Addresses past the end are hints and are not dereferenced.
  const auto address = reinterpret_cast<std::uintptr_t>(array) + at;
  for (std::size_t line = 0; line < step; line += kLineBytes) {
    __builtin_prefetch(reinterpret_cast<const void*>(address + kPrefetchBytes + line));
  }
  const std::uintptr_t next = address + kTouchBytes;
  if (next % kPageBytes < step && at + kTouchBytes < size) {
    static_cast<void>(*reinterpret_cast<const volatile unsigned char*>(next));
  }
}

}  // namespace offload::update_internal
