#include "store/slot_allocator.h"

#include <utility>

namespace offload {

void SlotAllocator::resize(std::uint64_t slots) {
  const std::uint64_t former = size();
  if (slots < former) std::erase_if(free_, [slots](std::uint64_t slot) { return slot >= slots; });
  free_.reserve(slots);
  references_.resize(slots, 0);
  // The lowest new one on top: a file that is filled once is filled from its start.
  for (std::uint64_t slot = slots; slot-- > former;) free_.push_back(slot);
}

void SlotAllocator::restore(std::vector<std::uint32_t> references) {
  references_ = std::move(references);
  free_.clear();
  free_.reserve(size());
  for (std::uint64_t slot = size(); slot-- > 0;) {
    if (references_[slot] == 0) free_.push_back(slot);
  }
}

std::uint64_t SlotAllocator::take() {
  const std::uint64_t slot = free_.back();
  free_.pop_back();
  references_[slot] = 1;
  return slot;
}

void SlotAllocator::drop_reference(std::uint64_t slot) {
  if (--references_[slot] == 0) free_.push_back(slot);
}

}  // namespace offload
