// Optimizer updates: UpdatePipeline, its jobs, and the kernels alone.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bind/bindings.h"
#include "bind/errors.h"
#include "mem/host_memory.h"
#include "optim/adamw.h"
#include "optim/aten_rounding.h"
#include "optim/isa.h"
#include "store/swap_store.h"
#include "stream/transfer.h"
#include "stream/update_pipeline.h"

namespace py = pybind11;

namespace offload::bind {
namespace {

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

}  // namespace

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
      .def(py::init([](std::shared_ptr<SwapStore> store, const std::shared_ptr<HostMemory>& arena,
                       unsigned staging_sets, unsigned threads) {
             return take(UpdatePipeline::create(std::move(store), arena, {staging_sets, threads}));
           }),
           py::arg("store").none(true), py::arg("arena"), py::arg("staging_sets"),
           py::arg("threads"))
      .def_static("staging_set_bytes", &UpdatePipeline::staging_set_bytes,
                  py::arg("block_bytes") = SwapStoreOptions::kDefaultBlockBytes)
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

}  // namespace offload::bind
