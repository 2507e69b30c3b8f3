#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "store/journal_format.h"
#include "store/journal_layout.h"

namespace offload {
namespace {

namespace layout = journal_layout;
using layout::all_zero;
using layout::load;
using Bytes = std::span<const std::byte>;

Status corrupt(std::uint64_t offset, const std::string& why) {
  return Status::error(Code::kCorrupt,
                       "damaged journal, at byte " + std::to_string(offset) + ": " + why);
}

Uuid load_uuid(const std::byte* from) {
  Uuid uuid{};
  for (std::size_t i = 0; i < uuid.size(); ++i) uuid[i] = static_cast<std::uint8_t>(from[i]);
  return uuid;
}

// The live objects, and what tells whether the next record may stand.
class State {
 public:
  explicit State(const JournalHeader& header) : header_(header) {}

  // The records of one transaction, of which the first is at byte `at` of the file.
  Status apply(Bytes payload, std::uint64_t records, std::uint64_t at) {
    ++transaction_;
    std::uint64_t count = 0;
    while (!payload.empty()) {
      Result<std::size_t> used = apply_record(payload, at);
      if (!used.is_ok()) return used.status();
      payload = payload.subspan(used.value());
      at += used.value();
      ++count;
    }
    if (count != records) {
      return corrupt(at, std::to_string(count) + " records, not " + std::to_string(records));
    }
    for (const std::uint64_t slot : freed_) slots_.erase(slot);
    freed_.clear();
    return Status::ok();
  }

  JournalObjects take_objects() { return std::move(objects_); }

 private:
  static constexpr std::uint64_t kFreed = 0;

  // Bytes of the first record of `rest`.
  Result<std::size_t> apply_record(Bytes rest, std::uint64_t at) {
    switch (static_cast<std::uint8_t>(rest[0])) {
      case layout::kCreate:
        return apply_create(rest, at);
      case layout::kRemove:
        return apply_remove(rest, at);
      case layout::kSetBlock:
        return apply_set_block(rest, at);
      default:
        return corrupt(at, "a record of unknown kind");
    }
  }

  Result<std::size_t> apply_create(Bytes rest, std::uint64_t at) {
    namespace create = layout::create;
    if (rest.size() < create::kKey) return corrupt(at, "a record is cut off");
    const std::size_t key_bytes = load<std::uint16_t>(rest.data() + create::kKeyBytes);
    const std::size_t used = create::bytes(key_bytes);
    if (rest.size() < used) return corrupt(at, "a key is cut off");
    if (!all_zero(rest.subspan(1, create::kKeyBytes - 1)) ||
        !all_zero(rest.subspan(create::kUnused, create::kObject - create::kUnused)) ||
        !all_zero(rest.subspan(create::kKey + key_bytes, used - create::kKey - key_bytes))) {
      return corrupt(at, "unused bytes are not zero");
    }
    JournalObject object;
    object.nbytes = load<std::uint64_t>(rest.data() + create::kNbytes);
    object.key.assign(reinterpret_cast<const char*>(rest.data()) + create::kKey, key_bytes);
    const Status valid = check_journal_object(object.key, object.nbytes, header_.block_bytes);
    if (!valid.is_ok()) return corrupt(at, valid.to_string());

    const auto id = load<std::uint64_t>(rest.data() + create::kObject);
    if (keys_.contains(object.key)) return corrupt(at, "a key that another object has");
    const auto [place, is_new] = objects_.try_emplace(id, std::move(object));
    if (!is_new) return corrupt(at, "object " + std::to_string(id) + " is created twice");
    keys_.insert(place->second.key);
    return used;
  }

  Result<std::size_t> apply_remove(Bytes rest, std::uint64_t at) {
    namespace remove = layout::remove;
    if (rest.size() < remove::kBytes) return corrupt(at, "a record is cut off");
    if (!all_zero(rest.subspan(remove::kUnused, remove::kObject - remove::kUnused))) {
      return corrupt(at, "unused bytes are not zero");
    }
    const auto id = load<std::uint64_t>(rest.data() + remove::kObject);
    const auto found = objects_.find(id);
    if (found == objects_.end()) {
      return corrupt(at, "object " + std::to_string(id) + " is removed but not there");
    }
    for (const auto& [index, block] : found->second.blocks) free_slot(block);
    keys_.erase(found->second.key);
    objects_.erase(found);
    return remove::kBytes;
  }

  Result<std::size_t> apply_set_block(Bytes rest, std::uint64_t at) {
    namespace set_block = layout::set_block;
    if (rest.size() < set_block::kBytes) return corrupt(at, "a record is cut off");
    if (!all_zero(rest.subspan(set_block::kUnused, set_block::kBlock - set_block::kUnused))) {
      return corrupt(at, "unused bytes are not zero");
    }
    const auto id = load<std::uint64_t>(rest.data() + set_block::kObject);
    const auto index = load<std::uint32_t>(rest.data() + set_block::kBlock);
    JournalBlock block;
    block.slot = load<std::uint64_t>(rest.data() + set_block::kSlot);
    block.stripe = load<std::uint32_t>(rest.data() + set_block::kStripe);
    block.crc = load<std::uint32_t>(rest.data() + set_block::kCrc);

    const auto found = objects_.find(id);
    if (found == objects_.end()) {
      return corrupt(at, "a block of object " + std::to_string(id) + ", which is not there");
    }
    JournalObject& object = found->second;
    if (index > (object.nbytes - 1) / header_.block_bytes) {
      return corrupt(at, "block " + std::to_string(index) + " is beyond the object");
    }
    if (block.stripe >= header_.stripes) {
      return corrupt(at, "data file " + std::to_string(block.stripe) + " of " +
                             std::to_string(header_.stripes));
    }
    if (!layout::slot_fits(block.slot, header_.block_bytes)) {
      return corrupt(at, "slot " + std::to_string(block.slot) + " is beyond any file");
    }
    if (!slots_.try_emplace(slot_id(block), transaction_).second) {
      return corrupt(at, "slot " + std::to_string(block.slot) + " of data file " +
                             std::to_string(block.stripe) + " holds a version already");
    }
    const auto [place, is_new] = object.blocks.try_emplace(index, block);
    if (!is_new) free_slot(std::exchange(place->second, block));
    return set_block::kBytes;
  }

  // Blocks are of at least a page, so a slot that fits has 51 bits; kMaxStripes is 2^12.
  static std::uint64_t slot_id(const JournalBlock& block) {
    return std::uint64_t{block.stripe} << 51 | block.slot;
  }

  // A slot that was live before this transaction is kept from being taken again by it.
  void free_slot(const JournalBlock& block) {
    const auto found = slots_.find(slot_id(block));
    if (found->second == transaction_) {
      slots_.erase(found);
    } else {
      found->second = kFreed;
      freed_.push_back(slot_id(block));
    }
  }

  const JournalHeader header_;
  JournalObjects objects_;
  std::unordered_set<std::string_view> keys_;               // in objects_, whose nodes stay
  std::unordered_map<std::uint64_t, std::uint64_t> slots_;  // -> transaction that set it
  std::vector<std::uint64_t> freed_;                        // by the current transaction
  std::uint64_t transaction_ = 0;
};

Result<JournalReplay> parse_header(Bytes bytes) {
  namespace head = layout::head;
  if (bytes.size() < kPageBytes) {
    return corrupt(bytes.size(), "it ends before its header does");
  }
  const std::byte* page = bytes.data();
  if (load<std::uint64_t>(page) != head::kMagic) return corrupt(0, "this is not a journal");
  if (load<std::uint32_t>(page + head::kCrc) != head::crc(page)) {
    return corrupt(0, "the header's checksum is wrong");
  }
  const auto version = load<std::uint32_t>(page + head::kVersion);
  if (version != kJournalVersion) {
    return Status::error(Code::kUnsupported, "a journal of format version " +
                                                 std::to_string(version) + "; this program knows " +
                                                 std::to_string(kJournalVersion));
  }
  JournalReplay replay;
  replay.header.uuid = load_uuid(page + head::kUuid);
  replay.header.generation = load<std::uint64_t>(page + head::kGeneration);
  replay.header.block_bytes = load<std::uint64_t>(page + head::kBlockBytes);
  replay.header.stripes = load<std::uint32_t>(page + head::kStripes);
  replay.snapshot_bytes = load<std::uint64_t>(page + head::kSnapshotBytes);
  const Status valid = check_journal_header(replay.header);
  if (!valid.is_ok()) return corrupt(0, valid.to_string());
  if (!all_zero(bytes.subspan(head::kUnused, kPageBytes - head::kUnused))) {
    return corrupt(0, "unused bytes are not zero");
  }
  if (replay.snapshot_bytes < kPageBytes || !is_aligned(replay.snapshot_bytes, kPageBytes)) {
    return corrupt(0, "a snapshot of " + std::to_string(replay.snapshot_bytes) + " bytes");
  }
  if (replay.snapshot_bytes > bytes.size()) {
    return corrupt(bytes.size(), "it ends before its snapshot does");
  }
  return replay;
}

struct TransactionHead {
  std::uint64_t sequence = 0;
  std::uint64_t payload = 0;
  std::uint64_t records = 0;
  std::uint32_t body_crc = 0;
};

// The header of a transaction of this journal that was written to this offset.
std::optional<TransactionHead> parse_head(Bytes bytes, const JournalHeader& header,
                                          std::uint64_t offset) {
  namespace txn = layout::txn;
  if (bytes.size() - offset < txn::kHeadBytes) return std::nullopt;
  const std::byte* at = bytes.data() + offset;
  if (load<std::uint64_t>(at) != txn::kMagic ||
      load<std::uint32_t>(at + txn::kHeadCrc) != txn::head_crc(at) ||
      load_uuid(at + txn::kUuid) != header.uuid ||
      load<std::uint64_t>(at + txn::kGeneration) != header.generation ||
      load<std::uint64_t>(at + txn::kOffset) != offset) {
    return std::nullopt;
  }
  return TransactionHead{.sequence = load<std::uint64_t>(at + txn::kSequence),
                         .payload = load<std::uint64_t>(at + txn::kPayload),
                         .records = load<std::uint64_t>(at + txn::kRecords),
                         .body_crc = load<std::uint32_t>(at + txn::kBodyCrc)};
}

// The padded length of the transaction, or nothing when part of it is missing or damaged.
std::optional<std::uint64_t> whole_bytes(Bytes bytes, std::uint64_t offset,
                                         const TransactionHead& head) {
  namespace txn = layout::txn;
  const std::uint64_t room = bytes.size() - offset;
  if (head.payload > room - txn::kHeadBytes) return std::nullopt;
  const std::uint64_t total = align_up(txn::kHeadBytes + head.payload, kPageBytes);
  if (total > room) return std::nullopt;
  const std::uint32_t crc =
      crc32c(bytes.data() + offset + txn::kHeadBytes, total - txn::kHeadBytes);
  if (crc != head.body_crc) return std::nullopt;
  return total;
}

// What follows the last whole transaction is the torn remainder of one commit, unless a header
// behind its first page shows that the journal went on: the damaged bytes were committed then.
Status check_tail(Bytes bytes, const JournalReplay& replay) {
  const std::uint64_t end = replay.valid_bytes;
  if (end < replay.snapshot_bytes) return corrupt(end, "the snapshot is damaged");
  for (std::uint64_t at = end + kPageBytes; at < bytes.size(); at += kPageBytes) {
    const auto head = parse_head(bytes, replay.header, at);
    if (head && head->sequence > replay.sequence) {
      return corrupt(end, "transaction " + std::to_string(replay.sequence + 1) +
                              " is damaged, but transaction " + std::to_string(head->sequence) +
                              " was written behind it, at byte " + std::to_string(at));
    }
  }
  return Status::ok();
}

}  // namespace

Result<JournalReplay> replay_journal(Bytes bytes) {
  namespace txn = layout::txn;
  Result<JournalReplay> parsed = parse_header(bytes);
  if (!parsed.is_ok()) return parsed.status();
  JournalReplay replay = parsed.take();
  replay.valid_bytes = kPageBytes;

  State state(replay.header);
  while (replay.valid_bytes < bytes.size()) {
    const std::uint64_t offset = replay.valid_bytes;
    const auto head = parse_head(bytes, replay.header, offset);
    if (!head) break;
    const auto total = whole_bytes(bytes, offset, *head);
    if (!total) break;
    if (head->sequence != replay.sequence + 1) {
      return corrupt(offset, "transaction " + std::to_string(head->sequence) + " follows " +
                                 std::to_string(replay.sequence));
    }
    if (head->records == 0) return corrupt(offset, "a transaction without records");
    const Bytes body = bytes.subspan(offset + txn::kHeadBytes, *total - txn::kHeadBytes);
    if (!all_zero(body.subspan(head->payload))) return corrupt(offset, "padding is not zero");
    OFFLOAD_RETURN_IF_ERROR(
        state.apply(body.first(head->payload), head->records, offset + txn::kHeadBytes));
    replay.sequence = head->sequence;
    replay.last_offset = offset;
    replay.valid_bytes = offset + *total;
    if (offset < replay.snapshot_bytes && replay.valid_bytes != replay.snapshot_bytes) {
      return corrupt(offset, "the snapshot is not one transaction");
    }
  }
  OFFLOAD_RETURN_IF_ERROR(check_tail(bytes, replay));
  replay.objects = state.take_objects();
  return replay;
}

}  // namespace offload
