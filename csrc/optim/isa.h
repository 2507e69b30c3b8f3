// The instruction sets that update rules are written for.
//
// Contract: every rule gives the same bits on every one of them. Thread-safe.
#pragma once

#include <cstdint>

namespace offload {

enum class Isa : std::uint8_t {
  kScalar,  // the reference: plain C++, one element at a time
  kAvx2,    // with FMA and F16C
  kAvx512,  // F, VL, DQ and BW; with FMA and F16C
  kNeon,
};

// Whether this build has kernels for `isa` and this CPU can run them.
[[nodiscard]] bool isa_available(Isa isa);

// "scalar", "avx2", "avx512" or "neon".
[[nodiscard]] const char* isa_name(Isa isa);

// The widest that is available.
[[nodiscard]] Isa best_isa();

}  // namespace offload
