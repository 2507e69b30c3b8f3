// CRC32C (Castagnoli, RFC 3720): the checksum of every extent.
//
// Contract: pure functions of the bytes, the same value on every path; no alignment requirement.
// Thread-safe. `seed` is the CRC of the bytes that came before, so that
//   crc32c(b, nb, crc32c(a, na)) == crc32c(ab, na + nb).
#pragma once

#include <cstddef>
#include <cstdint>

namespace offload {

// What is to become of the data in the caches of the core that reads it: it is used again soon, or
// not before much else was. A hint; the value is the same.
enum class CacheUse { kKeep, kPass };

// The CRC32C of `nbytes` at `data`, by the fastest path that this CPU has.
[[nodiscard]] std::uint32_t crc32c(const void* data, std::size_t nbytes, std::uint32_t seed = 0,
                                   CacheUse use = CacheUse::kKeep);

// The same value by tables alone: the reference for tests, and the path of CPUs without a CRC
// instruction.
[[nodiscard]] std::uint32_t crc32c_portable(const void* data, std::size_t nbytes,
                                            std::uint32_t seed = 0);

// The path that crc32c() takes here: "vpclmulqdq", "sse4.2", "armv8-crc" or "portable".
[[nodiscard]] const char* crc32c_path();

}  // namespace offload
