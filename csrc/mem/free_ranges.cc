#include "mem/free_ranges.h"

#include <iterator>

namespace offload {

FreeRanges::FreeRanges(std::uint64_t size) {
  if (size > 0) insert(0, size);
}

std::optional<std::uint64_t> FreeRanges::best_fit(std::uint64_t nbytes) const {
  const auto fit = by_size_.lower_bound({nbytes, 0});
  if (fit == by_size_.end()) return std::nullopt;
  return fit->second;
}

void FreeRanges::take(std::uint64_t offset, std::uint64_t nbytes) {
  const auto range = by_offset_.find(offset);
  const std::uint64_t rest = range->second - nbytes;
  erase(range);
  if (rest > 0) insert(offset + nbytes, rest);
}

bool FreeRanges::take_at(std::uint64_t offset, std::uint64_t nbytes) {
  auto range = by_offset_.upper_bound(offset);
  if (range == by_offset_.begin()) return false;
  range = std::prev(range);
  const auto [begin, length] = *range;
  if (nbytes > length || offset - begin > length - nbytes) return false;
  erase(range);
  if (offset > begin) insert(begin, offset - begin);
  if (offset + nbytes < begin + length) {
    insert(offset + nbytes, begin + length - (offset + nbytes));
  }
  return true;
}

void FreeRanges::give_back(std::uint64_t offset, std::uint64_t nbytes) {
  auto next = by_offset_.lower_bound(offset);
  if (next != by_offset_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == offset) {
      offset = before->first;
      nbytes += before->second;
      next = erase(before);
    }
  }
  if (next != by_offset_.end() && offset + nbytes == next->first) {
    nbytes += next->second;
    erase(next);
  }
  insert(offset, nbytes);
}

void FreeRanges::insert(std::uint64_t offset, std::uint64_t nbytes) {
  by_offset_.emplace(offset, nbytes);
  by_size_.emplace(nbytes, offset);
  total_ += nbytes;
}

FreeRanges::ByOffset::iterator FreeRanges::erase(ByOffset::iterator range) {
  by_size_.erase({range->second, range->first});
  total_ -= range->second;
  return by_offset_.erase(range);
}

}  // namespace offload
