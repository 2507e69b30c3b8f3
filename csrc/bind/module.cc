// offload._native: the only place that knows Python.
#include <pybind11/pybind11.h>

#include "bind/bindings.h"

PYBIND11_MODULE(_native, module) {
  module.doc() = "The native core of offload: memory, devices, swap files and update pipelines.";
  offload::bind::bind_device(module);
  offload::bind::bind_device_memory(module);
  offload::bind::bind_disk(module);
  offload::bind::bind_memory(module);
  offload::bind::bind_optim(module);
  offload::bind::bind_kernels(module);
  offload::bind::bind_store(module);
  offload::bind::bind_device_transfer(module);
  offload::bind::bind_update(module);
  offload::bind::bind_adafactor(module);
}
