// A model of a journalled store that makes random transactions, and journals as bytes; for tests
// and for the fuzzer's seeds.
//
// Single-threaded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <random>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/align.h"
#include "store/journal_format.h"
#include "store/journal_layout.h"

namespace offload {

inline JournalHeader test_header(std::uint8_t seed = 1) {
  JournalHeader header;
  for (std::size_t i = 0; i < header.uuid.size(); ++i) {
    header.uuid[i] = static_cast<std::uint8_t>(seed * 31 + i);
  }
  header.block_bytes = kPageBytes;
  header.stripes = 3;
  return header;
}

// A store's committed state in memory, changed by random transactions that keep the rules.
class JournalModel {
 public:
  explicit JournalModel(unsigned seed) : random_(seed) {}

  const JournalObjects& objects() const { return objects_; }
  std::uint64_t pick(std::uint64_t below) { return random_() % below; }

  // At least one record; objects() is the state after it. Keys of up to `max_key` bytes.
  void change(JournalBatch& batch, std::size_t max_key = 40) {
    used_.clear();
    for (const auto& [id, object] : objects_) {
      for (const auto& [index, block] : object.blocks) used_.insert({block.stripe, block.slot});
    }
    const std::uint64_t records = 1 + pick(12);
    while (batch.records() < records) {
      const std::uint64_t choice = pick(10);
      if (objects_.empty() || choice < 2) {
        create(batch, max_key);
      } else if (choice < 3) {
        remove(batch);
      } else {
        set_block(batch);
      }
    }
  }

  // The state in one transaction.
  void snapshot(JournalBatch& batch) const {
    for (const auto& [id, object] : objects_) {
      batch.create(id, object.nbytes, object.key);
      for (const auto& [index, block] : object.blocks) {
        batch.set_block(id, index, block.stripe, block.slot, block.crc);
      }
    }
  }

 private:
  JournalObjects::iterator any_object() {
    return std::next(objects_.begin(), static_cast<std::ptrdiff_t>(pick(objects_.size())));
  }

  void create(JournalBatch& batch, std::size_t max_key) {
    JournalObject object;
    object.nbytes = 1 + pick(20 * kPageBytes);
    object.key = std::to_string(next_id_) + "/";
    object.key.resize(object.key.size() + pick(max_key - 20), static_cast<char>(pick(256)));
    batch.create(next_id_, object.nbytes, object.key);
    objects_[next_id_++] = object;
  }

  void remove(JournalBatch& batch) {
    const auto place = any_object();
    JournalObject object = place->second;
    batch.remove(place->first);
    objects_.erase(place);
    if (pick(3) != 0) return;
    // Its name for another object, at once: how a checkpoint is replaced.
    object.blocks.clear();
    batch.create(next_id_, object.nbytes, object.key);
    objects_[next_id_++] = object;
  }

  void set_block(JournalBatch& batch) {
    const auto place = any_object();
    const auto index =
        static_cast<std::uint32_t>(pick((place->second.nbytes - 1) / kPageBytes + 1));
    JournalBlock block;
    do {
      block.stripe = static_cast<std::uint32_t>(pick(3));
      block.slot = pick(1000);
    } while (!used_.insert({block.stripe, block.slot}).second);
    block.crc = static_cast<std::uint32_t>(random_());
    batch.set_block(place->first, index, block.stripe, block.slot, block.crc);
    place->second.blocks[index] = block;
  }

  std::mt19937_64 random_;
  JournalObjects objects_;
  std::set<std::pair<std::uint32_t, std::uint64_t>> used_;  // before the transaction and in it
  std::uint64_t next_id_ = 1;
};

// A journal's bytes, with where each transaction ends and the state after it. ends[0] and
// states[0] are of the header or, where there is one, the snapshot.
struct JournalImage {
  JournalHeader header = test_header();
  std::vector<std::byte> bytes;
  std::vector<std::uint64_t> ends;
  std::vector<JournalObjects> states;
  std::uint64_t sequence = 0;

  explicit JournalImage(JournalBatch snapshot = {}, JournalObjects objects = {}) {
    const std::uint64_t nbytes = kPageBytes + (snapshot.empty() ? 0 : snapshot.sealed_bytes());
    const auto head = encode_journal_header(header, nbytes);
    bytes.assign(head.begin(), head.end());
    if (snapshot.empty()) {
      ends.push_back(nbytes);
      states.push_back(std::move(objects));
    } else {
      add(snapshot, objects);
    }
  }

  void add(JournalBatch& batch, const JournalObjects& after) {
    const auto sealed = batch.seal(header, ++sequence, bytes.size());
    bytes.insert(bytes.end(), sealed.begin(), sealed.end());
    ends.push_back(bytes.size());
    states.push_back(after);
  }

  // Puts the checksums right again after the transaction at `offset` was tampered with.
  void reseal(std::uint64_t offset, std::uint64_t nbytes) {
    namespace txn = journal_layout::txn;
    std::byte* head = bytes.data() + offset;
    journal_layout::store(head + txn::kBodyCrc,
                          crc32c(head + txn::kHeadBytes, nbytes - txn::kHeadBytes));
    journal_layout::store(head + txn::kHeadCrc, txn::head_crc(head));
  }
};

// `transactions` random ones; behind a random snapshot where asked.
inline JournalImage random_image(unsigned seed, int transactions, bool with_snapshot = false,
                                 std::size_t max_key = 40) {
  JournalModel model(seed);
  if (with_snapshot) {
    for (int i = 0; i < 5; ++i) {
      JournalBatch unused;
      model.change(unused, max_key);
    }
  }
  JournalBatch snapshot;
  model.snapshot(snapshot);
  JournalImage image(std::move(snapshot), model.objects());
  for (int i = 0; i < transactions; ++i) {
    JournalBatch batch;
    model.change(batch, max_key);
    image.add(batch, model.objects());
  }
  return image;
}

}  // namespace offload
