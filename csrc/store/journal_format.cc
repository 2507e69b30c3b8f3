#include "store/journal_format.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "store/journal_layout.h"

namespace offload {
namespace {

namespace layout = journal_layout;
using layout::store;

constexpr std::uint64_t kMaxObjectBytes = std::uint64_t{1} << 62;
constexpr std::uint64_t kMaxBlockBytes = std::uint64_t{1} << 30;
constexpr std::uint64_t kMaxBlocks = std::uint64_t{1} << 32;

Status invalid(const std::string& message) {
  return Status::error(Code::kInvalid, message);
}

}  // namespace

Status check_journal_object(std::string_view key, std::uint64_t nbytes, std::uint64_t block_bytes) {
  if (key.empty() || key.size() > kMaxKeyBytes) {
    return invalid("a key has 1 to " + std::to_string(kMaxKeyBytes) + " bytes, not " +
                   std::to_string(key.size()));
  }
  if (nbytes == 0 || nbytes > kMaxObjectBytes || (nbytes - 1) / block_bytes >= kMaxBlocks) {
    return invalid("an object cannot have " + std::to_string(nbytes) + " bytes in blocks of " +
                   std::to_string(block_bytes));
  }
  return Status::ok();
}

Status check_journal_header(const JournalHeader& header) {
  if (header.block_bytes == 0 || !is_aligned(header.block_bytes, kPageBytes) ||
      header.block_bytes > kMaxBlockBytes) {
    return invalid("blocks of " + std::to_string(header.block_bytes) + " bytes");
  }
  if (header.stripes == 0 || header.stripes > kMaxStripes) {
    return invalid(std::to_string(header.stripes) + " data files");
  }
  if (header.generation == 0) return invalid("generation 0");
  return Status::ok();
}

std::array<std::byte, kPageBytes> encode_journal_header(const JournalHeader& header,
                                                        std::uint64_t snapshot_bytes) {
  namespace head = layout::head;
  std::array<std::byte, kPageBytes> page{};
  store(page.data(), head::kMagic);
  store(page.data() + head::kVersion, kJournalVersion);
  std::memcpy(page.data() + head::kUuid, header.uuid.data(), header.uuid.size());
  store(page.data() + head::kGeneration, header.generation);
  store(page.data() + head::kBlockBytes, header.block_bytes);
  store(page.data() + head::kSnapshotBytes, snapshot_bytes);
  store(page.data() + head::kStripes, header.stripes);
  store(page.data() + head::kCrc, head::crc(page.data()));
  return page;
}

std::byte* JournalBatch::add(std::uint8_t kind, std::size_t nbytes) {
  // First down to what is used, so that what comes is zero whatever seal() left there.
  bytes_.resize(end_);
  end_ = std::max(end_, layout::txn::kHeadBytes) + nbytes;
  bytes_.resize(end_);
  ++records_;
  std::byte* record = bytes_.data() + end_ - nbytes;
  *record = static_cast<std::byte>(kind);
  return record;
}

void JournalBatch::create(std::uint64_t object, std::uint64_t nbytes, std::string_view key) {
  namespace create = layout::create;
  const Status status = check_journal_object(key, nbytes, kMaxBlockBytes);
  if (!status.is_ok()) {
    if (error_.is_ok()) error_ = status;
    return;
  }
  std::byte* record = add(layout::kCreate, create::bytes(key.size()));
  store(record + create::kKeyBytes, static_cast<std::uint16_t>(key.size()));
  store(record + create::kObject, object);
  store(record + create::kNbytes, nbytes);
  std::memcpy(record + create::kKey, key.data(), key.size());
  max_nbytes_ = std::max(max_nbytes_, nbytes);
}

void JournalBatch::remove(std::uint64_t object) {
  store(add(layout::kRemove, layout::remove::kBytes) + layout::remove::kObject, object);
}

void JournalBatch::set_block(std::uint64_t object, std::uint32_t block, std::uint32_t stripe,
                             std::uint64_t slot, std::uint32_t crc) {
  namespace set_block = layout::set_block;
  std::byte* record = add(layout::kSetBlock, set_block::kBytes);
  store(record + set_block::kBlock, block);
  store(record + set_block::kObject, object);
  store(record + set_block::kSlot, slot);
  store(record + set_block::kStripe, stripe);
  store(record + set_block::kCrc, crc);
  max_slot_ = std::max(max_slot_, slot);
  max_stripe_ = std::max(max_stripe_, stripe);
}

void JournalBatch::clear() {
  *this = JournalBatch();
}

Status JournalBatch::check(const JournalHeader& header) const {
  OFFLOAD_RETURN_IF_ERROR(error_);
  if (max_nbytes_ > 0) {
    OFFLOAD_RETURN_IF_ERROR(check_journal_object("any", max_nbytes_, header.block_bytes));
  }
  if (max_stripe_ >= header.stripes) {
    return invalid("data file " + std::to_string(max_stripe_) + " of " +
                   std::to_string(header.stripes));
  }
  if (!layout::slot_fits(max_slot_, header.block_bytes)) {
    return invalid("slot " + std::to_string(max_slot_) + " is beyond any file");
  }
  return Status::ok();
}

std::uint64_t JournalBatch::sealed_bytes() const {
  return align_up(std::max(end_, layout::txn::kHeadBytes), kPageBytes);
}

std::span<const std::byte> JournalBatch::seal(const JournalHeader& header, std::uint64_t sequence,
                                              std::uint64_t offset) {
  namespace txn = layout::txn;
  bytes_.resize(sealed_bytes());
  std::byte* head = bytes_.data();
  store(head, txn::kMagic);
  std::memcpy(head + txn::kUuid, header.uuid.data(), header.uuid.size());
  store(head + txn::kGeneration, header.generation);
  store(head + txn::kSequence, sequence);
  store(head + txn::kOffset, offset);
  store(head + txn::kPayload, std::uint64_t{std::max(end_, txn::kHeadBytes) - txn::kHeadBytes});
  store(head + txn::kRecords, records_);
  store(head + txn::kBodyCrc, crc32c(head + txn::kHeadBytes, bytes_.size() - txn::kHeadBytes));
  store(head + txn::kHeadCrc, txn::head_crc(head));
  return bytes_;
}

}  // namespace offload
