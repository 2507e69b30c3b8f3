// SlotAllocator: which slots of one swap file are in use, and by how many.
//
// Slots are all alike, so any free one serves any block: nothing can fragment, whatever the order
// of allocation. Slots are taken in the order of the file, round and round (next fit), so that the
// blocks of one object lie one behind the other as far as others leave room: disks like that.
// A slot is free when nothing refers to it; those that refer are the map of live
// blocks, the committed map of a durable store, and each read in flight.
//
// Not thread-safe. Allocates only in resize() and restore().
#pragma once

#include <cstdint>
#include <vector>

namespace offload {

class SlotAllocator {
 public:
  std::uint64_t size() const { return references_.size(); }
  std::uint64_t free_slots() const { return free_slots_; }
  std::uint64_t used_slots() const { return size() - free_slots(); }

  // More slots, free ones; or fewer. REQUIRES when fewer: those beyond `slots` are free.
  void resize(std::uint64_t slots);
  // Starts over with as many slots as `references` has entries. REQUIRES: nothing refers to any.
  void restore(std::vector<std::uint32_t> references);

  // The next free slot, referred to once from here on. REQUIRES: free_slots() > 0.
  std::uint64_t take();
  // REQUIRES of both: `slot` is in use.
  void add_reference(std::uint64_t slot) { ++references_[slot]; }
  void drop_reference(std::uint64_t slot);

 private:
  void set_free(std::uint64_t slot);

  std::vector<std::uint64_t> free_;        // a bit for each slot, 64 to a word
  std::vector<std::uint32_t> references_;  // by slot
  std::uint64_t free_slots_ = 0;
  std::uint64_t next_ = 0;  // where the search for a free slot begins
};

}  // namespace offload
