// Devices: Device (simulated or CUDA) and Event.
#include "device/device.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "bind/bindings.h"
#include "bind/device_names.h"
#include "bind/errors.h"
#include "bind/keep_alive.h"
#include "bind/waiting.h"
#include "device/cuda_device.h"
#include "device/device_arena.h"
#include "device/simulated_device.h"
#include "mem/host_memory.h"

namespace py = pybind11;

namespace offload::bind {
namespace {

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

void synchronize(Device& device, const Event& event) {
  until([&] { return device.wait_for(event, kLookMs, Waiter::kCaller); });
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

}  // namespace

void bind_device(py::module_& m) {
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

}  // namespace offload::bind
