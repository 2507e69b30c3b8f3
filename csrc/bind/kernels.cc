// The device kernels, on memory given by address: launched on the device, or the same code run on
// the CPU where the device computes on the host.
#include "kernels/kernels.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "bind/bindings.h"
#include "bind/errors.h"
#include "bind/formats.h"
#include "device/device.h"

namespace py = pybind11;

namespace offload::bind {
namespace {

std::byte* at(std::uintptr_t address) {
  return reinterpret_cast<std::byte*>(address);
}

void check_arrays(const UpdateFormat& format, std::uintptr_t master, std::size_t states,
                  std::size_t scales) {
  const std::size_t need = format.state == StateFormat::kInt8 ? 2 : 0;
  if (states != 2 || scales != need || format.has_master() != (master != 0)) {
    raise(Status::error(Code::kInvalid, "the update needs 2 states, " + std::to_string(need) +
                                            " arrays of scales and, with a 16-bit parameter "
                                            "only, an fp32 master"));
  }
}

void device_update(Device& device, const RuleHyper& hyper, const UpdateFormat& format,
                   const std::vector<float>& factors, std::uintptr_t param, std::uintptr_t grad,
                   std::uintptr_t master, const std::vector<std::uintptr_t>& states,
                   const std::vector<std::uintptr_t>& scales, std::size_t n,
                   const std::string& label) {
  check_arrays(format, master, states.size(), scales.size());
  const std::size_t element = element_bytes(format.param);
  UpdateArrays arrays;
  arrays.n = n;
  arrays.param = arrays.param_out = at(param);
  arrays.master = arrays.master_out = reinterpret_cast<float*>(master);
  arrays.grad = at(grad);
  std::vector<Access> accesses = {{at(grad), n * element, AccessKind::kRead},
                                  {at(param), n * element, AccessKind::kWrite}};
  if (master != 0) accesses.push_back({at(master), n * sizeof(float), AccessKind::kWrite});
  for (std::size_t k = 0; k < states.size(); ++k) {
    arrays.state[k] = arrays.state_out[k] = at(states[k]);
    accesses.push_back({at(states[k]), n * element_bytes(format.state), AccessKind::kWrite});
    if (k >= scales.size()) continue;
    arrays.scale[k] = arrays.scale_out[k] = reinterpret_cast<float*>(scales[k]);
    const std::size_t blocks = (n + kQuantBlock - 1) / kQuantBlock;
    accesses.push_back({at(scales[k]), blocks * sizeof(float), AccessKind::kWrite});
  }
  const kernels::AdamTask task =
      take(kernels::make_adam_task(hyper, format, {factors.data(), factors.size()}, arrays));
  check(unlocked([&] {
    return device.launch(StreamId::kCompute, accesses, "update", label, [&](std::uintptr_t stream) {
      if (!device.computes_on_host()) {
        return kernels::launch_adam(task, format.state, stream);
      }
      kernels::run_adam(task, format.state);
      return Status::ok();
    });
  }));
}

using Tensor = std::tuple<std::uintptr_t, std::uint64_t, std::uint64_t>;

void device_gather(Device& device, const std::vector<Tensor>& tensors, const std::string& from,
                   const std::string& to, float scale, bool add, std::uintptr_t slab,
                   std::uintptr_t partial, std::uintptr_t sum_squares, std::uintptr_t nonfinite,
                   const std::string& label) {
  if (tensors.size() > kernels::kMaxGatherTensors) {
    raise(Status::error(Code::kInvalid, "one gather takes " +
                                            std::to_string(kernels::kMaxGatherTensors) +
                                            " tensors, not " + std::to_string(tensors.size())));
  }
  kernels::GatherTask task;
  task.count = static_cast<std::uint32_t>(tensors.size());
  task.from = by_name("element type", kElementTypes, from);
  task.to = by_name("element type", kElementTypes, to);
  task.scale = scale;
  task.add = add;
  task.slab = at(slab);
  task.partial = reinterpret_cast<double*>(partial);
  task.sum_squares = reinterpret_cast<double*>(sum_squares);
  task.nonfinite = reinterpret_cast<std::uint32_t*>(nonfinite);
  std::vector<Access> accesses;
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    const auto [grad, n, offset] = tensors[t];
    task.tensors[t] = {at(grad), n, offset};
    accesses.push_back({at(grad), n * element_bytes(task.from), AccessKind::kRead});
    accesses.push_back({at(slab) + offset * element_bytes(task.to), n * element_bytes(task.to),
                        AccessKind::kWrite});
  }
  check(unlocked([&] {
    return device.launch(StreamId::kCompute, accesses, "gather", label, [&](std::uintptr_t stream) {
      return device.computes_on_host() ? kernels::run_gather(task)
                                       : kernels::launch_gather(task, stream);
    });
  }));
}

}  // namespace

void bind_kernels(py::module_& m) {
  m.def("device_update", &device_update, py::arg("device"), py::arg("hyper"), py::arg("format"),
        py::arg("factors"), py::arg("param"), py::arg("grad"), py::arg("master"), py::arg("states"),
        py::arg("scales"), py::arg("n"), py::arg("label") = "");
  m.def("device_gather", &device_gather, py::arg("device"), py::arg("tensors"), py::kw_only(),
        py::arg("from_type"), py::arg("to_type"), py::arg("scale") = 1.0f, py::arg("add") = false,
        py::arg("slab"), py::arg("partial"), py::arg("sum_squares"), py::arg("nonfinite"),
        py::arg("label") = "");
  m.attr("gather_chunk") = kernels::kChunk;
  m.attr("gather_tensors") = kernels::kMaxGatherTensors;
}

}  // namespace offload::bind
