// How a Status becomes a Python exception.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

#include "base/status.h"

namespace offload::bind {

// Raises offload.errors' exception for `status`. REQUIRES: the GIL is held and !status.is_ok().
[[noreturn]] inline void raise(const Status& status) {
  const pybind11::object error =
      pybind11::module_::import("offload.errors")
          .attr("from_native")(code_name(status.code()), status.os_errno(), status.path(),
                               status.to_string());
  PyErr_SetObject(pybind11::type::handle_of(error).ptr(), error.ptr());
  throw pybind11::error_already_set();
}

inline void check(const Status& status) {
  if (!status.is_ok()) raise(status);
}

template <typename T>
T take(Result<T> result) {
  if (!result.is_ok()) raise(result.status());
  return result.take();
}

}  // namespace offload::bind
