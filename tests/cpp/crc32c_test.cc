#include "base/crc32c.h"

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/cpu_features.h"
#include "base/crc32c_interleaved.h"
#include "doctest/doctest.h"

namespace offload {
namespace {

using Crc32c = std::uint32_t (*)(const void*, std::size_t, std::uint32_t);

std::vector<unsigned char> random_bytes(std::size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<unsigned char> bytes(n);
  for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(random());
  return bytes;
}

TEST_CASE("crc32c gives the values of RFC 3720") {
  std::vector<unsigned char> ascending(32), descending(32);
  for (unsigned i = 0; i < 32; ++i) {
    ascending[i] = static_cast<unsigned char>(i);
    descending[i] = static_cast<unsigned char>(31 - i);
  }
  std::vector<unsigned char> read_command(48, 0);  // the iSCSI SCSI Read (10) PDU
  const std::pair<std::size_t, unsigned> nonzero[] = {
      {0, 0x01}, {1, 0xc0}, {16, 0x14}, {22, 0x04}, {27, 0x14}, {31, 0x18}, {32, 0x28}, {40, 0x02}};
  for (const auto& [at, value] : nonzero) read_command[at] = static_cast<unsigned char>(value);
  const std::string digits = "123456789";

  const auto keep = [](const void* data, std::size_t n, std::uint32_t seed) {
    return crc32c(data, n, seed);
  };
  for (const Crc32c crc : {Crc32c{keep}, Crc32c{crc32c_portable}}) {
    CHECK(crc(nullptr, 0, 0) == 0);
    CHECK(crc(digits.data(), digits.size(), 0) == 0xe3069283);
    CHECK(crc(std::vector<unsigned char>(32, 0x00).data(), 32, 0) == 0x8a9136aa);
    CHECK(crc(std::vector<unsigned char>(32, 0xff).data(), 32, 0) == 0x62a8ab43);
    CHECK(crc(ascending.data(), 32, 0) == 0x46dd794e);
    CHECK(crc(descending.data(), 32, 0) == 0x113fdb5c);
    CHECK(crc(read_command.data(), 48, 0) == 0xd9963a56);
  }
}

TEST_CASE("crc32c equals the portable path at every short size and at random ones") {
  const std::vector<unsigned char> bytes = random_bytes(70000, 1);
  for (std::size_t n = 0; n <= 1600; ++n) {
    REQUIRE(crc32c(bytes.data() + n % 9, n) == crc32c_portable(bytes.data() + n % 9, n));
    REQUIRE(crc32c(bytes.data() + n % 9, n, 0, CacheUse::kPass) ==
            crc32c_portable(bytes.data() + n % 9, n));
  }
  std::mt19937 random(2);
  for (int round = 0; round < 300; ++round) {
    const std::size_t offset = random() % 64;
    const std::size_t n = random() % (bytes.size() - 64);
    const std::uint32_t seed = random();
    for (const CacheUse use : {CacheUse::kKeep, CacheUse::kPass}) {
      REQUIRE(crc32c(bytes.data() + offset, n, seed, use) ==
              crc32c_portable(bytes.data() + offset, n, seed));
    }
  }
}

#if defined(__x86_64__)
TEST_CASE("the path of CPUs with the CRC instruction alone equals the portable one") {
  if (!cpu_features().sse42 || !cpu_features().pclmul) return;
  const std::vector<unsigned char> bytes = random_bytes(70000, 5);
  std::mt19937 random(6);
  for (int round = 0; round < 1000; ++round) {
    const std::size_t offset = random() % 64;
    const std::size_t n = random() % (round < 500 ? 1600 : bytes.size() - 64);
    const std::uint32_t seed = random();
    REQUIRE(~crc32c_internal::crc32c_sse42(bytes.data() + offset, n, ~seed) ==
            crc32c_portable(bytes.data() + offset, n, seed));
  }
}
#endif

TEST_CASE("crc32c of a part, given as seed, continues to that of the whole") {
  const std::vector<unsigned char> bytes = random_bytes(40000, 3);
  const std::uint32_t whole = crc32c(bytes.data(), bytes.size());
  for (const std::size_t cut : {0, 1, 7, 768, 12288, 12289, 39999, 40000}) {
    const std::uint32_t head = crc32c(bytes.data(), cut);
    CHECK(crc32c(bytes.data() + cut, bytes.size() - cut, head) == whole);
  }
}

TEST_CASE("crc32c changes with any flipped bit and any swap of blocks") {
  std::vector<unsigned char> bytes = random_bytes(3 * 4096 + 3 * 256 + 13, 4);
  const std::uint32_t before = crc32c(bytes.data(), bytes.size());
  for (std::size_t at = 0; at < bytes.size(); at += 101) {
    const unsigned char bit = static_cast<unsigned char>(1u << (at % 8));
    bytes[at] ^= bit;
    REQUIRE(crc32c(bytes.data(), bytes.size()) != before);
    bytes[at] ^= bit;
  }
  std::swap_ranges(bytes.begin(), bytes.begin() + 4096, bytes.begin() + 4096);
  CHECK(crc32c(bytes.data(), bytes.size()) != before);
}

TEST_CASE("crc32c takes the CPU's instruction where there is one") {
  const CpuFeatures& cpu = cpu_features();
  const std::string path = crc32c_path();
  if (cpu.vpclmul && cpu.sse42 && cpu.pclmul) {
    CHECK(path == "vpclmulqdq");
  } else if (cpu.sse42 && cpu.pclmul) {
    CHECK(path == "sse4.2");
  } else if (cpu.arm_crc32) {
    CHECK(path == "armv8-crc");
  } else {
    CHECK(path == "portable");
  }
}

}  // namespace
}  // namespace offload
