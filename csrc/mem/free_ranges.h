// FreeRanges: which bytes of [0, size) are free, and where the next allocation goes.
//
// Best fit; of equal fits the lowest offset. Neighbours coalesce at once, so two free ranges never
// touch. Every operation is logarithmic in the number of free ranges. Not thread-safe.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <utility>

namespace offload {

class FreeRanges {
 public:
  explicit FreeRanges(std::uint64_t size);

  // The offset of the range that best fits `nbytes`; nothing when none is long enough.
  std::optional<std::uint64_t> best_fit(std::uint64_t nbytes) const;
  // Takes the first `nbytes` of the free range that starts at `offset`. REQUIRES: `offset` is what
  // best_fit(nbytes) returned, and nothing has changed since.
  void take(std::uint64_t offset, std::uint64_t nbytes);
  // Takes these bytes; false, and nothing changed, when some of them are not free.
  bool take_at(std::uint64_t offset, std::uint64_t nbytes);
  // REQUIRES: the bytes are taken.
  void give_back(std::uint64_t offset, std::uint64_t nbytes);

  std::uint64_t total() const { return total_; }
  std::uint64_t longest() const { return by_size_.empty() ? 0 : by_size_.rbegin()->first; }

 private:
  using ByOffset = std::map<std::uint64_t, std::uint64_t>;
  void insert(std::uint64_t offset, std::uint64_t nbytes);
  ByOffset::iterator erase(ByOffset::iterator range);

  ByOffset by_offset_;                                         // offset -> bytes
  std::set<std::pair<std::uint64_t, std::uint64_t>> by_size_;  // (bytes, offset), the same ranges
  std::uint64_t total_ = 0;
};

}  // namespace offload
