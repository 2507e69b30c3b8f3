// Where a copy between host and device must be split: memory of an arena is registered range by
// range, and one copy may not go from one range into the next (mem/memory_registrar.h).
#pragma once

#include <algorithm>
#include <cstdint>

#include "base/status.h"

namespace offload {

// Calls piece(at, nbytes) for consecutive parts of [offset, offset + nbytes) of an arena, none of
// which crosses a multiple of `step`; `at` counts from `offset`. Stops at the first error.
template <typename Piece>
Status split_copy(std::uint64_t offset, std::uint64_t nbytes, std::uint64_t step, Piece piece) {
  for (std::uint64_t at = 0; at < nbytes;) {
    const std::uint64_t part = std::min(nbytes - at, step - (offset + at) % step);
    OFFLOAD_RETURN_IF_ERROR(piece(at, part));
    at += part;
  }
  return Status::ok();
}

}  // namespace offload
