// The bytes of a journal: what is written (JournalBatch) and what is made of them
// (replay_journal). FORMAT.md, "The durable store", has the layout.
//
// Pure: no file is touched here. JournalBatch is not thread-safe; the free functions are.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/align.h"
#include "base/status.h"
#include "sys/durable_file.h"

namespace offload {

inline constexpr std::uint32_t kJournalVersion = 1;
inline constexpr std::size_t kMaxKeyBytes = 4096;
inline constexpr std::uint32_t kMaxStripes = 4096;

// What never changes in the life of a store, and `generation`, which counts its journal's
// compactions from 1 on.
struct JournalHeader {
  Uuid uuid{};
  std::uint64_t block_bytes = 0;  // of a slot; a multiple of kPageBytes, at most 1 GiB
  std::uint32_t stripes = 0;      // data files; 1..kMaxStripes
  std::uint64_t generation = 1;
};

// kInvalid when `key` (1..kMaxKeyBytes bytes, any) or `nbytes` (> 0; below 2^32 blocks and 2^62)
// cannot be journalled.
Status check_journal_object(std::string_view key, std::uint64_t nbytes, std::uint64_t block_bytes);

// The records of one transaction, encoded as they are added: at most 32 bytes a record, and the
// key. Applied in order, all or none. Rules that replay enforces (kCorrupt on reopening):
//  - an id or a key is created only while no live object has it; removing it frees both, within
//    the same batch too;
//  - a block is set only inside a live object, to a slot that was in no live block before the
//    batch and is in none at that point of it. So a slot that the batch frees is not reused by it.
class JournalBatch {
 public:
  // A new object; no block of it is written. Breaking check_journal_object's or a set_block rule
  // that can be seen here makes append() refuse the batch (kInvalid).
  void create(std::uint64_t object, std::uint64_t nbytes, std::string_view key);
  void remove(std::uint64_t object);
  // `block` of `object` is now in `slot` of data file `stripe`; `crc` is the CRC32C of its bytes.
  void set_block(std::uint64_t object, std::uint32_t block, std::uint32_t stripe,
                 std::uint64_t slot, std::uint32_t crc);
  void clear();

  bool empty() const { return records_ == 0; }
  std::uint64_t records() const { return records_; }
  // kInvalid when a record could not stand in the journal of a store of `header`, whatever else
  // the journal holds.
  Status check(const JournalHeader& header) const;
  // Length of the transaction in the file, a multiple of kPageBytes.
  std::uint64_t sealed_bytes() const;
  // The transaction as it stands at byte `offset` of the file. Valid until the batch is changed.
  std::span<const std::byte> seal(const JournalHeader& header, std::uint64_t sequence,
                                  std::uint64_t offset);

 private:
  std::byte* add(std::uint8_t kind, std::size_t nbytes);

  std::vector<std::byte> bytes_;  // room for the transaction's header, the records, padding
  std::size_t end_ = 0;           // of the records; 0 while there are none
  std::uint64_t records_ = 0;
  Status error_;  // of the first record that no journal could hold
  std::uint64_t max_nbytes_ = 0;
  std::uint64_t max_slot_ = 0;
  std::uint32_t max_stripe_ = 0;
};

// The header's page. `snapshot_bytes`: how much of the file, this page included, is written before
// it gets its name.
std::array<std::byte, kPageBytes> encode_journal_header(const JournalHeader& header,
                                                        std::uint64_t snapshot_bytes);
// kInvalid when no store can have it.
Status check_journal_header(const JournalHeader& header);

struct JournalBlock {
  std::uint32_t stripe = 0;
  std::uint64_t slot = 0;
  std::uint32_t crc = 0;
  bool operator==(const JournalBlock&) const = default;
};

struct JournalObject {
  std::string key;
  std::uint64_t nbytes = 0;
  std::map<std::uint32_t, JournalBlock> blocks;  // those ever written
  bool operator==(const JournalObject&) const = default;
};

using JournalObjects = std::map<std::uint64_t, JournalObject>;  // by id; the live ones

struct JournalReplay {
  JournalHeader header;
  JournalObjects objects;
  std::uint64_t snapshot_bytes = 0;  // what was durable before the file got its name
  std::uint64_t valid_bytes = 0;     // header and whole transactions; the rest is a torn tail
  std::uint64_t sequence = 0;        // of the last transaction; 0: none
  std::uint64_t last_offset = 0;     // of the last transaction; 0: none
};

// What a journal's bytes say. A last transaction that is incomplete or damaged is left out, unless
// there is proof that it was committed: it belongs to the snapshot, or another was begun behind
// it. Otherwise kCorrupt, with the byte offset in the message, for the first byte that breaks the
// format; kUnsupported for a later version of it. Memory is bounded by the input's size.
Result<JournalReplay> replay_journal(std::span<const std::byte> bytes);

}  // namespace offload
