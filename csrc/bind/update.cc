// Optimizer updates: UpdatePipeline and its jobs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "bind/bindings.h"
#include "bind/errors.h"
#include "bind/keep_alive.h"
#include "mem/host_memory.h"
#include "optim/update_rule.h"
#include "store/swap_store.h"
#include "stream/device_transfer.h"
#include "stream/transfer.h"
#include "stream/update_pipeline.h"

namespace py = pybind11;

namespace offload::bind {
namespace {

template <typename Target>
void put_states(const std::vector<UpdateOperand>& from, Target to, const char* what) {
  if (from.size() > kMaxStates) {
    raise(Status::error(Code::kInvalid, std::to_string(from.size()) + " " + what +
                                            " were given; no rule has more than " +
                                            std::to_string(kMaxStates)));
  }
  std::copy(from.begin(), from.end(), to);
}

UpdateJob make_job(std::uint64_t numel, const UpdateFormat& format, std::uint64_t seed,
                   const UpdateOperand& param, const UpdateOperand& grad,
                   const UpdateOperand* master, const std::vector<UpdateOperand>& states,
                   const std::vector<UpdateOperand>& scales, std::vector<UpdateSegment> segments) {
  UpdateJob job;
  job.numel = numel;
  job.format = format;
  job.seed = seed;
  job.operands[kParam] = param;
  job.operands[kGrad] = grad;
  if (master != nullptr) job.operands[kMaster] = *master;
  put_states(states, job.operands.begin() + kState, "states");
  put_states(scales, job.scales.begin(), "rows of scales");
  job.segments = std::move(segments);
  return job;
}

using AnyTransfer = std::variant<std::shared_ptr<Transfer>, std::shared_ptr<DeviceTransfer>>;

Prerequisites prerequisites(const std::vector<AnyTransfer>& after) {
  Prerequisites all;
  all.reserve(after.size());
  for (const AnyTransfer& one : after) {
    std::visit([&](const auto& transfer) { all.push_back(transfer); }, one);
  }
  return all;
}

}  // namespace

void bind_update(py::module_& m) {
  py::class_<UpdateOperand>(m, "UpdateOperand")
      .def_static("in_memory", &UpdateOperand::in_memory, py::arg("lease"), py::arg("nbytes"))
      .def_static("on_disk", &UpdateOperand::on_disk, py::arg("object"), py::arg("nbytes"),
                  py::kw_only(), py::arg("initial") = 0.0f)
      .def_static(
          "borrowed",
          [](std::uintptr_t address, std::uint64_t nbytes, py::object kept) {
            return UpdateOperand::borrowed(reinterpret_cast<std::byte*>(address), nbytes,
                                           keep_alive(std::move(kept)));
          },
          py::arg("address"), py::arg("nbytes"), py::arg("keep_alive"))
      .def_static("loaded", &UpdateOperand::loaded, py::arg("object"), py::arg("lease"),
                  py::arg("nbytes"), py::kw_only(), py::arg("initial") = 0.0f);
  py::class_<UpdateSegment>(m, "UpdateSegment")
      .def(py::init([](std::uint64_t begin, std::uint64_t end, const RuleHyper& hyper,
                       std::vector<float> factors, std::uint64_t parameter) {
             return UpdateSegment{begin, end, hyper, std::move(factors), parameter};
           }),
           py::arg("begin"), py::arg("end"), py::arg("hyper"), py::arg("factors"),
           py::arg("parameter") = 0)
      .def_readonly("begin", &UpdateSegment::begin)
      .def_readonly("end", &UpdateSegment::end);
  py::class_<UpdatePipeline, std::shared_ptr<UpdatePipeline>>(m, "UpdatePipeline")
      .def(py::init([](std::shared_ptr<SwapStore> store, const std::shared_ptr<HostMemory>& arena,
                       std::uint64_t staging_bytes, unsigned threads) {
             return take(UpdatePipeline::create(std::move(store), arena, {staging_bytes, threads}));
           }),
           py::arg("store").none(true), py::arg("arena").none(true), py::arg("staging_bytes"),
           py::arg("threads"))
      .def_static("min_staging_bytes", &UpdatePipeline::min_staging_bytes,
                  py::arg("block_bytes") = SwapStoreOptions::kDefaultBlockBytes)
      .def(
          "submit",
          [](UpdatePipeline& pipeline, std::uint64_t numel, const UpdateFormat& format,
             std::uint64_t seed, const UpdateOperand& param, const UpdateOperand& grad,
             const UpdateOperand* master, const std::vector<UpdateOperand>& states,
             const std::vector<UpdateOperand>& scales, std::vector<UpdateSegment> segments,
             const std::vector<AnyTransfer>& after) {
            UpdateJob job = make_job(numel, format, seed, param, grad, master, states, scales,
                                     std::move(segments));
            auto transfer =
                unlocked([&] { return pipeline.submit(std::move(job), prerequisites(after)); });
            release_dropped();  // of jobs that are done
            return take(std::move(transfer));
          },
          py::arg("numel"), py::arg("format"), py::arg("seed"), py::arg("param"), py::arg("grad"),
          py::arg("master").none(true), py::arg("states"), py::arg("scales"), py::arg("segments"),
          py::arg("after") = std::vector<AnyTransfer>())
      .def("stats",
           [](const UpdatePipeline& pipeline) {
             const UpdatePipeline::Stats stats = pipeline.stats();
             py::dict d;
             d["jobs"] = stats.jobs;
             d["chunks"] = stats.chunks;
             d["update_seconds"] = static_cast<double>(stats.update_ns) * 1e-9;
             return d;
           })
      .def("close", [](UpdatePipeline& pipeline) {
        const Status status = unlocked([&] { return pipeline.close(); });
        release_dropped();
        check(status);
      });
}

}  // namespace offload::bind
