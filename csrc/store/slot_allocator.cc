#include "store/slot_allocator.h"

#include <bit>
#include <utility>

namespace offload {
namespace {

constexpr std::uint64_t kWordBits = 64;

}  // namespace

void SlotAllocator::set_free(std::uint64_t slot) {
  free_[slot / kWordBits] |= std::uint64_t{1} << (slot % kWordBits);
  ++free_slots_;
}

void SlotAllocator::resize(std::uint64_t slots) {
  const std::uint64_t former = size();
  for (std::uint64_t slot = slots; slot < former; ++slot) {
    free_[slot / kWordBits] &= ~(std::uint64_t{1} << (slot % kWordBits));
    --free_slots_;
  }
  free_.resize((slots + kWordBits - 1) / kWordBits, 0);
  references_.resize(slots, 0);
  for (std::uint64_t slot = former; slot < slots; ++slot) set_free(slot);
  if (next_ >= slots) next_ = 0;
}

void SlotAllocator::restore(std::vector<std::uint32_t> references) {
  references_ = std::move(references);
  free_.assign((size() + kWordBits - 1) / kWordBits, 0);
  free_slots_ = 0;
  next_ = 0;
  for (std::uint64_t slot = 0; slot < size(); ++slot) {
    if (references_[slot] == 0) set_free(slot);
  }
}

std::uint64_t SlotAllocator::take() {
  std::uint64_t word = next_ / kWordBits;
  std::uint64_t bits = free_[word] & (~std::uint64_t{0} << (next_ % kWordBits));
  while (bits == 0) {
    word = word + 1 == free_.size() ? 0 : word + 1;
    bits = free_[word];
  }
  const auto bit = static_cast<std::uint64_t>(std::countr_zero(bits));
  const std::uint64_t slot = word * kWordBits + bit;
  free_[word] &= ~(std::uint64_t{1} << bit);
  --free_slots_;
  references_[slot] = 1;
  next_ = slot + 1 == size() ? 0 : slot + 1;
  return slot;
}

void SlotAllocator::drop_reference(std::uint64_t slot) {
  if (--references_[slot] == 0) set_free(slot);
}

}  // namespace offload
