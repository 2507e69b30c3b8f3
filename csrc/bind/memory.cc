// Memory: HostArena (the stack of make_host_memory) and Lease.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "base/crc32c.h"
#include "bind/bindings.h"
#include "bind/errors.h"
#include "device/device.h"
#include "mem/cuda_registrar.h"
#include "mem/make_host_memory.h"

namespace py = pybind11;

namespace offload::bind {
namespace {

using Devices = std::vector<std::shared_ptr<Device>>;
using Pin = std::optional<std::variant<std::shared_ptr<Device>, Devices, std::string>>;

Devices devices_of(const Pin& pin) {
  if (!pin.has_value()) return {};
  if (const auto* device = std::get_if<std::shared_ptr<Device>>(&*pin)) return {*device};
  const auto* devices = std::get_if<Devices>(&*pin);
  return devices != nullptr ? *devices : Devices{};
}

std::shared_ptr<MemoryRegistrar> registrar_for(const Pin& pin) {
  const Devices devices = devices_of(pin);
  if (!devices.empty()) return Device::registrar_of(devices);
  const auto* name = pin.has_value() ? std::get_if<std::string>(&*pin) : nullptr;
  if (name == nullptr) return nullptr;
  if (*name == "cuda") return take(CudaRegistrar::create());
  raise(Status::error(Code::kInvalid, "pin must be None, Devices or 'cuda', not '" + *name + "'"));
}

}  // namespace

void bind_memory(py::module_& m) {
  py::class_<Lease, std::shared_ptr<Lease>>(m, "Lease", py::buffer_protocol())
      .def_property_readonly("nbytes", &Lease::nbytes)
      .def_property_readonly(
          "address",
          [](const Lease& lease) { return reinterpret_cast<std::uintptr_t>(lease.data()); })
      .def_buffer([](Lease& lease) {
        return py::buffer_info(reinterpret_cast<std::uint8_t*>(lease.data()),
                               static_cast<py::ssize_t>(lease.nbytes()));
      });
  m.def(
      "crc32c",
      [](const Lease& lease, std::uint64_t nbytes) {
        if (nbytes > lease.nbytes()) {
          raise(Status::error(Code::kInvalid, "crc32c: the lease is shorter"));
        }
        return unlocked([&] { return crc32c(lease.data(), nbytes); });
      },
      py::arg("lease"), py::arg("nbytes"), "CRC32C of the first `nbytes` of a lease.");
  m.def(
      "crc32c_at",
      [](std::uintptr_t address, std::uint64_t nbytes, std::uint32_t before) {
        return unlocked(
            [&] { return crc32c(reinterpret_cast<const void*>(address), nbytes, before); });
      },
      py::arg("address"), py::arg("nbytes"), py::arg("before") = 0,
      "CRC32C of `nbytes` at `address`, after others whose CRC32C is `before`.");
  py::class_<HostMemory, std::shared_ptr<HostMemory>>(m, "HostArena")
      .def(py::init([](std::uint64_t budget, bool poison, const Pin& pin) {
             HostMemoryOptions options;
             options.poison = poison;
             options.arena.registrar = registrar_for(pin);
             std::shared_ptr<HostMemory> memory = take(make_host_memory(budget, options));
             for (const std::shared_ptr<Device>& device : devices_of(pin)) {
               device->add_host_memory(memory);
             }
             return memory;
           }),
           py::arg("budget"), py::arg("poison") = false, py::arg("pin") = py::none())
      .def(
          "try_allocate",
          [](HostMemory& memory, std::uint64_t nbytes) -> std::shared_ptr<Lease> {
            Result<Lease> lease = unlocked([&] { return memory.allocate(nbytes); });
            if (lease.is_ok()) return std::make_shared<Lease>(lease.take());
            if (lease.status().code() == Code::kBudget) return nullptr;
            raise(lease.status());
          },
          py::arg("nbytes"), "A lease, or None when the budget has no room for it.")
      .def(
          "allocate",
          [](HostMemory& memory, std::uint64_t nbytes) {
            return std::make_shared<Lease>(take(unlocked([&] { return memory.allocate(nbytes); })));
          },
          py::arg("nbytes"))
      .def("usage",
           [](const HostMemory& memory) {
             const HostMemory::Usage usage = memory.usage();
             py::dict d;
             d["budget"] = usage.budget;
             d["in_use"] = usage.in_use;
             d["peak"] = usage.peak;
             d["allocations"] = usage.allocations;
             d["committed"] = usage.committed;
             d["largest_free"] = usage.largest_free;
             return d;
           })
      .def_property_readonly("note", [](const HostMemory& memory) { return memory.note(); });
}

}  // namespace offload::bind
