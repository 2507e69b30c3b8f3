// Compiled with -march=armv8-a+crc; called only where cpu_features().arm_crc32.
#if defined(__aarch64__)

#include <arm_acle.h>

#include "base/crc32c_interleaved.h"

namespace offload::crc32c_internal {
namespace {

struct ArmStep {
  static std::uint32_t word(std::uint32_t crc, std::uint64_t value) {
    return __crc32cd(crc, value);
  }
  static std::uint32_t byte(std::uint32_t crc, std::uint8_t value) { return __crc32cb(crc, value); }
};

}  // namespace

std::uint32_t crc32c_armcrc(const unsigned char* data, std::size_t nbytes, std::uint32_t crc) {
  return Interleaved<ArmStep>::run(data, nbytes, crc);
}

}  // namespace offload::crc32c_internal

#endif
