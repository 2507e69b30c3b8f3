// The parts of offload._native, one function and one file each, and what they share.
//
// Nothing here takes the GIL on a native thread; every call that can wait releases it.
#pragma once

#include <pybind11/pybind11.h>

namespace offload::bind {

void bind_adafactor(pybind11::module_& module);
void bind_device(pybind11::module_& module);
void bind_device_memory(pybind11::module_& module);
void bind_device_transfer(pybind11::module_& module);
void bind_disk(pybind11::module_& module);
void bind_kernels(pybind11::module_& module);
void bind_memory(pybind11::module_& module);
void bind_optim(pybind11::module_& module);
void bind_store(pybind11::module_& module);
void bind_update(pybind11::module_& module);

// The result of `call`, made without the GIL.
template <typename F>
auto unlocked(F&& call) {
  pybind11::gil_scoped_release guard;
  return call();
}

}  // namespace offload::bind
