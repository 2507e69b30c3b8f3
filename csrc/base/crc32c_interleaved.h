// The body shared by the CPUs that have a CRC32C instruction.
//
// The instruction takes one step per cycle but its result is late by about three, so three
// registers run side by side over three neighbouring blocks and are then joined: the register of
// the concatenation AB is shift(A) ^ B, where shift appends |B| zero bytes. Pure: thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/crc32c_tables.h"

namespace offload::crc32c_internal {

// The long block makes joining negligible on extents; the short one serves what is left of them.
inline constexpr std::size_t kLongBlock = 4096;
inline constexpr std::size_t kShortBlock = 256;
inline constexpr std::size_t kCacheLine = 64;
inline constexpr ShiftTable kLongShift = make_shift_table(kLongBlock);
inline constexpr ShiftTable kShortShift = make_shift_table(kShortBlock);

// Registers in, registers out: no inversion. Defined only for their own architecture.
std::uint32_t crc32c_sse42(const unsigned char* data, std::size_t nbytes, std::uint32_t crc);
std::uint32_t crc32c_vpclmul(const unsigned char* data, std::size_t nbytes, std::uint32_t crc);
std::uint32_t crc32c_vpclmul_pass(const unsigned char* data, std::size_t nbytes, std::uint32_t crc);
std::uint32_t crc32c_armcrc(const unsigned char* data, std::size_t nbytes, std::uint32_t crc);

// `Step` has `static std::uint32_t word(std::uint32_t crc, std::uint64_t)` and `byte(crc, uint8)`.
// It must have internal linkage, so that code for one instruction set is not merged with another's.
template <typename Step>
struct Interleaved {
  static std::uint64_t load(const unsigned char* data) {
    std::uint64_t word;
    std::memcpy(&word, data, sizeof(word));
    return word;
  }

  // The address may lie past the end of the data: it is a hint and is not dereferenced.
  static void prefetch(const unsigned char* from, std::size_t ahead) {
    __builtin_prefetch(
        reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(from) + ahead));
  }

  static std::uint32_t shift(const ShiftTable& table, std::uint32_t crc) {
    return table.entry[0][crc & 0xff] ^ table.entry[1][(crc >> 8) & 0xff] ^
           table.entry[2][(crc >> 16) & 0xff] ^ table.entry[3][crc >> 24];
  }

  template <std::size_t kBlock>
  static std::uint32_t three_blocks(const ShiftTable& table, const unsigned char* data,
                                    std::uint32_t crc0) {
    std::uint32_t crc1 = 0;
    std::uint32_t crc2 = 0;
    // Three streams that each stop after a block are more than hardware prefetchers follow: asking
    // for the next three blocks doubles the rate from memory.
    for (std::size_t line = 0; line < kBlock; line += kCacheLine) {
      prefetch(data + line, 3 * kBlock);
      prefetch(data + line, 4 * kBlock);
      prefetch(data + line, 5 * kBlock);
      for (std::size_t i = line; i < line + kCacheLine; i += 8) {
        crc0 = Step::word(crc0, load(data + i));
        crc1 = Step::word(crc1, load(data + kBlock + i));
        crc2 = Step::word(crc2, load(data + 2 * kBlock + i));
      }
    }
    return shift(table, shift(table, crc0) ^ crc1) ^ crc2;
  }

  static std::uint32_t run(const unsigned char* data, std::size_t nbytes, std::uint32_t crc) {
    for (; nbytes >= 3 * kLongBlock; nbytes -= 3 * kLongBlock, data += 3 * kLongBlock) {
      crc = three_blocks<kLongBlock>(kLongShift, data, crc);
    }
    for (; nbytes >= 3 * kShortBlock; nbytes -= 3 * kShortBlock, data += 3 * kShortBlock) {
      crc = three_blocks<kShortBlock>(kShortShift, data, crc);
    }
    for (; nbytes >= 8; nbytes -= 8, data += 8) crc = Step::word(crc, load(data));
    for (; nbytes > 0; --nbytes, ++data) crc = Step::byte(crc, *data);
    return crc;
  }
};

}  // namespace offload::crc32c_internal
