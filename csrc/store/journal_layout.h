// Where each field of a journal stands (FORMAT.md has the tables), little-endian whatever the
// machine. For the files journal*.cc only.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/align.h"
#include "base/crc32c.h"
#include "sys/durable_file.h"

namespace offload::journal_layout {

template <typename T>
T load(const std::byte* from) {
  T value = 0;
  for (std::size_t i = 0; i < sizeof(T); ++i) {
    value = static_cast<T>(value | static_cast<T>(static_cast<T>(from[i]) << (8 * i)));
  }
  return value;
}

template <typename T>
void store(std::byte* to, T value) {
  for (std::size_t i = 0; i < sizeof(T); ++i) to[i] = static_cast<std::byte>(value >> (8 * i));
}

inline bool all_zero(std::span<const std::byte> bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == std::byte{0}; });
}

// The file's first page.
namespace head {
inline constexpr std::uint64_t kMagic = 0x6c6e6a646c66666fULL;  // "offldjnl"
inline constexpr std::size_t kVersion = 8;                      // u32
inline constexpr std::size_t kCrc = 12;  // u32, of the page without this field
inline constexpr std::size_t kUuid = 16;
inline constexpr std::size_t kGeneration = 32;     // u64
inline constexpr std::size_t kBlockBytes = 40;     // u64
inline constexpr std::size_t kSnapshotBytes = 48;  // u64
inline constexpr std::size_t kStripes = 56;        // u32
inline constexpr std::size_t kUnused = 60;         // zeros to the page's end

inline std::uint32_t crc(const std::byte* page) {
  return crc32c(page + kUuid, kPageBytes - kUuid, crc32c(page, kCrc));
}
}  // namespace head

// The header of a transaction, which starts on a page of its own.
namespace txn {
inline constexpr std::uint64_t kMagic = 0x6e7874646c66666fULL;  // "offldtxn"
inline constexpr std::size_t kHeadCrc = 8;                      // u32, of the header without it
inline constexpr std::size_t kBodyCrc = 12;  // u32, of the records and the padding
inline constexpr std::size_t kUuid = 16;
inline constexpr std::size_t kGeneration = 32;  // u64
inline constexpr std::size_t kSequence = 40;    // u64
inline constexpr std::size_t kOffset = 48;      // u64, of this header in the file
inline constexpr std::size_t kPayload = 56;     // u64, bytes of records
inline constexpr std::size_t kRecords = 64;     // u64
inline constexpr std::size_t kHeadBytes = 72;

inline std::uint32_t head_crc(const std::byte* head) {
  return crc32c(head + kBodyCrc, kHeadBytes - kBodyCrc, crc32c(head, kHeadCrc));
}
}  // namespace txn

// Records, each a multiple of 8 bytes that starts with its kind.
inline constexpr std::uint8_t kCreate = 1;
inline constexpr std::uint8_t kRemove = 2;
inline constexpr std::uint8_t kSetBlock = 3;

namespace create {
inline constexpr std::size_t kKeyBytes = 2;  // u16
inline constexpr std::size_t kUnused = 4;    // u32
inline constexpr std::size_t kObject = 8;    // u64
inline constexpr std::size_t kNbytes = 16;   // u64
inline constexpr std::size_t kKey = 24;      // then zeros to a multiple of 8
constexpr std::size_t bytes(std::size_t key_bytes) {
  return align_up(kKey + key_bytes, 8);
}
}  // namespace create

namespace remove {
inline constexpr std::size_t kUnused = 1;
inline constexpr std::size_t kObject = 8;  // u64
inline constexpr std::size_t kBytes = 16;
}  // namespace remove

namespace set_block {
inline constexpr std::size_t kUnused = 1;
inline constexpr std::size_t kBlock = 4;    // u32
inline constexpr std::size_t kObject = 8;   // u64
inline constexpr std::size_t kSlot = 16;    // u64
inline constexpr std::size_t kStripe = 24;  // u32
inline constexpr std::size_t kCrc = 28;     // u32
inline constexpr std::size_t kBytes = 32;
}  // namespace set_block

// A slot must end within what a file offset can say.
inline bool slot_fits(std::uint64_t slot, std::uint64_t block_bytes) {
  constexpr std::uint64_t kMaxOffset = ~std::uint64_t{0} >> 1;
  return slot < kMaxOffset / block_bytes;
}

}  // namespace offload::journal_layout
