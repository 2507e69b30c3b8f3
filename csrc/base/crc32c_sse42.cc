// Compiled with -msse4.2; called only where cpu_features().sse42.
#if defined(__x86_64__)

#include <nmmintrin.h>

#include "base/crc32c_interleaved.h"

namespace offload::crc32c_internal {
namespace {

struct Sse42Step {
  static std::uint32_t word(std::uint32_t crc, std::uint64_t value) {
    return static_cast<std::uint32_t>(_mm_crc32_u64(crc, value));
  }
  static std::uint32_t byte(std::uint32_t crc, std::uint8_t value) {
    return _mm_crc32_u8(crc, value);
  }
};

}  // namespace

std::uint32_t crc32c_sse42(const unsigned char* data, std::size_t nbytes, std::uint32_t crc) {
  return Interleaved<Sse42Step>::run(data, nbytes, crc);
}

}  // namespace offload::crc32c_internal

#endif
