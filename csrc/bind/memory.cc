// Memory: HostArena and Lease.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>

#include "bind/bindings.h"
#include "bind/errors.h"
#include "mem/host_arena.h"

namespace py = pybind11;

namespace offload::bind {

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
  py::class_<HostArena, std::shared_ptr<HostArena>>(m, "HostArena")
      .def(py::init([](std::uint64_t budget, bool poison) {
             return take(HostArena::create(budget, poison));
           }),
           py::arg("budget"), py::arg("poison") = false)
      .def(
          "try_allocate",
          [](HostArena& arena, std::uint64_t nbytes) -> std::shared_ptr<Lease> {
            Result<Lease> lease = arena.allocate(nbytes);
            if (lease.is_ok()) return std::make_shared<Lease>(lease.take());
            if (lease.status().code() == Code::kBudget) return nullptr;
            raise(lease.status());
          },
          py::arg("nbytes"), "A lease, or None when the budget has no room for it.")
      .def(
          "allocate",
          [](HostArena& arena, std::uint64_t nbytes) {
            return std::make_shared<Lease>(take(arena.allocate(nbytes)));
          },
          py::arg("nbytes"))
      .def("usage", [](const HostArena& arena) {
        const HostArena::Usage usage = arena.usage();
        py::dict d;
        d["budget"] = usage.budget;
        d["in_use"] = usage.in_use;
        d["peak"] = usage.peak;
        d["committed"] = usage.committed;
        d["largest_free"] = usage.largest_free;
        return d;
      });
}

}  // namespace offload::bind
