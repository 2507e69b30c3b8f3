// A device's memory: DeviceArena, DeviceLease, DeviceLoan, DeviceView.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "bind/bindings.h"
#include "bind/device_names.h"
#include "bind/errors.h"
#include "bind/keep_alive.h"
#include "bind/waiting.h"
#include "device/device.h"
#include "device/device_arena.h"
#include "device/device_loan.h"
#include "mem/host_memory.h"

namespace py = pybind11;

namespace offload::bind {
namespace {

// The compute stream's use of a lease, for as long as tensors made from it live: it begins with a
// wait for the former owners, and at its end notes an event that the next ones will wait for.
// Tensors see `nbytes` of the lease from `offset`; the use is of all of it.
class DeviceView {
 public:
  static std::shared_ptr<DeviceView> make(std::shared_ptr<DeviceLease> lease, AccessKind kind,
                                          std::uint64_t offset,
                                          std::optional<std::uint64_t> nbytes) {
    const std::uint64_t size = lease->nbytes();
    const std::uint64_t part = nbytes.value_or(offset <= size ? size - offset : 0);
    if (part == 0 || part > size || offset > size - part) {
      raise(Status::error(Code::kInvalid, std::to_string(part) + " bytes from " +
                                              std::to_string(offset) + " are no part of " +
                                              std::to_string(size)));
    }
    check(unlocked([&] {
      OFFLOAD_RETURN_IF_ERROR(lease->acquire(StreamId::kCompute));
      return lease->use(StreamId::kCompute, kind);
    }));
    return std::shared_ptr<DeviceView>(new DeviceView(std::move(lease), kind, offset, part));
  }

  ~DeviceView() {
    Device& device = *lease_->device();
    if (!device.in_owner_process()) return;
    const Status used = lease_->use(StreamId::kCompute, kind_);
    if (!used.is_ok()) device.note_error(used);
    const Result<Event> end = device.record_compute(stream_);
    if (end.is_ok()) {
      lease_->note_use(end.value());
    } else {
      device.note_error(end.status());
    }
    lease_->close_use();  // whoever finds it closed finds the event
  }

  Device& device() const { return *lease_->device(); }
  std::byte* data() const { return lease_->data() + offset_; }
  std::uint64_t nbytes() const { return nbytes_; }

 private:
  DeviceView(std::shared_ptr<DeviceLease> lease, AccessKind kind, std::uint64_t offset,
             std::uint64_t nbytes)
      : lease_(std::move(lease)),
        kind_(kind),
        offset_(offset),
        nbytes_(nbytes),
        stream_(lease_->device()->compute_stream()) {
    lease_->open_use();
  }

  const std::shared_ptr<DeviceLease> lease_;
  const AccessKind kind_;
  const std::uint64_t offset_;
  const std::uint64_t nbytes_;
  const std::uintptr_t stream_;  // where the caller's work on it goes
};

py::dict cuda_array_interface(const DeviceView& view) {
  if (view.device().computes_on_host()) {
    throw py::attribute_error("the simulated device's memory is a buffer of the host");
  }
  py::dict d;
  d["shape"] = py::make_tuple(view.nbytes());
  d["typestr"] = "|u1";
  d["data"] = py::make_tuple(reinterpret_cast<std::uintptr_t>(view.data()), false);
  d["version"] = 3;
  d["strides"] = py::none();
  d["stream"] = py::none();  // acquire() has made the compute stream wait already
  return d;
}

}  // namespace

void bind_device_memory(py::module_& m) {
  py::class_<DeviceView, std::shared_ptr<DeviceView>>(m, "DeviceView", py::buffer_protocol())
      .def_property_readonly("nbytes", &DeviceView::nbytes)
      .def_property_readonly("__cuda_array_interface__", &cuda_array_interface)
      .def_buffer([](DeviceView& view) {
        if (!view.device().computes_on_host()) {
          throw py::buffer_error("the CPU cannot use the memory of " + view.device().name());
        }
        return py::buffer_info(reinterpret_cast<std::uint8_t*>(view.data()),
                               static_cast<py::ssize_t>(view.nbytes()));
      });
  py::class_<DeviceSpan, std::shared_ptr<DeviceSpan>>(m, "DeviceSpan");
  py::class_<DeviceLoan, DeviceSpan, std::shared_ptr<DeviceLoan>>(m, "DeviceLoan")
      .def(py::init([](std::shared_ptr<Device> device, std::uintptr_t address, std::uint64_t nbytes,
                       py::object owner, const std::string& label) {
             std::shared_ptr<void> kept = keep_alive(std::move(owner));
             return take(unlocked([&] {
               return DeviceLoan::take(std::move(device), reinterpret_cast<std::byte*>(address),
                                       nbytes, std::move(kept), label);
             }));
           }),
           py::arg("device"), py::arg("address"), py::arg("nbytes"), py::arg("owner"),
           py::arg("label") = "")
      .def(
          "use",
          [](const DeviceLoan& loan, const std::string& stream, const std::string& access) {
            check(loan.use(stream_of(stream), access_of(access)));
          },
          py::arg("stream"), py::arg("access"));
  py::class_<DeviceLease, DeviceSpan, std::shared_ptr<DeviceLease>>(m, "DeviceLease")
      .def_property_readonly("nbytes", &DeviceLease::nbytes)
      .def_property_readonly("offset", &DeviceLease::offset)
      .def_property_readonly(
          "address",
          [](const DeviceLease& lease) { return reinterpret_cast<std::uintptr_t>(lease.data()); })
      .def_property_readonly("label", &DeviceLease::label)
      .def(
          "acquire",
          [](DeviceLease& lease, const std::string& stream) {
            const StreamId id = stream_of(stream);
            check(unlocked([&] { return lease.acquire(id); }));
          },
          py::arg("stream"))
      .def(
          "note_use",
          [](DeviceLease& lease, const BoundEvent& event) { lease.note_use(event.event); },
          py::arg("event"))
      .def("wait_for_uses",
           [](DeviceLease& lease) { until([&] { return lease.wait_for_uses(kLookMs); }); })
      .def_property_readonly("is_open", &DeviceLease::is_open)
      .def("is_idle",
           [](DeviceLease& lease) {
             return !lease.is_open() && take(unlocked([&] { return lease.wait_for_uses(0); }));
           })
      .def(
          "use",
          [](const DeviceLease& lease, const std::string& stream, const std::string& access) {
            check(lease.use(stream_of(stream), access_of(access)));
          },
          py::arg("stream"), py::arg("access"))
      .def(
          "view",
          [](std::shared_ptr<DeviceLease> lease, const std::string& access, std::uint64_t offset,
             std::optional<std::uint64_t> nbytes) {
            return DeviceView::make(std::move(lease), access_of(access), offset, nbytes);
          },
          py::arg("access") = "write", py::kw_only(), py::arg("offset") = 0,
          py::arg("nbytes") = py::none());
  py::class_<DeviceArena, std::shared_ptr<DeviceArena>>(m, "DeviceArena")
      .def(py::init([](std::shared_ptr<Device> device, std::uint64_t budget, bool poison) {
             return take(
                 unlocked([&] { return DeviceArena::create(std::move(device), budget, poison); }));
           }),
           py::arg("device"), py::arg("budget"), py::arg("poison") = false)
      .def_static(
          "over",
          [](std::shared_ptr<Device> device, std::uintptr_t address, std::uint64_t nbytes,
             py::object owner, bool poison) {
            std::shared_ptr<void> kept = keep_alive(std::move(owner));
            return take(unlocked([&]() -> Result<std::shared_ptr<DeviceArena>> {
              Result<DeviceMemory> memory =
                  device->adopt(reinterpret_cast<std::byte*>(address), nbytes, std::move(kept));
              if (!memory.is_ok()) return memory.status();
              return DeviceArena::create_over(device, memory.take(), poison);
            }));
          },
          py::arg("device"), py::arg("address"), py::arg("nbytes"), py::arg("owner"),
          py::arg("poison") = false)
      .def_static(
          "over_host",
          [](std::shared_ptr<Device> device, const std::shared_ptr<HostMemory>& memory) {
            return take(unlocked([&]() -> Result<std::shared_ptr<DeviceArena>> {
              Result<DeviceMemory> adopted = device->adopt_host(memory);
              if (!adopted.is_ok()) return adopted.status();
              return DeviceArena::create_over(device, adopted.take());
            }));
          },
          py::arg("device"), py::arg("memory"))
      .def(
          "try_allocate",
          [](DeviceArena& arena, std::uint64_t nbytes,
             const std::string& label) -> std::shared_ptr<DeviceLease> {
            Result<std::shared_ptr<DeviceLease>> lease = arena.allocate(nbytes, label);
            if (lease.is_ok()) return lease.take();
            if (lease.status().code() == Code::kBudget) return nullptr;
            raise(lease.status());
          },
          py::arg("nbytes"), py::arg("label") = "")
      .def(
          "allocate",
          [](DeviceArena& arena, std::uint64_t nbytes, const std::string& label) {
            return take(arena.allocate(nbytes, label));
          },
          py::arg("nbytes"), py::arg("label") = "")
      .def(
          "try_allocate_at",
          [](DeviceArena& arena, std::uint64_t offset, std::uint64_t nbytes,
             const std::string& label) -> std::shared_ptr<DeviceLease> {
            Result<std::shared_ptr<DeviceLease>> lease = arena.allocate_at(offset, nbytes, label);
            if (lease.is_ok()) return lease.take();
            if (lease.status().code() == Code::kBudget) return nullptr;
            raise(lease.status());
          },
          py::arg("offset"), py::arg("nbytes"), py::arg("label") = "")
      .def_property_readonly("device", [](const DeviceArena& arena) { return arena.device(); })
      .def_property_readonly(
          "address",
          [](const DeviceArena& arena) { return reinterpret_cast<std::uintptr_t>(arena.base()); })
      .def("usage", [](const DeviceArena& arena) {
        const DeviceArena::Usage usage = arena.usage();
        py::dict d;
        d["budget"] = usage.budget;
        d["in_use"] = usage.in_use;
        d["peak"] = usage.peak;
        d["largest_free"] = usage.largest_free;
        d["allocations"] = usage.allocations;
        return d;
      });
}

}  // namespace offload::bind
