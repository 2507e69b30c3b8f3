// SlotAllocator: references, growth, and a day of churn.
#include "store/slot_allocator.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "doctest/doctest.h"

namespace offload {

TEST_CASE("SlotAllocator frees a slot with its last reference") {
  SlotAllocator slots;
  slots.resize(3);
  CHECK(slots.take() == 0);
  CHECK(slots.take() == 1);
  slots.add_reference(0);
  slots.drop_reference(0);
  CHECK(slots.free_slots() == 1);
  slots.drop_reference(0);
  CHECK(slots.free_slots() == 2);
  CHECK(slots.take() == 2);  // the order of the file, round and round
  CHECK(slots.take() == 0);
  CHECK(slots.free_slots() == 0);
  slots.resize(200);
  CHECK(slots.free_slots() == 197);
  for (std::uint64_t slot = 3; slot < 200; ++slot) CHECK(slots.take() == slot);
  for (std::uint64_t slot = 199; slot >= 2; --slot) slots.drop_reference(slot);
  CHECK(slots.take() == 2);
  slots.drop_reference(2);
  slots.resize(2);
  CHECK(slots.size() == 2);
  CHECK(slots.free_slots() == 0);
  slots.restore({1, 0, 2, 0});
  CHECK(slots.used_slots() == 2);
  CHECK(slots.take() == 1);
  CHECK(slots.take() == 3);
}

TEST_CASE("SlotAllocator serves a day of churn from what it had in the morning") {
  // Objects of the sizes of a model's slabs and of activations come, are rewritten (new slots, then
  // the old ones back) and go, close to the limit. Whatever was done before, as many blocks can be
  // had as are free: no growth, no request that fails while there is room.
  constexpr std::uint64_t kSlots = 4096;
  constexpr int kOperations = 1'000'000;
  constexpr std::uint64_t kBlocks[] = {1, 1, 2, 7, 9, 27, 28, 36, 154};
  std::mt19937_64 random(7);
  SlotAllocator slots;
  slots.resize(kSlots);
  std::vector<std::vector<std::uint64_t>> objects;
  std::vector<char> used(kSlots, 0);
  std::uint64_t live = 0;
  std::uint64_t most = 0;
  std::uint64_t refused = 0;
  int wrong = 0;
  const auto take = [&](std::uint64_t blocks) {
    std::vector<std::uint64_t> taken;
    for (std::uint64_t i = 0; i < blocks; ++i) {
      taken.push_back(slots.take());
      if (taken.back() >= kSlots || used[taken.back()]++ != 0) ++wrong;
    }
    live += blocks;
    most = std::max(most, live);
    return taken;
  };
  const auto give_back = [&](const std::vector<std::uint64_t>& taken) {
    for (const std::uint64_t slot : taken) {
      slots.drop_reference(slot);
      --used[slot];
    }
    live -= taken.size();
  };
  for (int i = 0; i < kOperations; ++i) {
    if (slots.free_slots() != kSlots - live) ++wrong;
    const std::uint64_t blocks = kBlocks[random() % std::size(kBlocks)];
    const std::uint64_t dice = random() % 100;
    if (objects.empty() || dice < 34) {
      if (blocks > slots.free_slots()) {
        ++refused;
        continue;
      }
      objects.push_back(take(blocks));
    } else if (dice < 70) {
      auto& object = objects[random() % objects.size()];
      if (object.size() > slots.free_slots()) continue;
      auto next = take(object.size());
      std::swap(object, next);
      give_back(next);
    } else {
      std::swap(objects[random() % objects.size()], objects.back());
      give_back(objects.back());
      objects.pop_back();
    }
  }
  CHECK(wrong == 0);
  CHECK(refused > 0);        // it was full now and then
  CHECK(most > kSlots - 8);  // to the last slots
  CHECK(slots.size() == kSlots);
  while (!objects.empty()) {
    give_back(objects.back());
    objects.pop_back();
  }
  CHECK(slots.free_slots() == kSlots);
}

}  // namespace offload
