#include "base/cpu_features.h"

#include <fstream>
#include <set>
#include <sstream>
#include <string>

#include "doctest/doctest.h"

namespace offload {
namespace {

// The flags that the kernel prints for the first CPU: an independent reading of the same CPU.
std::set<std::string> kernel_flags() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  std::string line;
  while (std::getline(cpuinfo, line)) {
    if (line.rfind("flags", 0) != 0 && line.rfind("Features", 0) != 0) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    std::set<std::string> flags;
    for (std::string word; words >> word;) flags.insert(word);
    return flags;
  }
  return {};
}

TEST_CASE("cpu_features agrees with the kernel") {
  const std::set<std::string> flags = kernel_flags();
  REQUIRE(!flags.empty());
  const auto has = [&flags](const char* name) { return flags.count(name) != 0; };
  const CpuFeatures& cpu = cpu_features();
#if defined(__x86_64__)
  CHECK(cpu.sse42 == has("sse4_2"));
  CHECK(cpu.pclmul == has("pclmulqdq"));
  CHECK(cpu.avx2 == has("avx2"));
  CHECK(cpu.fma == has("fma"));
  CHECK(cpu.f16c == has("f16c"));
  CHECK(cpu.avx512 == (has("avx512f") && has("avx512vl") && has("avx512dq") && has("avx512bw")));
  CHECK_FALSE(cpu.neon);
  CHECK_FALSE(cpu.arm_crc32);
#elif defined(__aarch64__)
  CHECK(cpu.neon == has("asimd"));
  CHECK(cpu.arm_crc32 == has("crc32"));
  CHECK_FALSE(cpu.sse42);
  CHECK_FALSE(cpu.avx2);
  CHECK_FALSE(cpu.avx512);
#endif
}

TEST_CASE("cpu_features is detected once") {
  CHECK(&cpu_features() == &cpu_features());
}

}  // namespace
}  // namespace offload
