// Transfers between disk, host memory and a device: DeviceTransfers and DeviceTransfer.
#include "stream/device_transfer.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "bind/bindings.h"
#include "bind/device_names.h"
#include "bind/errors.h"
#include "bind/keep_alive.h"
#include "bind/waiting.h"

namespace py = pybind11;

namespace offload::bind {
namespace {

void wait_stream(DeviceTransfer& transfer, const std::string& stream) {
  const StreamId id = stream_of(stream);
  until([&] { return transfer.wait_until_issued(kLookMs); });
  release_dropped();
  check(unlocked([&] { return transfer.make_wait(id); }));
}

void wait(DeviceTransfer& transfer) {
  Status failed;
  until([&] {
    const Result<bool> done = transfer.wait_for(kLookMs);
    failed = done.status();
    return !done.is_ok() || done.value();
  });
  release_dropped();
  check(failed);
  check(transfer.status());
}

DiskEnd disk_end(const std::shared_ptr<SwapStore>& store, ObjectId object, bool demand) {
  if ((store == nullptr) != (object == kNoObject)) {
    raise(Status::error(Code::kInvalid, "a transfer needs both a store and an object, or neither"));
  }
  return {store, object, demand ? IoPriority::kDemand : IoPriority::kBackground};
}

}  // namespace

void bind_device_transfer(py::module_& m) {
  py::class_<DeviceTransfer, std::shared_ptr<DeviceTransfer>>(m, "DeviceTransfer")
      .def("issued", &DeviceTransfer::issued)
      .def("wait_stream", &wait_stream, py::arg("stream") = "compute")
      .def("done", &DeviceTransfer::done)
      .def("wait", &wait)
      .def("cancel", &DeviceTransfer::cancel);
  py::class_<DeviceCompletions, std::shared_ptr<DeviceCompletions>>(m, "DeviceTransfers")
      .def(py::init([](std::shared_ptr<Device> device) {
             return take(DeviceCompletions::create(std::move(device)));
           }),
           py::arg("device"))
      .def(
          "fetch",
          [](const DeviceCompletions& completions, std::shared_ptr<DeviceSpan> dst,
             std::shared_ptr<Lease> via, std::uint64_t nbytes,
             const std::shared_ptr<SwapStore>& store, ObjectId object, bool demand) {
            const DiskEnd disk = disk_end(store, object, demand);
            return take(unlocked([&] {
              return DeviceTransfer::fetch(completions.events(), disk, std::move(via),
                                           std::move(dst), nbytes);
            }));
          },
          py::arg("dst"), py::arg("via"), py::arg("nbytes"), py::kw_only(),
          py::arg("store") = py::none(), py::arg("object") = kNoObject, py::arg("demand") = false)
      .def(
          "spill",
          [](const DeviceCompletions& completions, std::shared_ptr<DeviceSpan> src,
             std::shared_ptr<Lease> via, std::uint64_t nbytes,
             const std::optional<BoundEvent>& after, const std::shared_ptr<SwapStore>& store,
             ObjectId object, bool demand) {
            const DiskEnd disk = disk_end(store, object, demand);
            const Event event = after.has_value() ? after->event : nullptr;
            return take(unlocked([&] {
              return DeviceTransfer::spill(completions.events(), disk, std::move(via),
                                           std::move(src), nbytes, event);
            }));
          },
          py::arg("src"), py::arg("via"), py::arg("nbytes"), py::kw_only(),
          py::arg("after") = py::none(), py::arg("store") = py::none(),
          py::arg("object") = kNoObject, py::arg("demand") = false)
      .def("stats", [](const DeviceCompletions& completions) {
        const DeviceEvents::Stats stats = completions.events()->stats();
        py::dict d;
        d["stalls"] = stats.stalls;
        d["stall_seconds"] = static_cast<double>(stats.stall_ns) * 1e-9;
        return d;
      });
}

}  // namespace offload::bind
