// replay_journal on bytes whose checksums are right and whose meaning is not.
#include <functional>
#include <string>
#include <vector>

#include "journal_testing.h"

namespace offload {
namespace {

namespace layout = journal_layout;

// A journal whose last transaction is what `fill` adds behind: object 1 "one" of 3 blocks, the
// first one in slot 5 of data file 0; object 2 "two", nothing written.
JournalImage with_batch(const std::function<void(JournalBatch&)>& fill) {
  JournalImage image;
  JournalBatch first;
  first.create(1, 3 * kPageBytes, "one");
  first.set_block(1, 0, 0, 5, 0xAB);
  first.create(2, 1, "two");
  image.add(first, {});
  JournalBatch second;
  fill(second);
  image.add(second, {});
  return image;
}

// with_batch's image, with the bytes of its last record changed under right checksums.
JournalImage with_record(const std::function<void(JournalBatch&)>& fill,
                         const std::function<void(std::byte*)>& tamper) {
  JournalImage image = with_batch(fill);
  tamper(image.bytes.data() + image.ends[1] + layout::txn::kHeadBytes);
  image.reseal(image.ends[1], image.ends[2] - image.ends[1]);
  return image;
}

// The header's page with a field changed under a right checksum.
JournalImage with_header(const std::function<void(std::byte*)>& tamper) {
  JournalImage image = random_image(1, 2, true);
  tamper(image.bytes.data());
  layout::store(image.bytes.data() + layout::head::kCrc, layout::head::crc(image.bytes.data()));
  return image;
}

}  // namespace

TEST_CASE("replay refuses records that contradict the state") {
  check_rejected(with_batch([](JournalBatch& b) { b.create(1, 1, "new"); }), "created twice");
  check_rejected(with_batch([](JournalBatch& b) { b.create(3, 1, "two"); }), "another object has");
  check_rejected(with_batch([](JournalBatch& b) { b.remove(3); }), "removed but not there");
  check_rejected(with_batch([](JournalBatch& b) { b.set_block(3, 0, 0, 9, 0); }), "not there");
  check_rejected(with_batch([](JournalBatch& b) { b.set_block(1, 3, 0, 9, 0); }),
                 "beyond the object");
  check_rejected(with_batch([](JournalBatch& b) { b.set_block(2, 1, 0, 9, 0); }),
                 "beyond the object");
  check_rejected(with_batch([](JournalBatch& b) { b.set_block(1, 1, 3, 9, 0); }),
                 "data file 3 of 3");
  check_rejected(with_batch([](JournalBatch& b) { b.set_block(1, 1, 0, 5, 0); }),
                 "holds a version");
  check_rejected(with_batch([](JournalBatch& b) { b.set_block(1, 0, 0, 5, 0); }),
                 "holds a version");
  check_rejected(with_batch([](JournalBatch& b) {
                   b.set_block(1, 1, 1, 7, 0);
                   b.set_block(1, 2, 1, 7, 0);
                 }),
                 "holds a version");
  const std::uint64_t beyond = (~std::uint64_t{0} >> 1) / kPageBytes;
  check_rejected(with_batch([&](JournalBatch& b) { b.set_block(1, 1, 0, beyond, 0); }),
                 "beyond any file");
  CHECK(replay_journal(
            with_batch([&](JournalBatch& b) { b.set_block(1, 1, 0, beyond - 1, 0); }).bytes)
            .is_ok());
}

TEST_CASE("a slot that a transaction frees is not free before the next one") {
  // The data of slot 5's new owner was on disk before the commit: it would have overwritten the
  // version that a crash before the commit returns to.
  check_rejected(with_batch([](JournalBatch& b) {
                   b.set_block(1, 0, 0, 6, 0);
                   b.set_block(1, 1, 0, 5, 0);
                 }),
                 "holds a version");
  check_rejected(with_batch([](JournalBatch& b) {
                   b.remove(1);
                   b.set_block(2, 0, 0, 5, 0);
                 }),
                 "holds a version");
  // One that it took and gave up itself is.
  JournalImage image = with_batch([](JournalBatch& b) {
    b.set_block(1, 1, 0, 6, 1);
    b.set_block(1, 1, 0, 7, 2);
    b.set_block(2, 0, 0, 6, 3);
    b.set_block(1, 0, 0, 8, 4);
  });
  JournalBatch next;
  next.set_block(1, 2, 0, 5, 5);
  image.add(next, {{1, {"one", 3 * kPageBytes, {{0, {0, 8, 4}}, {1, {0, 7, 2}}, {2, {0, 5, 5}}}}},
                   {2, {"two", 1, {{0, {0, 6, 3}}}}}});
  CHECK(replays_as(image.bytes, image, 3));
}

TEST_CASE("replay refuses malformed records under a right checksum") {
  const auto remove = [](JournalBatch& b) { b.remove(2); };
  const auto create = [](JournalBatch& b) { b.create(3, 1, "three"); };
  const auto set = [](JournalBatch& b) { b.set_block(1, 1, 0, 9, 0); };
  for (const int kind : {0, 4, 255}) {
    check_rejected(with_record(remove, [&](std::byte* r) { r[0] = static_cast<std::byte>(kind); }),
                   "unknown kind");
  }
  check_rejected(with_record(remove, [](std::byte* r) { r[7] = std::byte{1}; }), "not zero");
  check_rejected(with_record(set, [](std::byte* r) { r[3] = std::byte{1}; }), "not zero");
  check_rejected(with_record(create, [](std::byte* r) { r[1] = std::byte{1}; }), "not zero");
  check_rejected(with_record(create, [](std::byte* r) { r[4] = std::byte{1}; }), "not zero");
  check_rejected(
      with_record(create, [](std::byte* r) { r[layout::create::kKey + 5] = std::byte{1}; }),
      "not zero");
  // A remove cut to 16 bytes is what is there; a set needs 32 of them, a create 24 and its key.
  check_rejected(with_record(remove, [](std::byte* r) { r[0] = std::byte{layout::kSetBlock}; }),
                 "cut off");
  check_rejected(with_record(remove, [](std::byte* r) { r[0] = std::byte{layout::kCreate}; }),
                 "cut off");
  check_rejected(
      with_record(create, [](std::byte* r) { r[layout::create::kKeyBytes] = std::byte{9}; }),
      "key is cut off");
  check_rejected(with_record(create,
                             [](std::byte* r) {
                               layout::store(r + layout::create::kKeyBytes, std::uint16_t{0xFFFF});
                             }),
                 "key is cut off");
  check_rejected(with_record(
                     [](JournalBatch& b) {
                       b.create(3, 1, "k");
                       b.remove(2);
                     },
                     [](std::byte* r) {
                       r[layout::create::kKeyBytes] = std::byte{0};
                       r[layout::create::kKey] = std::byte{0};
                     }),
                 "a key has 1 to 4096 bytes");
  for (const std::uint64_t nbytes : {std::uint64_t{0}, ~std::uint64_t{0}, (kPageBytes << 32) + 1}) {
    check_rejected(
        with_record(create,
                    [&](std::byte* r) { layout::store(r + layout::create::kNbytes, nbytes); }),
        "cannot have");
  }
}

TEST_CASE("replay refuses malformed transactions under a right checksum") {
  namespace txn = layout::txn;
  const auto tampered = [](std::size_t field, std::uint64_t value) {
    JournalImage image = with_batch([](JournalBatch& b) { b.remove(2); });
    layout::store(image.bytes.data() + image.ends[1] + field, value);
    image.reseal(image.ends[1], image.ends[2] - image.ends[1]);
    return image;
  };
  check_rejected(tampered(txn::kSequence, 1), "transaction 1 follows 1");
  check_rejected(tampered(txn::kSequence, 3), "transaction 3 follows 1");
  check_rejected(tampered(txn::kRecords, 0), "without records");
  check_rejected(tampered(txn::kRecords, 2), "1 records, not 2");
  check_rejected(tampered(txn::kPayload, 8), "padding is not zero");
  check_rejected(tampered(txn::kPayload, 24), "unknown kind");
  // Longer than the file: nothing was committed.
  for (const std::uint64_t payload : {kPageBytes, ~std::uint64_t{0}, ~std::uint64_t{0} - 71}) {
    CHECK(replay_journal(tampered(txn::kPayload, payload).bytes).value().sequence == 1);
  }
  JournalImage padded = with_batch([](JournalBatch& b) { b.remove(2); });
  padded.bytes.back() = std::byte{1};
  padded.reseal(padded.ends[1], padded.ends[2] - padded.ends[1]);
  check_rejected(padded, "padding is not zero");
}

TEST_CASE("replay refuses headers that no store has") {
  namespace head = layout::head;
  using layout::store;
  CHECK(replay_journal(with_header([](std::byte*) {}).bytes).is_ok());
  for (const std::uint64_t size :
       {0ULL, 1ULL, 4095ULL, 6144ULL, (1ULL << 30) + 4096, ~0ULL & ~4095ULL}) {
    check_rejected(
        with_header([&](std::byte* p) { store(p + head::kBlockBytes, std::uint64_t{size}); }),
        "blocks of");
  }
  for (const std::uint32_t stripes : {0U, kMaxStripes + 1, ~0U}) {
    check_rejected(with_header([&](std::byte* p) { store(p + head::kStripes, stripes); }),
                   "data files");
  }
  check_rejected(with_header([](std::byte* p) { store(p + head::kGeneration, std::uint64_t{0}); }),
                 "generation 0");
  check_rejected(with_header([](std::byte* p) { p[kPageBytes - 1] = std::byte{1}; }), "not zero");
  for (const std::uint64_t size : {0ULL, 4095ULL, 4097ULL}) {
    check_rejected(
        with_header([&](std::byte* p) { store(p + head::kSnapshotBytes, std::uint64_t{size}); }),
        "a snapshot of");
  }
  check_rejected(
      with_header([](std::byte* p) { store(p + head::kSnapshotBytes, ~std::uint64_t{4095}); }),
      "ends before its snapshot");
  check_rejected(with_header([](std::byte* p) {
                   store(p + head::kSnapshotBytes, std::uint64_t{3 * kPageBytes});
                 }),
                 "snapshot is not one transaction");
  check_rejected(with_header([](std::byte* p) { p[0] = std::byte{0}; }), "not a journal");

  const Result<JournalReplay> later =
      replay_journal(with_header([](std::byte* p) { store(p + head::kVersion, 2U); }).bytes);
  CHECK(later.status().code() == Code::kUnsupported);
  CHECK(contains(later.status().to_string(), "version 2"));
  CHECK(is_corrupt({}));
  CHECK(is_corrupt(std::vector<std::byte>(kPageBytes)));
  CHECK(is_corrupt(std::vector<std::byte>(3 * kPageBytes)));
}

}  // namespace offload
