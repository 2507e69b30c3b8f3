#include "base/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace offload {
namespace {

#if defined(__x86_64__)
// Clang before 15 does not know __builtin_cpu_supports("f16c"). REQUIRES: AVX, which is what the
// system must save registers for.
bool has_f16c() {
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

CpuFeatures detect() {
  CpuFeatures features;
#if defined(__x86_64__)
  // The builtins also ask XGETBV whether the system saves the wide registers.
  __builtin_cpu_init();
  features.amd = __builtin_cpu_is("amd") != 0;
  features.sse42 = __builtin_cpu_supports("sse4.2") != 0;
  features.pclmul = __builtin_cpu_supports("pclmul") != 0;
  features.avx2 = __builtin_cpu_supports("avx2") != 0;
  features.fma = __builtin_cpu_supports("fma") != 0;
  features.f16c = __builtin_cpu_supports("avx") != 0 && has_f16c();
  features.avx512 =
      __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512vl") != 0 &&
      __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512bw") != 0;
  features.vpclmul = features.avx512 && __builtin_cpu_supports("vpclmulqdq") != 0;
#elif defined(__aarch64__)
  const unsigned long hwcap = getauxval(AT_HWCAP);
  features.neon = (hwcap & HWCAP_ASIMD) != 0;
  features.arm_crc32 = (hwcap & HWCAP_CRC32) != 0;
#endif
  return features;
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

}  // namespace offload
