// CRC32C by carry-less multiplication of 64-byte registers.
//
// Four registers hold 256 bytes that are congruent, modulo the polynomial, to all that was read:
// each step multiplies them by x^2048 (the distance over which they move on) and adds the next 256
// bytes. V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
// Instruction", Intel 2009. What is left at the end goes through the CRC instruction.
#include <immintrin.h>

#include "base/crc32c_interleaved.h"

namespace offload::crc32c_internal {
namespace {

constexpr std::size_t kRegister = 64;
constexpr std::size_t kStride = 4 * kRegister;
constexpr std::size_t kPrefetch = 4096;

// x^bits modulo the polynomial, bit-reflected and one bit up, as a product of reflected factors
// needs it.
constexpr std::uint64_t fold_constant(unsigned bits) {
  std::uint32_t value = 0x80000000;  // x^0
  for (unsigned i = 0; i < bits; ++i) value = (value >> 1) ^ ((value & 1) != 0 ? 0x82f63b78 : 0);
  return std::uint64_t{value} << 1;
}

constexpr std::uint64_t kFoldLow = fold_constant(8 * kStride + 32);
constexpr std::uint64_t kFoldHigh = fold_constant(8 * kStride - 32);

// As __builtin_prefetch has it: into all levels, or past them ("non-temporal").
constexpr int kAllCaches = 3;
constexpr int kNonTemporal = 0;

template <int kLocality>
std::uint32_t fold(const unsigned char* data, std::size_t nbytes, std::uint32_t crc) {
  if (nbytes < 2 * kStride) return crc32c_sse42(data, nbytes, crc);
  constexpr auto kLow = static_cast<long long>(kFoldLow);
  constexpr auto kHigh = static_cast<long long>(kFoldHigh);
  const __m512i factor = _mm512_set4_epi64(kHigh, kLow, kHigh, kLow);
  __m512i folded[4];
  for (std::size_t k = 0; k < 4; ++k) folded[k] = _mm512_loadu_si512(data + k * kRegister);
  folded[0] =
      _mm512_xor_si512(folded[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(crc))));
  data += kStride;
  nbytes -= kStride;
  for (; nbytes >= kStride; data += kStride, nbytes -= kStride) {
    for (std::size_t k = 0; k < 4; ++k) {
      // The address may lie past the end of the data: it is a hint and is not dereferenced.
      __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(data) +
                                                       kPrefetch + k * kRegister),
                         0, kLocality);
      const __m512i low = _mm512_clmulepi64_epi128(folded[k], factor, 0x00);
      const __m512i high = _mm512_clmulepi64_epi128(folded[k], factor, 0x11);
      const __m512i next = _mm512_loadu_si512(data + k * kRegister);
      folded[k] = _mm512_ternarylogic_epi64(low, high, next, 0x96);  // the sum of all three
    }
  }
  alignas(kRegister) unsigned char rest[kStride];
  for (std::size_t k = 0; k < 4; ++k) _mm512_store_si512(rest + k * kRegister, folded[k]);
  return crc32c_sse42(data, nbytes, crc32c_sse42(rest, kStride, 0));
}

}  // namespace

std::uint32_t crc32c_vpclmul(const unsigned char* data, std::size_t nbytes, std::uint32_t crc) {
  return fold<kAllCaches>(data, nbytes, crc);
}

std::uint32_t crc32c_vpclmul_pass(const unsigned char* data, std::size_t nbytes,
                                  std::uint32_t crc) {
  return fold<kNonTemporal>(data, nbytes, crc);
}

}  // namespace offload::crc32c_internal
