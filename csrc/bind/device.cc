// Devices: Device (simulated or CUDA), Event, DeviceArena, DeviceLease, DeviceView.
#include "device/device.h"

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
#include "device/cuda_device.h"
#include "device/device_arena.h"
#include "device/device_loan.h"
#include "device/simulated_device.h"
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

Status check_copy(const DeviceLease& device, std::uint64_t device_offset, const Lease& host,
                  std::uint64_t host_offset, std::uint64_t nbytes) {
  const auto fits = [&](std::uint64_t offset, std::uint64_t size) {
    return nbytes <= size && offset <= size - nbytes;
  };
  if (fits(device_offset, device.nbytes()) && fits(host_offset, host.nbytes())) {
    return Status::ok();
  }
  return Status::error(Code::kInvalid,
                       "a copy of " + std::to_string(nbytes) + " bytes does not fit: " +
                           std::to_string(host.nbytes()) + " bytes on the host from " +
                           std::to_string(host_offset) + ", " + std::to_string(device.nbytes()) +
                           " on the device from " + std::to_string(device_offset));
}

// Calls `wait`, which takes milliseconds, until it says that it is over. Looks for signals (Ctrl-C)
// ten times a second.
template <typename Wait>
void until_over(const Wait& wait) {
  while (true) {
    if (take(unlocked([&] { return wait(100U); }))) return;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

void synchronize(Device& device, const Event& event) {
  until_over([&](unsigned ms) { return device.wait_for(event, ms, Waiter::kCaller); });
}

py::dict stats_dict(const Device& device) {
  const Device::Stats stats = device.stats();
  py::dict d;
  d["h2d_bytes"] = stats.h2d_bytes;
  d["d2h_bytes"] = stats.d2h_bytes;
  d["d2d_bytes"] = stats.d2d_bytes;
  d["copies"] = stats.copies;
  d["events"] = stats.events;
  d["host_waits"] = stats.host_waits;
  d["waits"] =
      py::cast(std::map<std::string, std::uint64_t>(stats.waits.begin(), stats.waits.end()));
  d["conflicts"] = device.conflicts();
  return d;
}

py::dict host_access_dict(const Device::HostAccess& access) {
  py::dict d;
  d["integrated"] = access.integrated;
  d["same_address"] = access.same_address;
  d["pageable"] = access.pageable;
  d["by_host_tables"] = access.by_host_tables;
  d["unified"] = access.unified();
  return d;
}

SimulatedDeviceOptions::Pace pace_of(const std::string& name) {
  using Pace = SimulatedDeviceOptions::Pace;
  if (name == "timed") return Pace::kTimed;
  if (name == "earliest") return Pace::kEarliest;
  if (name == "latest") return Pace::kLatest;
  raise(Status::error(Code::kInvalid, "pace '" + name + "' is none of: timed, earliest, latest"));
}

void bind_devices(py::module_& m) {
  py::class_<BoundEvent>(m, "Event").def_property_readonly("stream", [](const BoundEvent& event) {
    return stream_name(event.event->stream());
  });
  py::class_<Device, std::shared_ptr<Device>>(m, "Device")
      .def_property_readonly("name", &Device::name)
      .def_property_readonly("computes_on_host", &Device::computes_on_host)
      .def_property_readonly(
          "host_access",
          [](const Device& device) { return host_access_dict(device.host_access()); })
      .def("memory_info",
           [](Device& device) {
             const Device::MemoryInfo info = take(unlocked([&] { return device.memory_info(); }));
             return std::make_pair(info.free, info.total);
           })
      .def(
          "copy_to_device",
          [](Device& device, DeviceLease& dst, const Lease& src, std::uint64_t nbytes,
             std::uint64_t dst_offset, std::uint64_t src_offset, const std::string& stream) {
            check(check_copy(dst, dst_offset, src, src_offset, nbytes));
            const StreamId id = stream_of(stream);
            check(unlocked([&] {
              OFFLOAD_RETURN_IF_ERROR(dst.acquire(id));
              return device.copy_h2d(dst.data() + dst_offset, src.data() + src_offset, nbytes, id,
                                     dst.label());
            }));
          },
          py::arg("dst"), py::arg("src"), py::arg("nbytes"), py::kw_only(),
          py::arg("dst_offset") = 0, py::arg("src_offset") = 0, py::arg("stream") = "h2d")
      .def(
          "copy_to_host",
          [](Device& device, const Lease& dst, DeviceLease& src, std::uint64_t nbytes,
             std::uint64_t dst_offset, std::uint64_t src_offset, const std::string& stream) {
            check(check_copy(src, src_offset, dst, dst_offset, nbytes));
            const StreamId id = stream_of(stream);
            check(unlocked([&] {
              return device.copy_d2h(dst.data() + dst_offset, src.data() + src_offset, nbytes, id,
                                     src.label());
            }));
          },
          py::arg("dst"), py::arg("src"), py::arg("nbytes"), py::kw_only(),
          py::arg("dst_offset") = 0, py::arg("src_offset") = 0, py::arg("stream") = "d2h")
      .def(
          "fill",
          [](Device& device, DeviceLease& dst, std::uint8_t value, const std::string& stream) {
            const StreamId id = stream_of(stream);
            check(unlocked([&] {
              OFFLOAD_RETURN_IF_ERROR(dst.acquire(id));
              return device.fill(dst.data(), value, dst.nbytes(), id, dst.label());
            }));
          },
          py::arg("dst"), py::arg("value"), py::arg("stream") = "compute")
      .def(
          "record",
          [](const std::shared_ptr<Device>& device, const std::string& stream) {
            const StreamId id = stream_of(stream);
            return BoundEvent{take(unlocked([&] { return device->record(id); }))};
          },
          py::arg("stream"))
      .def(
          "wait",
          [](Device& device, const std::string& stream, const BoundEvent& event,
             const std::string& why) {
            const StreamId id = stream_of(stream);
            check(unlocked([&] { return device.wait(id, event.event, why); }));
          },
          py::arg("stream"), py::arg("event"), py::arg("why"))
      .def(
          "query",
          [](Device& device, const BoundEvent& event) {
            return take(unlocked([&] { return device.query(event.event); }));
          },
          py::arg("event"))
      .def(
          "synchronize",
          [](Device& device, const BoundEvent& event) { synchronize(device, event.event); },
          py::arg("event"))
      .def("drain",
           [](Device& device) {
             const Status drained = unlocked([&] { return device.drain(); });
             release_dropped();
             check(drained);
           })
      .def(
          "use_host",
          [](Device& device, const Lease& lease, const std::string& access,
             const std::string& label) {
            check(device.use_host({lease.data(), lease.nbytes(), access_of(access)}, label));
          },
          py::arg("lease"), py::arg("access"), py::arg("label") = "")
      .def(
          "set_compute_stream",
          [](Device& device, std::uintptr_t handle) { check(device.set_compute_stream(handle)); },
          py::arg("handle"))
      .def_property_readonly("compute_stream", &Device::compute_stream)
      .def("omit_waits", &Device::omit_waits, py::arg("why"))
      .def("stats", &stats_dict);
  m.def(
      "simulated_device",
      [](std::uint64_t memory_bytes, const std::string& pace, double delay_s, double bytes_per_s,
         bool checks, bool unified) {
        return take(make_simulated_device({.memory_bytes = memory_bytes,
                                           .pace = pace_of(pace),
                                           .delay_s = delay_s,
                                           .bytes_per_s = bytes_per_s,
                                           .check = checks,
                                           .unified = unified}));
      },
      py::arg("memory_bytes"), py::kw_only(), py::arg("pace") = "timed", py::arg("delay_s") = 0.0,
      py::arg("bytes_per_s") = 0.0, py::arg("check") = true, py::arg("unified") = false);
  m.def(
      "cuda_host_access",
      [](int index) {
        return host_access_dict(take(unlocked([&] { return cuda_host_access(index); })));
      },
      py::arg("index"));
  m.attr("has_cuda") = cuda_devices_in_this_build();
  m.def(
      "cuda_device",
      [](int index, bool checks) {
        return take(unlocked([&] { return make_cuda_device(index, checks); }));
      },
      py::arg("index") = 0, py::kw_only(), py::arg("check") = false);
}

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
           [](DeviceLease& lease) {
             until_over([&](unsigned ms) { return lease.wait_for_uses(ms); });
           })
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

}  // namespace

void bind_device(py::module_& m) {
  bind_devices(m);
  bind_device_memory(m);
}

}  // namespace offload::bind
