// In what order, and with which roundings, the ATen of this machine sums the squares of a 2-norm.
//
// Along memory it has `lanes` running sums of every lanes-th element, adds them up one after
// another and then the elements that are left over; across memory (the norms of columns) one
// running sum per column, row by row. How wide it is and where a product and a sum are rounded once
// depends on how torch was compiled; it cannot be asked for, but is constant in a process and shows
// in norms.
#pragma once

#include <cstddef>

namespace offload {

struct NormOrder {
  static constexpr std::size_t kMostLanes = 16;

  std::size_t lanes = 8;  // 4, 8 or 16
  bool fuse_lanes = false;
  // The compiler took the elements left over in groups of so many (0: it did not), whose squares
  // are never fused with the sum; what is left over of that is if fuse_rest.
  std::size_t rest_group = 0;
  bool fuse_rest = false;
  bool fuse_columns = false;
};

}  // namespace offload
