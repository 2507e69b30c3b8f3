#include "base/crc32c.h"

#include <bit>
#include <cstring>

#include "base/cpu_features.h"
#include "base/crc32c_interleaved.h"
#include "base/crc32c_tables.h"

namespace offload {
namespace {

static_assert(std::endian::native == std::endian::little, "words are read in little-endian order");

using RegisterFn = std::uint32_t (*)(const unsigned char*, std::size_t, std::uint32_t);

std::uint32_t portable_register(const unsigned char* data, std::size_t nbytes, std::uint32_t crc) {
  const auto& table = crc32c_internal::kSlicing.entry;
  for (; nbytes >= 8; nbytes -= 8, data += 8) {
    std::uint64_t word;
    std::memcpy(&word, data, sizeof(word));
    word ^= crc;
    crc = 0;
    for (int k = 0; k < 8; ++k) crc ^= table[7 - k][(word >> (8 * k)) & 0xff];
  }
  for (; nbytes > 0; --nbytes, ++data) crc = (crc >> 8) ^ table[0][(crc ^ *data) & 0xff];
  return crc;
}

struct Path {
  RegisterFn keep;  // by CacheUse
  RegisterFn pass;
  const char* name;
};

Path choose_path() {
#if defined(__x86_64__)
  if (cpu_features().vpclmul && cpu_features().sse42 && cpu_features().pclmul) {
    return {crc32c_internal::crc32c_vpclmul, crc32c_internal::crc32c_vpclmul_pass, "vpclmulqdq"};
  }
  if (cpu_features().sse42 && cpu_features().pclmul) {  // both: the file is compiled for both
    return {crc32c_internal::crc32c_sse42, crc32c_internal::crc32c_sse42, "sse4.2"};
  }
#elif defined(__aarch64__)
  if (cpu_features().arm_crc32)
    return {crc32c_internal::crc32c_armcrc, crc32c_internal::crc32c_armcrc, "armv8-crc"};
#endif
  return {portable_register, portable_register, "portable"};
}

const Path& path() {
  static const Path chosen = choose_path();
  return chosen;
}

}  // namespace

std::uint32_t crc32c(const void* data, std::size_t nbytes, std::uint32_t seed, CacheUse use) {
  const RegisterFn run = use == CacheUse::kPass ? path().pass : path().keep;
  return ~run(static_cast<const unsigned char*>(data), nbytes, ~seed);
}

std::uint32_t crc32c_portable(const void* data, std::size_t nbytes, std::uint32_t seed) {
  return ~portable_register(static_cast<const unsigned char*>(data), nbytes, ~seed);
}

const char* crc32c_path() {
  return path().name;
}

}  // namespace offload
