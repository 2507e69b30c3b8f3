// One step of Adafactor on memory given by address, pass by pass.
#include "optim/adafactor.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "bind/bindings.h"
#include "bind/errors.h"
#include "bind/isa.h"

namespace py = pybind11;

namespace offload::bind {
namespace {

// A step with the factors that it points at.
struct BoundStep {
  AdafactorStep step;
  std::vector<float> factors;
};

NormOrder make_order(std::size_t lanes, bool fuse_lanes, std::size_t rest_group, bool fuse_rest,
                     bool fuse_columns) {
  if (lanes != 4 && lanes != 8 && lanes != 16) {
    raise(Status::error(Code::kInvalid,
                        "a norm has 4, 8 or 16 running sums, not " + std::to_string(lanes)));
  }
  return {lanes, fuse_lanes, rest_group, fuse_rest, fuse_columns};
}

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

BoundStep make_step(const UpdateFormat& format, std::size_t batch, std::size_t rows,
                    std::size_t cols, std::uintptr_t param, std::uintptr_t narrow,
                    std::uintptr_t grad, std::vector<float> factors, std::uintptr_t row_var,
                    std::uintptr_t col_var, std::uintptr_t variance, const NormOrder& order,
                    bool fma, unsigned threads, const std::string& isa) {
  if (format.has_master() != (narrow != 0)) {
    raise(Status::error(Code::kInvalid, "a 16-bit parameter, and no other, has an fp32 master"));
  }
  const bool is_matrix = row_var != 0;
  if (is_matrix != (col_var != 0) || is_matrix == (variance != 0)) {
    raise(
        Status::error(Code::kInvalid,
                      "a matrix has the means of its rows and columns, anything else a variance"));
  }
  if (rows == 0 || cols == 0 || (!is_matrix && rows * cols != 1)) {
    raise(Status::error(Code::kInvalid, std::to_string(rows) + " rows of " + std::to_string(cols) +
                                            " elements: nothing to be factored so"));
  }
  BoundStep bound;
  bound.factors = std::move(factors);
  AdafactorStep& step = bound.step;
  step.batch = batch;
  step.rows = rows;
  step.cols = cols;
  step.type = format.param;
  step.param = pointer<float>(param);
  step.narrow = pointer<void>(narrow);
  step.grad = pointer<const void>(grad);
  step.row_var = pointer<float>(row_var);
  step.col_var = pointer<float>(col_var);
  step.variance = pointer<float>(variance);
  step.order = order;
  step.fma = fma;
  step.threads = threads;
  step.isa = available_isa(isa);
  return bound;
}

AdafactorStep with_factors(const BoundStep& bound) {
  AdafactorStep step = bound.step;
  step.factors = {bound.factors.data(), bound.factors.size()};
  return step;
}

}  // namespace

void bind_adafactor(py::module_& m) {
  py::class_<NormOrder>(m, "NormOrder")
      .def(py::init(&make_order), py::arg("lanes"), py::kw_only(), py::arg("fuse_lanes"),
           py::arg("rest_group"), py::arg("fuse_rest"), py::arg("fuse_columns"))
      .def_readonly("lanes", &NormOrder::lanes)
      .def_readonly("fuse_lanes", &NormOrder::fuse_lanes)
      .def_readonly("rest_group", &NormOrder::rest_group)
      .def_readonly("fuse_rest", &NormOrder::fuse_rest)
      .def_readonly("fuse_columns", &NormOrder::fuse_columns);
  py::class_<BoundStep>(m, "AdafactorStep")
      .def(py::init(&make_step), py::arg("format"), py::arg("batch"), py::arg("rows"),
           py::arg("cols"), py::kw_only(), py::arg("param"), py::arg("narrow"), py::arg("grad"),
           py::arg("factors"), py::arg("row_var"), py::arg("col_var"), py::arg("variance"),
           py::arg("order"), py::arg("fma"), py::arg("threads"), py::arg("isa"))
      .def("param_norm",
           [](const BoundStep& bound) {
             const AdafactorStep step = with_factors(bound);
             return unlocked([&] { return step.norm(step.param, step.numel()); });
           })
      .def(
          "take_statistics",
          [](const BoundStep& bound, double weight) {
            const AdafactorStep step = with_factors(bound);
            unlocked([&] { step.take_statistics(weight); });
          },
          py::arg("weight"))
      .def(
          "update_norm",
          [](const BoundStep& bound, std::uintptr_t mean, float floor) {
            const AdafactorStep step = with_factors(bound);
            return unlocked([&] { return step.update_norm(pointer<const float>(mean), floor); });
          },
          py::arg("mean"), py::arg("floor"))
      .def(
          "apply",
          [](const BoundStep& bound, std::uintptr_t mean, float floor, float decay, float by) {
            const AdafactorStep step = with_factors(bound);
            unlocked([&] { step.apply(pointer<const float>(mean), floor, decay, by); });
          },
          py::arg("mean"), py::arg("floor"), py::arg("decay"), py::arg("step"));
}

}  // namespace offload::bind
