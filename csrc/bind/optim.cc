// Optimizer update rules: hyperparameters, formats, and the kernels on memory given by address.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bind/bindings.h"
#include "bind/errors.h"
#include "bind/formats.h"
#include "bind/isa.h"
#include "optim/aten_rounding.h"
#include "optim/update_rule.h"

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

constexpr Named<Rule> kRules[] = {{"adamw", Rule::kAdamW},     {"adam", Rule::kAdam},
                                  {"sgd", Rule::kSgd},         {"adagrad", Rule::kAdagrad},
                                  {"rmsprop", Rule::kRmsprop}, {"lion", Rule::kLion}};

RuleHyper make_hyper(const std::string& rule, double lr, double beta1, double beta2, double eps,
                     double weight_decay, double momentum, double dampening, double alpha,
                     double lr_decay, double step, bool maximize, bool amsgrad, bool nesterov,
                     bool centered, bool first, const AtenRounding& rounding) {
  RuleHyper hyper;
  hyper.rule = by_name("update rule", kRules, rule);
  hyper.lr = lr;
  hyper.beta1 = beta1;
  hyper.beta2 = beta2;
  hyper.eps = eps;
  hyper.weight_decay = weight_decay;
  hyper.momentum = momentum;
  hyper.dampening = dampening;
  hyper.alpha = alpha;
  hyper.lr_decay = lr_decay;
  hyper.step = step;
  hyper.maximize = maximize;
  hyper.amsgrad = amsgrad;
  hyper.nesterov = nesterov;
  hyper.centered = centered;
  hyper.first = first;
  hyper.rounding = rounding;
  return hyper;
}

std::size_t checked_state(const RuleHyper& hyper, std::size_t k) {
  if (k < state_count(hyper)) return k;
  raise(Status::error(Code::kInvalid, "the update rule has " + std::to_string(state_count(hyper)) +
                                          " states, there is none of index " + std::to_string(k)));
}

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void update_in_place(const RuleHyper& hyper, const UpdateFormat& format,
                     const std::vector<float>& factors, std::uint64_t seed, std::uint64_t parameter,
                     std::uint64_t first, std::uintptr_t param, std::uintptr_t grad,
                     std::uintptr_t master, const std::vector<std::uintptr_t>& states,
                     const std::vector<std::uintptr_t>& scales, std::size_t n,
                     const std::string& isa) {
  const Isa chosen = available_isa(isa);
  const bool narrow = format.state != StateFormat::kFloat32;
  if (!narrow && !sqrt_rule_available(chosen, hyper.rounding.sqrt)) {
    raise(Status::error(Code::kUnsupported, "the kernels for '" + isa +
                                                "' cannot take square roots by rule '" +
                                                sqrt_rule_name(hyper.rounding.sqrt) + "'"));
  }
  const std::size_t count = state_count(hyper);
  const std::size_t scale_count = format.state == StateFormat::kInt8 ? count : 0;
  if (states.size() != count || scales.size() != scale_count) {
    raise(Status::error(Code::kInvalid, "the update needs " + std::to_string(count) +
                                            " states and " + std::to_string(scale_count) +
                                            " arrays of scales, not " +
                                            std::to_string(states.size()) + " and " +
                                            std::to_string(scales.size())));
  }
  if (format.has_master() != (master != 0)) {
    raise(Status::error(Code::kInvalid, "a 16-bit parameter, and no other, has an fp32 master"));
  }
  if (format.state == StateFormat::kInt8 && first % kQuantBlock != 0) {
    raise(Status::error(Code::kInvalid, "an update of 8-bit states starts at a multiple of " +
                                            std::to_string(kQuantBlock) + " elements"));
  }
  UpdateArrays arrays;
  arrays.n = n;
  arrays.param = arrays.param_out = pointer<void>(param);
  arrays.master = arrays.master_out = pointer<float>(master);
  arrays.grad = pointer<const void>(grad);
  for (std::size_t k = 0; k < count; ++k) {
    arrays.state[k] = arrays.state_out[k] = pointer<void>(states[k]);
    if (k < scale_count) arrays.scale[k] = arrays.scale_out[k] = pointer<float>(scales[k]);
  }
  unlocked([&] {
    update_isa(chosen, hyper, format, {factors.data(), factors.size()}, {seed, parameter, first},
               arrays);
  });
}

}  // namespace

void bind_optim(py::module_& m) {
  py::class_<AtenRounding>(m, "AtenRounding")
      .def(py::init([](bool fma, const std::string& sqrt) {
             return AtenRounding{fma, sqrt_rule(sqrt)};
           }),
           py::arg("fma"), py::arg("sqrt"))
      .def_readonly("fma", &AtenRounding::fma)
      .def_property_readonly(
          "sqrt", [](const AtenRounding& rounding) { return sqrt_rule_name(rounding.sqrt); });
  py::class_<RuleHyper>(m, "UpdateHyper")
      .def(py::init(&make_hyper), py::arg("rule"), py::kw_only(), py::arg("lr") = 0.0,
           py::arg("beta1") = 0.0, py::arg("beta2") = 0.0, py::arg("eps") = 0.0,
           py::arg("weight_decay") = 0.0, py::arg("momentum") = 0.0, py::arg("dampening") = 0.0,
           py::arg("alpha") = 0.0, py::arg("lr_decay") = 0.0, py::arg("step") = 1.0,
           py::arg("maximize") = false, py::arg("amsgrad") = false, py::arg("nesterov") = false,
           py::arg("centered") = false, py::arg("first") = false, py::arg("rounding"))
      .def_readwrite("unscale", &RuleHyper::unscale)
      .def_property_readonly("state_count", &state_count);
  py::class_<UpdateFormat>(m, "UpdateFormat")
      .def(py::init([](const std::string& param, const std::string& state) {
             return UpdateFormat{by_name("parameter type", kElementTypes, param),
                                 by_name("state format", kStateFormats, state)};
           }),
           py::arg("param") = "float32", py::arg("state") = "float32")
      .def_property_readonly(
          "param", [](const UpdateFormat& format) { return name_of(kElementTypes, format.param); })
      .def_property_readonly(
          "state", [](const UpdateFormat& format) { return name_of(kStateFormats, format.state); })
      .def_property_readonly("param_bytes",
                             [](const UpdateFormat& format) { return element_bytes(format.param); })
      .def_property_readonly("state_bytes",
                             [](const UpdateFormat& format) { return element_bytes(format.state); })
      .def_property_readonly("has_master", &UpdateFormat::has_master);
  m.attr("quant_block") = kQuantBlock;
  m.def("update", &update_in_place, py::arg("hyper"), py::arg("format"), py::arg("factors"),
        py::arg("seed"), py::arg("parameter"), py::arg("first"), py::arg("param"), py::arg("grad"),
        py::arg("master"), py::arg("states"), py::arg("scales"), py::arg("n"), py::arg("isa"),
        "One in-place step on n elements at the given addresses.");
  m.def(
      "fill_state",
      [](const RuleHyper& hyper, const UpdateFormat& format, std::size_t k, float value,
         std::uintptr_t state, std::uintptr_t scale, std::size_t n) {
        checked_state(hyper, k);
        unlocked([&] {
          fill_state(hyper, format.state, k, value, pointer<void>(state), pointer<float>(scale), n);
        });
      },
      py::arg("hyper"), py::arg("format"), py::arg("k"), py::arg("value"), py::arg("state"),
      py::arg("scale"), py::arg("n"));
  m.def(
      "decode_state",
      [](const RuleHyper& hyper, const UpdateFormat& format, std::size_t k, std::uintptr_t state,
         std::uintptr_t scale, std::uintptr_t out, std::size_t n) {
        checked_state(hyper, k);
        unlocked([&] {
          decode_state(hyper, format.state, k, pointer<const void>(state),
                       pointer<const float>(scale), pointer<float>(out), n);
        });
      },
      py::arg("hyper"), py::arg("format"), py::arg("k"), py::arg("state"), py::arg("scale"),
      py::arg("out"), py::arg("n"));
  m.def(
      "encode_state",
      [](const RuleHyper& hyper, const UpdateFormat& format, std::size_t k, std::uintptr_t values,
         std::uintptr_t state, std::uintptr_t scale, std::size_t n) {
        checked_state(hyper, k);
        unlocked([&] {
          encode_state(hyper, format.state, k, pointer<const float>(values), pointer<void>(state),
                       pointer<float>(scale), n);
        });
      },
      py::arg("hyper"), py::arg("format"), py::arg("k"), py::arg("values"), py::arg("state"),
      py::arg("scale"), py::arg("n"));
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Isa isa : kIsas) {
      if (isa_available(isa)) names.emplace_back(isa_name(isa));
    }
    return names;
  });
  m.def(
      "sqrt_rules",
      [](const std::string& isa) {
        std::vector<std::string> names;
        for (const SqrtRule rule : kSqrtRules) {
          if (sqrt_rule_available(available_isa(isa), rule)) {
            names.emplace_back(sqrt_rule_name(rule));
          }
        }
        return names;
      },
      py::arg("isa"));
  m.def("best_isa", [] { return std::string(isa_name(best_isa())); });
}

}  // namespace offload::bind
