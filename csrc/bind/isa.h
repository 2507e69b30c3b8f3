// Instruction sets by name.
#pragma once

#include <string>

#include "bind/errors.h"
#include "optim/isa.h"

namespace offload::bind {

inline constexpr Isa kIsas[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kNeon};

// Raises UnsupportedError where there are no kernels for it.
inline Isa available_isa(const std::string& name) {
  for (const Isa isa : kIsas) {
    if (name == isa_name(isa) && isa_available(isa)) return isa;
  }
  raise(Status::error(Code::kUnsupported, "no kernels for '" + name + "' on this CPU"));
}

}  // namespace offload::bind
