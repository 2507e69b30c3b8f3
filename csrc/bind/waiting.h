// Waiting for native work as Python has to: without the GIL, and with an eye on Ctrl-C.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

#include "bind/bindings.h"
#include "bind/errors.h"

namespace offload::bind {

// How long a wait may take before the next look for signals.
inline constexpr unsigned kLookMs = 100;

inline bool answer_of(bool over) {
  return over;
}
inline bool answer_of(Result<bool> over) {
  return take(std::move(over));
}

// Calls `over`, which waits for kLookMs at most, until it answers true; or raises its error, or
// what a signal's handler raised.
template <typename Over>
void until(const Over& over) {
  while (!answer_of(unlocked(over))) {
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
  }
}

}  // namespace offload::bind
