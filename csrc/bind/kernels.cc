// The device kernels, on memory given by address: launched on the device, or the same code run on
// the CPU where the device computes on the host.
#include "kernels/kernels.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/bindings.h"
#include "bind/errors.h"
#include "bind/formats.h"
#include "device/device.h"
#include "stream/update_job.h"

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

// Whether the device has kernels for all of it.
bool has_device_update(const Device& device, const UpdateFormat& format,
                       const std::vector<UpdateSegment>& segments) {
  return std::all_of(segments.begin(), segments.end(), [&](const UpdateSegment& segment) {
    return kernels::check_adam(segment.hyper, format, segment.factors.size()).is_ok() &&
           (device.computes_on_host() || kernels::can_launch_adam(segment.hyper, format));
  });
}

// Addresses are of the unit's element 0.
struct UnitArrays {
  std::uintptr_t param;
  std::uintptr_t grad;
  std::uintptr_t master;
  std::vector<std::uintptr_t> states;
  std::vector<std::uintptr_t> scales;
};

UpdateArrays arrays_of(const UnitArrays& unit, const UpdateFormat& format,
                       const UpdateSegment& segment, std::vector<Access>& accesses) {
  const std::size_t n = segment.end - segment.begin;
  const auto part = [&](std::uintptr_t address, std::size_t width, AccessKind kind) {
    std::byte* const data = at(address) + segment.begin * width;
    accesses.push_back({data, n * width, kind});
    return data;
  };
  const std::size_t element = element_bytes(format.param);
  UpdateArrays arrays;
  arrays.n = n;
  arrays.grad = part(unit.grad, element, AccessKind::kRead);
  arrays.param = arrays.param_out = part(unit.param, element, AccessKind::kWrite);
  if (format.has_master()) {
    arrays.master = arrays.master_out =
        reinterpret_cast<float*>(part(unit.master, sizeof(float), AccessKind::kWrite));
  }
  for (std::size_t k = 0; k < unit.states.size(); ++k) {
    arrays.state[k] = arrays.state_out[k] =
        part(unit.states[k], element_bytes(format.state), AccessKind::kWrite);
  }
  for (std::size_t k = 0; k < unit.scales.size(); ++k) {
    auto* const scales = reinterpret_cast<float*>(unit.scales[k]) + segment.begin / kQuantBlock;
    arrays.scale[k] = arrays.scale_out[k] = scales;
    accesses.push_back({reinterpret_cast<std::byte*>(scales),
                        (n + kQuantBlock - 1) / kQuantBlock * sizeof(float), AccessKind::kWrite});
  }
  return arrays;
}

void device_update(Device& device, const UpdateFormat& format,
                   const std::vector<UpdateSegment>& segments, std::uintptr_t param,
                   std::uintptr_t grad, std::uintptr_t master, std::vector<std::uintptr_t> states,
                   std::vector<std::uintptr_t> scales, const std::string& label) {
  check_arrays(format, master, states.size(), scales.size());
  const UnitArrays unit{param, grad, master, std::move(states), std::move(scales)};
  std::vector<kernels::AdamTask> tasks;
  std::vector<Access> accesses;
  for (const UpdateSegment& segment : segments) {
    if (segment.end < segment.begin ||
        (format.state == StateFormat::kInt8 && segment.begin % kQuantBlock != 0)) {
      raise(Status::error(Code::kInvalid,
                          "a segment of an update ends before it begins, or has "
                          "8-bit states and begins inside of a block"));
    }
    tasks.push_back(take(kernels::make_adam_task(segment.hyper, format,
                                                 {segment.factors.data(), segment.factors.size()},
                                                 arrays_of(unit, format, segment, accesses))));
  }
  check(unlocked([&] {
    return device.launch(StreamId::kCompute, accesses, "update", label, [&](std::uintptr_t stream) {
      for (const kernels::AdamTask& task : tasks) {
        if (device.computes_on_host()) {
          kernels::run_adam(task, format.state);
        } else {
          OFFLOAD_RETURN_IF_ERROR(kernels::launch_adam(task, format.state, stream));
        }
      }
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
  m.def("has_device_update", &has_device_update, py::arg("device"), py::arg("format"),
        py::arg("segments"));
  m.def("device_update", &device_update, py::arg("device"), py::arg("format"), py::arg("segments"),
        py::arg("param"), py::arg("grad"), py::arg("master"), py::arg("states"), py::arg("scales"),
        py::arg("label") = "");
  m.def("device_gather", &device_gather, py::arg("device"), py::arg("tensors"), py::kw_only(),
        py::arg("from_type"), py::arg("to_type"), py::arg("scale") = 1.0f, py::arg("add") = false,
        py::arg("slab"), py::arg("partial"), py::arg("sum_squares"), py::arg("nonfinite"),
        py::arg("label") = "");
  m.attr("gather_chunk") = kernels::kChunk;
  m.attr("gather_tensors") = kernels::kMaxGatherTensors;
}

}  // namespace offload::bind
