// offload._native: the only place that knows Python.
//
// Nothing here takes the GIL on a native thread; every call that can wait releases it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <vector>

#include "base/crc32c.h"
#include "bind/errors.h"
#include "io/probe.h"
#include "mem/host_arena.h"
#include "optim/adamw.h"
#include "optim/aten_rounding.h"
#include "optim/isa.h"
#include "store/swap_store.h"
#include "stream/transfer.h"
#include "stream/update_pipeline.h"

namespace py = pybind11;

namespace offload::bind {
namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;

EngineKind engine_kind(const std::string& name) {
  if (name == "auto") return EngineKind::kAuto;
  if (name == "io_uring") return EngineKind::kUring;
  if (name == "threads") return EngineKind::kThreads;
  raise(Status::error(Code::kInvalid,
                      "I/O engine '" + name + "' is none of: auto, io_uring, threads"));
}

constexpr SqrtRule kSqrtRules[] = {SqrtRule::kIeee, SqrtRule::kRsqrt, SqrtRule::kRsqrtFma,
                                   SqrtRule::kRsqrt14Fma};

SqrtRule sqrt_rule(const std::string& name) {
  for (const SqrtRule rule : kSqrtRules) {
    if (name == sqrt_rule_name(rule)) return rule;
  }
  raise(Status::error(Code::kInvalid, "there is no square root rule '" + name + "'"));
}

constexpr Isa kIsas[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kNeon};

Isa available_isa(const std::string& name) {
  for (const Isa isa : kIsas) {
    if (name == isa_name(isa) && isa_available(isa)) return isa;
  }
  raise(Status::error(Code::kUnsupported, "no kernels for '" + name + "' on this CPU"));
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

template <typename F>
auto unlocked(F&& call) {
  py::gil_scoped_release guard;
  return call();
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

void bind_update(py::module_& m) {
  py::class_<AtenRounding>(m, "AtenRounding")
      .def(py::init([](bool fma, const std::string& sqrt) {
             return AtenRounding{fma, sqrt_rule(sqrt)};
           }),
           py::arg("fma"), py::arg("sqrt"))
      .def_readonly("fma", &AtenRounding::fma)
      .def_property_readonly(
          "sqrt", [](const AtenRounding& rounding) { return sqrt_rule_name(rounding.sqrt); });
  py::class_<AdamWHyper>(m, "AdamWHyper")
      .def(py::init([](double lr, double beta1, double beta2, double eps, double weight_decay,
                       double step, bool maximize, const AtenRounding& rounding) {
             return AdamWHyper{lr, beta1, beta2, eps, weight_decay, step, maximize, rounding};
           }),
           py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
           py::arg("weight_decay"), py::arg("step"), py::arg("maximize"), py::arg("rounding"));
  py::class_<UpdateOperand>(m, "UpdateOperand")
      .def_static(
          "in_memory",
          [](std::shared_ptr<Lease> lease, std::uint64_t nbytes) {
            return UpdateOperand{std::move(lease), kNoObject, nbytes};
          },
          py::arg("lease"), py::arg("nbytes"))
      .def_static(
          "on_disk",
          [](ObjectId object, std::uint64_t nbytes) {
            return UpdateOperand{nullptr, object, nbytes};
          },
          py::arg("object"), py::arg("nbytes"));
  py::class_<UpdateSegment>(m, "UpdateSegment")
      .def(py::init([](std::uint64_t begin, std::uint64_t end, const AdamWHyper& hyper,
                       std::vector<float> factors) {
             return UpdateSegment{begin, end, hyper, std::move(factors)};
           }),
           py::arg("begin"), py::arg("end"), py::arg("hyper"), py::arg("factors"))
      .def_readonly("begin", &UpdateSegment::begin);
  py::class_<UpdatePipeline, std::shared_ptr<UpdatePipeline>>(m, "UpdatePipeline")
      .def(py::init([](std::shared_ptr<SwapStore> store, const std::shared_ptr<HostArena>& arena,
                       unsigned staging_sets, unsigned threads) {
             return take(UpdatePipeline::create(std::move(store), arena, {staging_sets, threads}));
           }),
           py::arg("store").none(true), py::arg("arena"), py::arg("staging_sets"),
           py::arg("threads"))
      .def_property_readonly_static(
          "staging_set_bytes", [](const py::object&) { return UpdatePipeline::kStagingSetBytes; })
      .def(
          "submit",
          [](UpdatePipeline& pipeline, std::uint64_t numel, const UpdateOperand& param,
             const UpdateOperand& grad, const UpdateOperand& exp_avg,
             const UpdateOperand& exp_avg_sq, std::vector<UpdateSegment> segments) {
            UpdateJob job{numel, param, grad, exp_avg, exp_avg_sq, std::move(segments)};
            return take(unlocked([&] { return pipeline.submit(std::move(job)); }));
          },
          py::arg("numel"), py::arg("param"), py::arg("grad"), py::arg("exp_avg"),
          py::arg("exp_avg_sq"), py::arg("segments"))
      .def("stats",
           [](const UpdatePipeline& pipeline) {
             const UpdatePipeline::Stats stats = pipeline.stats();
             py::dict d;
             d["jobs"] = stats.jobs;
             d["chunks"] = stats.chunks;
             d["update_seconds"] = static_cast<double>(stats.update_ns) * 1e-9;
             return d;
           })
      .def("close",
           [](UpdatePipeline& pipeline) { check(unlocked([&] { return pipeline.close(); })); });
  m.def(
      "adamw_update",
      [](const AdamWHyper& hyper, const std::vector<float>& factors, std::uintptr_t param,
         std::uintptr_t grad, std::uintptr_t exp_avg, std::uintptr_t exp_avg_sq, std::size_t n,
         const std::string& isa) {
        const Isa chosen = available_isa(isa);
        if (!sqrt_rule_available(chosen, hyper.rounding.sqrt)) {
          raise(Status::error(Code::kUnsupported, "the kernels for '" + isa +
                                                      "' cannot take square roots by rule '" +
                                                      sqrt_rule_name(hyper.rounding.sqrt) + "'"));
        }
        py::gil_scoped_release guard;
        auto* p = reinterpret_cast<float*>(param);
        auto* m1 = reinterpret_cast<float*>(exp_avg);
        auto* m2 = reinterpret_cast<float*>(exp_avg_sq);
        adamw_update_isa(chosen, hyper, {factors.data(), factors.size()}, p,
                         reinterpret_cast<const float*>(grad), m1, m2, p, m1, m2, n);
      },
      py::arg("hyper"), py::arg("factors"), py::arg("param"), py::arg("grad"), py::arg("exp_avg"),
      py::arg("exp_avg_sq"), py::arg("n"), py::arg("isa"),
      "One in-place AdamW step on n fp32 elements at the given addresses.");
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Isa isa : kIsas) {
      if (isa_available(isa)) names.emplace_back(isa_name(isa));
    }
    return names;
  });
  m.def("sqrt_rules", [](const std::string& isa) {
    std::vector<std::string> names;
    for (const SqrtRule rule : kSqrtRules) {
      if (sqrt_rule_available(available_isa(isa), rule)) names.emplace_back(sqrt_rule_name(rule));
    }
    return names;
  });
  m.def("best_isa", [] { return std::string(isa_name(best_isa())); });
}

}  // namespace
}  // namespace offload::bind

PYBIND11_MODULE(_native, module) {
  module.doc() = "The native core of offload: memory, swap files and update pipelines.";
  offload::bind::bind_memory(module);
  offload::bind::bind_store(module);
  offload::bind::bind_update(module);
}
