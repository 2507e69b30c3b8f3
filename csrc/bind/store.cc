// Swap files and transfers: SwapStore and Transfer.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>

#include "bind/bindings.h"
#include "bind/errors.h"
#include "io/probe.h"
#include "mem/host_arena.h"
#include "store/swap_store.h"
#include "stream/transfer.h"

namespace py = pybind11;

namespace offload::bind {
namespace {

EngineKind engine_kind(const std::string& name) {
  if (name == "auto") return EngineKind::kAuto;
  if (name == "io_uring") return EngineKind::kUring;
  if (name == "threads") return EngineKind::kThreads;
  raise(Status::error(Code::kInvalid,
                      "I/O engine '" + name + "' is none of: auto, io_uring, threads"));
}

// Waits with the GIL released, and looks for signals (Ctrl-C) ten times a second.
void wait(Transfer& transfer) {
  while (true) {
    bool done = false;
    {
      py::gil_scoped_release unlocked;
      done = transfer.wait_for(100);
    }
    if (done) break;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
  check(transfer.wait());
}

py::dict counters_dict(const SwapStore::Stats& stats) {
  py::dict d;
  d["bytes_read"] = stats.io.bytes_read;
  d["bytes_written"] = stats.io.bytes_written;
  d["requests"] = stats.io.requests;
  d["continued"] = stats.io.continued;
  d["retried"] = stats.io.retried;
  d["failed"] = stats.io.failed;
  d["busy_seconds"] = static_cast<double>(stats.io.busy_ns) * 1e-9;
  d["reserved_bytes"] = stats.slots * SwapStore::kBlockBytes;
  d["free_bytes"] = stats.free_slots * SwapStore::kBlockBytes;
  d["objects"] = stats.objects;
  return d;
}

}  // namespace

void bind_store(py::module_& m) {
  py::class_<Transfer, std::shared_ptr<Transfer>>(m, "Transfer")
      .def("done", &Transfer::done)
      .def("wait", &wait, "Block until done; raises the transfer's error.");
  py::class_<SwapStore, std::shared_ptr<SwapStore>>(m, "SwapStore")
      .def(py::init([](const std::string& dir, const std::string& engine, unsigned queue_depth,
                       unsigned threads) {
             SwapStore::Options options;
             options.dir = dir;
             options.engine = engine_kind(engine);
             options.io.queue_depth = queue_depth;
             options.io.threads = threads;
             return take(SwapStore::open(options));
           }),
           py::arg("dir"), py::arg("engine") = "auto", py::arg("queue_depth") = 16,
           py::arg("threads") = 4)
      .def_property_readonly_static("block_bytes",
                                    [](const py::object&) { return SwapStore::kBlockBytes; })
      .def_static("footprint", &SwapStore::footprint, py::arg("nbytes"))
      .def(
          "reserve",
          [](SwapStore& store, std::uint64_t nbytes, std::uint64_t spare) {
            check(unlocked([&] { return store.reserve(nbytes, spare); }));
          },
          py::arg("nbytes"), py::arg("spare"))
      .def(
          "create",
          [](SwapStore& store, std::uint64_t nbytes) { return take(store.create(nbytes)); },
          py::arg("nbytes"))
      .def(
          "remove", [](SwapStore& store, ObjectId object) { check(store.remove(object)); },
          py::arg("object"))
      .def(
          "written",
          [](SwapStore& store, ObjectId object, std::uint64_t offset) {
            return take(store.written(object, offset));
          },
          py::arg("object"), py::arg("offset"))
      .def(
          "write",
          [](SwapStore& store, ObjectId object, const std::shared_ptr<Lease>& lease,
             std::uint64_t nbytes, bool demand) {
            const IoPriority priority = demand ? IoPriority::kDemand : IoPriority::kBackground;
            return take(
                unlocked([&] { return Transfer::write(store, object, lease, nbytes, priority); }));
          },
          py::arg("object"), py::arg("lease"), py::arg("nbytes"), py::arg("demand") = false)
      .def(
          "read",
          [](SwapStore& store, ObjectId object, const std::shared_ptr<Lease>& lease,
             std::uint64_t nbytes, bool demand) {
            const IoPriority priority = demand ? IoPriority::kDemand : IoPriority::kBackground;
            return take(
                unlocked([&] { return Transfer::read(store, object, lease, nbytes, priority); }));
          },
          py::arg("object"), py::arg("lease"), py::arg("nbytes"), py::arg("demand") = false)
      .def("stats", [](const SwapStore& store) { return counters_dict(store.stats()); })
      .def_property_readonly("engine", &SwapStore::engine_name)
      .def_property_readonly("engine_reason", &SwapStore::engine_reason)
      .def_property_readonly("direct", [](const SwapStore& store) { return store.file().direct; })
      .def_property_readonly("in_memory",
                             [](const SwapStore& store) { return store.file().in_memory; })
      .def_property_readonly("note", [](const SwapStore& store) { return store.file().note; })
      .def("close", [](SwapStore& store) { check(unlocked([&] { return store.close(); })); });
}

}  // namespace offload::bind
