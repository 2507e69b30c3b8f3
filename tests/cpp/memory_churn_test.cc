// A day of slab churn: fragmentation does not grow, and the free ranges are right to the end.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <utility>
#include <vector>

#include "base/align.h"
#include "doctest/doctest.h"
#include "mem/free_ranges.h"
#include "memory_testing.h"

namespace offload {
namespace {

// Slab sizes of a GPT-2 in fp32, a unit each: the embeddings, the blocks, the last norm.
std::vector<std::uint64_t> gpt2_units(std::uint64_t width, int layers) {
  std::vector<std::uint64_t> elements = {50257 * width, 1024 * width, 2 * width};
  elements.insert(elements.end(), static_cast<std::size_t>(layers), (12 * width + 13) * width);
  for (std::uint64_t& n : elements) n *= sizeof(float);
  return elements;
}

}  // namespace

TEST_CASE("A million slabs come and go in an arena and fragmentation does not grow") {
  constexpr int kOperations = 1'000'000;
  constexpr int kTenth = kOperations / 10;
  const std::vector<std::uint64_t> units = gpt2_units(768, 12);
  const std::uint64_t capacity = 5 * block_bytes(units[0]);
  for (const bool oldest_first : {false, true}) {
    CAPTURE(oldest_first);
    std::mt19937_64 random(7);
    auto arena = make_host_arena(capacity);
    std::deque<Lease> held;
    std::uint64_t used = 0;
    int unexpected = 0;
    // Of the capacity, what would have been used had a refused request been granted: below 1 it
    // was refused for fragmentation.
    double worst = 1;
    std::array<double, 10> sum = {};
    std::array<int, 10> refusals = {};
    for (int op = 0; op < kOperations;) {
      const std::uint64_t nbytes = units[random() % units.size()];
      Result<Lease> lease = arena->allocate(nbytes);
      if (lease.is_ok()) {
        used += lease.value().nbytes();
        held.push_back(lease.take());
        ++op;
        continue;
      }
      if (lease.status().code() != Code::kBudget) ++unexpected;
      const double full =
          std::min(1.0, static_cast<double>(used + nbytes) / static_cast<double>(capacity));
      worst = std::min(worst, full);
      sum[op / kTenth] += full;
      ++refusals[op / kTenth];
      const std::size_t victim = oldest_first ? 0 : random() % held.size();
      used -= held[victim].nbytes();
      held.erase(held.begin() + static_cast<long>(victim));
      ++op;
    }
    CHECK(unexpected == 0);
    CHECK(arena->usage().in_use == used);
    REQUIRE(refusals.front() > 0);
    REQUIRE(refusals.back() > 0);
    CHECK(worst > 0.9);
    CHECK(sum.back() / refusals.back() > sum.front() / refusals.front() - 0.005);
    held.clear();
    CHECK(arena->usage().in_use == 0);
    CHECK(arena->usage().largest_free == capacity);
  }
}

TEST_CASE("FreeRanges agrees with a bitmap") {
  constexpr std::uint64_t kSize = 96;
  for (const unsigned seed : {1u, 2u, 3u}) {
    CAPTURE(seed);
    std::mt19937_64 random(seed);
    FreeRanges ranges(kSize);
    std::vector<bool> taken(kSize, false);
    std::vector<std::pair<std::uint64_t, std::uint64_t>> blocks;  // (offset, bytes)
    int wrong = 0;
    int refused = 0;
    for (int step = 0; step < 20'000; ++step) {
      // Best fit by looking at every byte.
      const std::uint64_t need = 1 + random() % 12;
      std::optional<std::uint64_t> expected;
      std::uint64_t best = std::numeric_limits<std::uint64_t>::max();
      std::uint64_t longest = 0;
      std::uint64_t total = 0;
      for (std::uint64_t at = 0; at < kSize;) {
        std::uint64_t end = at;
        while (end < kSize && !taken[end]) ++end;
        const std::uint64_t length = end - at;
        if (length >= need && length < best) {
          best = length;
          expected = at;
        }
        longest = std::max(longest, length);
        total += length;
        at = end + 1;
      }
      const std::optional<std::uint64_t> offset = ranges.best_fit(need);
      if (offset != expected || ranges.total() != total || ranges.longest() != longest) ++wrong;
      if (!offset.has_value()) ++refused;
      if (offset.has_value() && random() % 2 == 0) {
        ranges.take(*offset, need);
        std::fill_n(taken.begin() + static_cast<long>(*offset), need, true);
        blocks.emplace_back(*offset, need);
      } else if (!blocks.empty() && random() % 16 < 15) {
        std::swap(blocks[random() % blocks.size()], blocks.back());
        const auto [from, length] = blocks.back();
        blocks.pop_back();
        ranges.give_back(from, length);
        std::fill_n(taken.begin() + static_cast<long>(from), length, false);
      }
    }
    CHECK(wrong == 0);
    CHECK(refused > 0);
    for (const auto& [offset, length] : blocks) ranges.give_back(offset, length);
    CHECK(ranges.longest() == kSize);
  }
}

}  // namespace offload
