// What the running CPU (and the operating system, for register state) can execute.
//
// Contract: a field is true only when code compiled for that extension may run here. Fields of the
// other architecture are false. Thread-safe.
#pragma once

namespace offload {

struct CpuFeatures {
  // x86-64.
  bool amd = false;  // who made it: for what cannot be asked, such as how far it prefetches
  bool sse42 = false;
  bool pclmul = false;
  bool vpclmul = false;  // of 64-byte registers
  bool avx2 = false;
  bool fma = false;
  bool f16c = false;    // conversion of half precision
  bool avx512 = false;  // all of F, VL, DQ and BW
  // aarch64.
  bool neon = false;
  bool arm_crc32 = false;
};

// Detected on the first call, constant afterwards.
const CpuFeatures& cpu_features();

}  // namespace offload
