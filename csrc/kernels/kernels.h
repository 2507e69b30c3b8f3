// The device kernels: what launches them, and the same code run on the CPU, where a device computes
// on the host (SimulatedDevice) and in the tests.
//
// Arrays are in the memory of the device. launch_* only submit to `stream`, a cudaStream_t of the
// current device; kUnsupported where this build has no kernels, or for what can_launch() denies.
// run_* return when done. Both give the bits of optim/update_rule.h. Thread-safe on disjoint
// outputs.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/status.h"
#include "kernels/adam_task.h"
#include "kernels/gather_task.h"
#include "optim/update_rule.h"

namespace offload::kernels {

// kUnsupported for what there is no kernel of: rules other than Adam and AdamW, amsgrad, states of
// bfloat16, more than kMaxFactors factors.
Status check_adam(const RuleHyper& hyper, const UpdateFormat& format, std::size_t factor_count);
// Whether a device that does not compute on the host can do what check_adam() admits: this build
// has kernels, and the square root is IEEE's.
bool can_launch_adam(const RuleHyper& hyper, const UpdateFormat& format);
// Errors: those of check_adam().
Result<AdamTask> make_adam_task(const RuleHyper& hyper, const UpdateFormat& format,
                                GradFactors factors, const UpdateArrays& arrays);
Status launch_adam(const AdamTask& task, StateFormat state, std::uintptr_t stream);
void run_adam(const AdamTask& task, StateFormat state);

// How many partial sums the task needs room for.
std::uint64_t gather_chunks(const GatherTask& task);
// kInvalid when there are more tensors than one launch takes.
Status launch_gather(const GatherTask& task, std::uintptr_t stream);
Status run_gather(const GatherTask& task);

}  // namespace offload::kernels
