// replay_journal on bytes in memory: what it makes of whole and of damaged journals.
#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "journal_testing.h"

namespace offload {
namespace {

namespace layout = journal_layout;
using Bytes = std::vector<std::byte>;

}  // namespace

TEST_CASE("random transactions replay to the model's state") {
  for (unsigned seed = 0; seed < 200; ++seed) {
    INFO(seed);
    const JournalImage image = random_image(seed, 8, seed % 2 == 1, seed % 5 == 0 ? 4000 : 40);
    const Result<JournalReplay> replay = replay_journal(image.bytes);
    REQUIRE_MESSAGE(replay.is_ok(), replay.status().to_string());
    CHECK(replays_as(image.bytes, image, image.ends.size() - 1));
    CHECK(replay.value().header.uuid == image.header.uuid);
    CHECK(replay.value().header.block_bytes == image.header.block_bytes);
    CHECK(replay.value().header.stripes == image.header.stripes);
    CHECK(replay.value().header.generation == image.header.generation);
    CHECK(replay.value().last_offset == image.ends[image.ends.size() - 2]);
  }
}

TEST_CASE("a journal without transactions is an empty store") {
  const JournalImage image;
  CHECK(replays_as(image.bytes, image, 0));
  CHECK(replay_journal(image.bytes).value().last_offset == 0);
}

TEST_CASE("a last transaction cut at any byte is dropped, whole") {
  for (const bool large : {false, true}) {
    const JournalImage image = random_image(7, 6, true, large ? 4000 : 40);
    const std::size_t last = image.ends.size() - 1;
    CHECK(replays_as(image.bytes, image, last));
    for (std::uint64_t length = image.ends[last - 1]; length < image.bytes.size(); ++length) {
      Bytes cut(image.bytes.begin(), image.bytes.begin() + static_cast<std::ptrdiff_t>(length));
      REQUIRE(replays_as(cut, image, last - 1));
      // As a file is whose length was extended before it was written.
      if (length % 64 == 0) {
        cut.resize(image.bytes.size());
        const bool lost = !std::equal(cut.begin(), cut.end(), image.bytes.begin());
        REQUIRE(replays_as(cut, image, lost ? last - 1 : last));
      }
    }
  }
}

TEST_CASE("a journal cut anywhere is a former state, or refused inside its snapshot") {
  const JournalImage image = random_image(11, 6, true, 4000);
  for (std::uint64_t length = 0; length <= image.bytes.size(); length += 8) {
    const Bytes cut(image.bytes.begin(), image.bytes.begin() + static_cast<std::ptrdiff_t>(length));
    if (length < image.ends[0]) {
      REQUIRE(is_corrupt(cut));
      continue;
    }
    const auto next = std::upper_bound(image.ends.begin(), image.ends.end(), length);
    REQUIRE(replays_as(cut, image, static_cast<std::size_t>(next - image.ends.begin()) - 1));
  }
}

TEST_CASE("any damaged byte is refused, unless it is in the last transaction: that is dropped") {
  JournalImage image = random_image(3, 4, true);
  const std::size_t last = image.ends.size() - 1;
  for (std::uint64_t at = 0; at < image.bytes.size(); ++at) {
    const std::byte former = image.bytes[at];
    image.bytes[at] ^= static_cast<std::byte>(1 << (at * 5 % 8));
    if (at < image.ends[last - 1]) {
      REQUIRE(is_corrupt(image.bytes));
    } else {
      REQUIRE(replays_as(image.bytes, image, last - 1));
    }
    image.bytes[at] = former;
  }
}

TEST_CASE("a damaged snapshot is refused with nothing behind it either: it cannot be torn") {
  JournalImage image = random_image(3, 0, true);
  REQUIRE(image.bytes.size() > kPageBytes);
  REQUIRE(replays_as(image.bytes, image, 0));
  for (std::uint64_t at = 0; at < image.bytes.size(); ++at) {
    image.bytes[at] ^= std::byte{16};
    REQUIRE(is_corrupt(image.bytes));
    image.bytes[at] ^= std::byte{16};
  }
}

TEST_CASE("a last transaction of which any sectors are missing is dropped") {
  std::mt19937_64 random(1);
  JournalImage image = random_image(5, 3, true, 4000);
  const std::size_t last = image.ends.size() - 1;
  for (int round = 0; round < 500; ++round) {
    Bytes torn = image.bytes;
    for (std::uint64_t at = image.ends[last - 1]; at < torn.size(); at += 512) {
      if (random() % 4 == 0)
        std::fill_n(torn.begin() + static_cast<std::ptrdiff_t>(at), 512, std::byte{0});
    }
    REQUIRE(replays_as(torn, image, torn == image.bytes ? last : last - 1));
  }
}

TEST_CASE("damage anywhere never makes a state that was not committed") {
  std::mt19937_64 random(2);
  for (unsigned round = 0; round < 3000; ++round) {
    JournalImage image = random_image(round % 16, 5, round % 2 == 0, round % 3 == 0 ? 4000 : 40);
    const std::uint64_t begin = random() % image.bytes.size();
    const std::uint64_t end =
        std::min<std::uint64_t>(begin + 1 + random() % 9000, image.bytes.size());
    const bool zero = random() % 2 == 0;
    for (std::uint64_t at = begin; at < end; ++at) {
      image.bytes[at] = zero ? std::byte{0} : static_cast<std::byte>(random());
    }
    const Result<JournalReplay> replay = replay_journal(image.bytes);
    if (!replay.is_ok()) {
      REQUIRE(replay.status().code() == Code::kCorrupt);
      continue;
    }
    // Nothing behind the damage stands alone: the state is the one before it.
    const auto found = std::find(image.ends.begin(), image.ends.end(), replay.value().valid_bytes);
    REQUIRE(found != image.ends.end());
    REQUIRE(replay.value().objects ==
            image.states[static_cast<std::size_t>(found - image.ends.begin())]);
  }
}

TEST_CASE("a damaged transaction is told from a torn one by any header behind it") {
  JournalImage image = random_image(9, 5);
  // Only the header's page of the last transaction stays whole: its own records are lost as well.
  const std::size_t last = image.ends.size() - 1;
  std::fill(image.bytes.begin() + static_cast<std::ptrdiff_t>(image.ends[1]),
            image.bytes.begin() + static_cast<std::ptrdiff_t>(image.ends[last - 1]), std::byte{0});
  image.bytes[image.ends[last - 1] + layout::txn::kHeadBytes] ^= std::byte{1};
  check_rejected(image, "transaction 2 is damaged, but transaction 5 was written behind it");
  // Without it, the end cannot be told from a torn commit.
  image.bytes[image.ends[last - 1]] ^= std::byte{1};
  CHECK(replays_as(image.bytes, image, 1));
}

TEST_CASE("a transaction of another journal, generation or place is not taken for one of this") {
  for (int which = 0; which < 3; ++which) {
    INFO(which);
    JournalImage image = random_image(4, 2);
    JournalHeader other = image.header;
    if (which == 0) other = test_header(2);
    if (which == 1) ++other.generation;
    JournalBatch batch;
    batch.create(99, 1, "foreign");
    const std::uint64_t place = image.bytes.size() + (which == 2 ? kPageBytes : 0);
    const auto sealed = batch.seal(other, image.sequence + 1, place);
    image.bytes.insert(image.bytes.end(), sealed.begin(), sealed.end());
    CHECK(replays_as(image.bytes, image, 2));
  }
}

TEST_CASE("memory is bounded by the input, not by the sizes it claims") {
  JournalImage image;
  JournalBatch batch;
  for (std::uint64_t id = 1; id <= 50; ++id) {
    batch.create(id, kPageBytes << 32, std::to_string(id));
    batch.set_block(id, ~std::uint32_t{0}, 0, id, 0);
  }
  CHECK(batch.check(image.header).is_ok());
  image.add(batch, {});
  const Result<JournalReplay> replay = replay_journal(image.bytes);
  REQUIRE_MESSAGE(replay.is_ok(), replay.status().to_string());
  CHECK(replay.value().objects.at(50).blocks.size() == 1);
}

TEST_CASE("a batch knows what no journal could hold") {
  const JournalHeader header = test_header();
  const auto refused = [&](const std::function<void(JournalBatch&)>& fill) {
    JournalBatch batch;
    fill(batch);
    const bool bad = batch.check(header).code() == Code::kInvalid;
    batch.clear();
    return bad && batch.check(header).is_ok() && batch.empty();
  };
  CHECK(refused([](JournalBatch& b) { b.create(1, 1, ""); }));
  CHECK(refused([](JournalBatch& b) { b.create(1, 1, std::string(kMaxKeyBytes + 1, 'k')); }));
  CHECK(refused([](JournalBatch& b) { b.create(1, 0, "k"); }));
  CHECK(refused([](JournalBatch& b) { b.create(1, (kPageBytes << 32) + 1, "k"); }));
  CHECK(refused([](JournalBatch& b) { b.create(1, ~std::uint64_t{0}, "k"); }));
  CHECK(refused([](JournalBatch& b) { b.set_block(1, 0, 3, 0, 0); }));
  CHECK(refused([](JournalBatch& b) { b.set_block(1, 0, 0, std::uint64_t{1} << 52, 0); }));
  CHECK_FALSE(refused(
      [](JournalBatch& b) { b.create(1, kPageBytes << 32, std::string(kMaxKeyBytes, 'k')); }));
}

TEST_CASE("a batch may be sealed, added to and sealed again") {
  JournalImage image;
  JournalBatch batch;
  batch.create(1, 1, "one");
  CHECK(batch.seal(image.header, 9, 4096).size() == kPageBytes);
  batch.create(2, 1, "two");
  image.add(batch, {{1, {"one", 1, {}}}, {2, {"two", 1, {}}}});
  CHECK(batch.records() == 2);
  CHECK(replays_as(image.bytes, image, 1));
}

}  // namespace offload
