// libFuzzer target: replay_journal on any bytes. Whatever it accepts must be a state that a store
// can have, and must stay the same when it is written out and read again.
//
// The first byte of an input says what the rest is: odd, the bytes of a file; even, a compact form
// that is expanded to a file with right magics, checksums and padding, so that mutations reach the
// records instead of failing a checksum:
//   generation, block_bytes, snapshot_bytes, stripes   as in the header (28 bytes)
//   per transaction: control (1 byte, bits below), payload bytes (2, little-endian), payload
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "store/journal_format.h"
#include "store/journal_layout.h"

namespace offload {
namespace {

namespace layout = journal_layout;
using Bytes = std::span<const std::byte>;

// Bits of a transaction's control byte.
constexpr unsigned kWrongBody = 1;      // a payload checksum that does not match
constexpr unsigned kWrongHead = 2;      // likewise of the header
constexpr unsigned kWrongSequence = 4;  // skips a number
constexpr unsigned kGap = 8;            // an empty page in front
constexpr unsigned kCut = 16;           // the file ends in the middle
constexpr unsigned kMoreRecords = 32;   // counts one more record than there is
constexpr unsigned kDirtyPadding = 64;  // under a right checksum

void must(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "broken invariant: %s\n", what);
  std::abort();
}

// Takes bytes off the front of an input; zeros once it is used up.
class Reader {
 public:
  explicit Reader(Bytes bytes) : bytes_(bytes) {}
  bool empty() const { return bytes_.empty(); }
  Bytes take(std::size_t nbytes) {
    const Bytes taken = bytes_.first(std::min(nbytes, bytes_.size()));
    bytes_ = bytes_.subspan(taken.size());
    return taken;
  }
  std::uint64_t number(std::size_t nbytes) {
    std::byte buffer[8] = {};
    const Bytes taken = take(nbytes);
    std::copy(taken.begin(), taken.end(), buffer);
    return layout::load<std::uint64_t>(buffer);
  }

 private:
  Bytes bytes_;
};

// How many records the payload claims to be, by their kinds and lengths.
std::uint64_t count_records(Bytes payload) {
  std::uint64_t count = 0;
  while (!payload.empty()) {
    std::size_t nbytes = layout::remove::kBytes;
    if (payload[0] == std::byte{layout::kSetBlock}) nbytes = layout::set_block::kBytes;
    if (payload[0] == std::byte{layout::kCreate} && payload.size() >= layout::create::kKey) {
      nbytes = layout::create::bytes(
          layout::load<std::uint16_t>(payload.data() + layout::create::kKeyBytes));
    }
    payload = payload.subspan(std::min(nbytes, payload.size()));
    ++count;
  }
  return count;
}

void add_transaction(std::vector<std::byte>& file, Reader& input, std::uint64_t& sequence) {
  namespace txn = layout::txn;
  const auto control = static_cast<unsigned>(input.number(1));
  const Bytes payload = input.take(input.number(2));
  if ((control & kGap) != 0) file.resize(file.size() + kPageBytes);
  const std::size_t offset = file.size();
  file.resize(align_up(offset + txn::kHeadBytes + payload.size(), kPageBytes));
  std::byte* head = file.data() + offset;
  sequence += (control & kWrongSequence) != 0 ? 2 : 1;
  layout::store(head, txn::kMagic);
  std::memcpy(head + txn::kUuid, file.data() + layout::head::kUuid, sizeof(Uuid));
  std::memcpy(head + txn::kGeneration, file.data() + layout::head::kGeneration, 8);
  layout::store(head + txn::kSequence, sequence);
  layout::store(head + txn::kOffset, std::uint64_t{offset});
  layout::store(head + txn::kPayload, std::uint64_t{payload.size()});
  layout::store(head + txn::kRecords,
                count_records(payload) + ((control & kMoreRecords) != 0 ? 1 : 0));
  std::copy(payload.begin(), payload.end(), head + txn::kHeadBytes);
  if ((control & kDirtyPadding) != 0) file.back() |= std::byte{1};
  const std::uint32_t body = crc32c(head + txn::kHeadBytes, file.size() - offset - txn::kHeadBytes);
  layout::store(head + txn::kBodyCrc, body ^ ((control & kWrongBody) != 0 ? 1U : 0U));
  layout::store(head + txn::kHeadCrc,
                txn::head_crc(head) ^ ((control & kWrongHead) != 0 ? 1U : 0U));
  if ((control & kCut) != 0) file.resize(offset + (file.size() - offset) / 2);
}

std::vector<std::byte> expand(Bytes compact) {
  namespace head = layout::head;
  Reader input(compact);
  std::vector<std::byte> file(kPageBytes);
  layout::store(file.data(), head::kMagic);
  layout::store(file.data() + head::kVersion, kJournalVersion);
  layout::store(file.data() + head::kGeneration, input.number(8));
  layout::store(file.data() + head::kBlockBytes, input.number(8));
  layout::store(file.data() + head::kSnapshotBytes, input.number(8));
  layout::store(file.data() + head::kStripes, static_cast<std::uint32_t>(input.number(4)));
  layout::store(file.data() + head::kCrc, head::crc(file.data()));
  std::uint64_t sequence = 0;
  while (!input.empty()) add_transaction(file, input, sequence);
  return file;
}

void check_objects(const JournalReplay& replay, std::size_t file_bytes) {
  std::set<std::string> keys;
  std::set<std::pair<std::uint32_t, std::uint64_t>> slots;
  const JournalHeader& header = replay.header;
  for (const auto& [id, object] : replay.objects) {
    must(check_journal_object(object.key, object.nbytes, header.block_bytes).is_ok(),
         "an object that create() refuses");
    must(keys.insert(object.key).second, "two objects have one key");
    for (const auto& [index, block] : object.blocks) {
      must(index * header.block_bytes < object.nbytes, "a block is beyond its object");
      must(block.stripe < header.stripes, "a block is in no data file");
      must(block.slot <= (~std::uint64_t{0} >> 1) / header.block_bytes - 1,
           "a slot is beyond any file");
      must(slots.insert({block.stripe, block.slot}).second, "two blocks share a slot");
    }
  }
  must(replay.objects.size() * 32 + slots.size() * 32 <= file_bytes,
       "more objects and blocks than the file has room for");
}

// Written out as a snapshot, the state reads back.
void check_round_trip(const JournalReplay& replay) {
  JournalBatch batch;
  for (const auto& [id, object] : replay.objects) {
    batch.create(id, object.nbytes, object.key);
    for (const auto& [index, block] : object.blocks) {
      batch.set_block(id, index, block.stripe, block.slot, block.crc);
    }
  }
  must(batch.check(replay.header).is_ok(), "a state that append() refuses");
  if (batch.empty()) return;
  const auto page = encode_journal_header(replay.header, kPageBytes + batch.sealed_bytes());
  std::vector<std::byte> file(page.begin(), page.end());
  const auto sealed = batch.seal(replay.header, 1, kPageBytes);
  file.insert(file.end(), sealed.begin(), sealed.end());
  const Result<JournalReplay> again = replay_journal(file);
  must(again.is_ok(), "the state's own snapshot is refused");
  must(again.value().objects == replay.objects, "the state's own snapshot differs");
}

void check(Bytes file) {
  const Result<JournalReplay> result = replay_journal(file);
  if (!result.is_ok()) {
    const Code code = result.status().code();
    must(code == Code::kCorrupt || code == Code::kUnsupported, "an error of another kind");
    must(result.status().path().empty(), "a path out of nowhere");
    return;
  }
  const JournalReplay& replay = result.value();
  must(check_journal_header(replay.header).is_ok(), "a header that create() refuses");
  must(is_aligned(replay.valid_bytes, kPageBytes) && replay.valid_bytes <= file.size() &&
           replay.valid_bytes >= replay.snapshot_bytes,
       "valid bytes");
  must((replay.sequence == 0) == (replay.last_offset == 0) &&
           replay.last_offset < replay.valid_bytes,
       "the last transaction's place");
  check_objects(replay, file.size());
  check_round_trip(replay);

  // What open() leaves of the file, cut to the valid bytes, is the same journal.
  const Result<JournalReplay> cut = replay_journal(file.first(replay.valid_bytes));
  must(cut.is_ok() && cut.value().objects == replay.objects &&
           cut.value().valid_bytes == replay.valid_bytes &&
           cut.value().sequence == replay.sequence && cut.value().last_offset == replay.last_offset,
       "the journal without its torn tail differs");
}

}  // namespace
}  // namespace offload

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const std::span<const std::byte> rest(reinterpret_cast<const std::byte*>(data) + 1, size - 1);
  if ((data[0] & 1) != 0) {
    offload::check(rest);
  } else {
    offload::check(offload::expand(rest));
  }
  return 0;
}
