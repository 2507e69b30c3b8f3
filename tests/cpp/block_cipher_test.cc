// BlockCipher: published vectors, round trips, nonces, misuse, threads, fork, and where its key is.
#include "store/block_cipher.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "base/align.h"
#include "doctest/doctest.h"

namespace offload {
namespace {

#ifdef OFFLOAD_HAVE_OPENSSL

using Bytes = std::vector<std::byte>;

Bytes from_hex(const std::string& text) {
  Bytes bytes;
  for (std::size_t i = 0; i + 1 < text.size(); i += 2) {
    bytes.push_back(static_cast<std::byte>(std::stoi(text.substr(i, 2), nullptr, 16)));
  }
  return bytes;
}

std::unique_ptr<BlockCipher> with_key(const Bytes& key) {
  REQUIRE(key.size() == BlockCipher::kKeyBytes);
  Result<std::unique_ptr<BlockCipher>> cipher = BlockCipher::create_with_key(
      std::span<const std::byte, BlockCipher::kKeyBytes>(key.data(), BlockCipher::kKeyBytes));
  REQUIRE_MESSAGE(cipher.is_ok(), cipher.status().to_string());
  return cipher.take();
}

std::unique_ptr<BlockCipher> with_fresh_key() {
  Result<std::unique_ptr<BlockCipher>> cipher = BlockCipher::create();
  REQUIRE_MESSAGE(cipher.is_ok(), cipher.status().to_string());
  return cipher.take();
}

Bytes random_bytes(std::size_t nbytes, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  Bytes bytes(nbytes);
  for (std::size_t i = 0; i + 8 <= nbytes; i += 8) {
    const std::uint64_t word = random();
    std::memcpy(bytes.data() + i, &word, 8);
  }
  return bytes;
}

Bytes encrypted(const BlockCipher& cipher, std::uint64_t hi, std::uint64_t lo, const Bytes& plain) {
  Bytes out(plain.size());
  const Status status = cipher.encrypt(hi, lo, plain.data(), out.data(), plain.size());
  REQUIRE_MESSAGE(status.is_ok(), status.to_string());
  return out;
}

Bytes decrypted(const BlockCipher& cipher, std::uint64_t hi, std::uint64_t lo, const Bytes& in) {
  Bytes out(in.size());
  const Status status = cipher.decrypt(hi, lo, in.data(), out.data(), in.size());
  REQUIRE_MESSAGE(status.is_ok(), status.to_string());
  return out;
}

// How many 16-byte units are the same, at the same place.
std::size_t equal_units(const Bytes& a, const Bytes& b) {
  std::size_t equal = 0;
  for (std::size_t i = 0; i < a.size(); i += BlockCipher::kUnitBytes) {
    if (std::memcmp(a.data() + i, b.data() + i, BlockCipher::kUnitBytes) == 0) ++equal;
  }
  return equal;
}

struct Vector {
  const char* name;
  std::string key;
  std::uint64_t nonce_hi;
  std::uint64_t nonce_lo;
  std::string plain;
  std::string cipher;
};

std::string counting_bytes(std::size_t nbytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (std::size_t i = 0; i < nbytes; ++i) {
    text += kDigits[i / 16 % 16];
    text += kDigits[i % 16];
  }
  return text;
}

TEST_CASE("BlockCipher gives the ciphertexts of published vectors") {
  const std::string ieee_key =
      "2718281828459045235360287471352662497757247093699959574966967627"
      "3141592653589793238462643383279502884197169399375105820974944592";
  const Vector vectors[] = {
      {"IEEE 1619 vector 10", ieee_key, 0, 0xff, counting_bytes(512),
       "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b"
       "5d31e276f8fe4a8d66b317f9ac683f44680a86ac35adfc3345befecb4bb188fd"
       "5776926c49a3095eb108fd1098baec70aaa66999a72a82f27d848b21d4a741b0"
       "c5cd4d5fff9dac89aeba122961d03a757123e9870f8acf1000020887891429ca"
       "2a3e7a7d7df7b10355165c8b9a6d0a7de8b062c4500dc4cd120c0f7418dae3d0"
       "b5781c34803fa75421c790dfe1de1834f280d7667b327f6c8cd7557e12ac3a0f"
       "93ec05c52e0493ef31a12d3d9260f79a289d6a379bc70c50841473d1a8cc81ec"
       "583e9645e07b8d9670655ba5bbcfecc6dc3966380ad8fecb17b6ba02469a020a"
       "84e18e8f84252070c13e9f1f289be54fbc481457778f616015e1327a02b140f1"
       "505eb309326d68378f8374595c849d84f4c333ec4423885143cb47bd71c5edae"
       "9be69a2ffeceb1bec9de244fbe15992b11b77c040f12bd8f6a975a44a0f90c29"
       "a9abc3d4d893927284c58754cce294529f8614dcd2aba991925fedc4ae74ffac"
       "6e333b93eb4aff0479da9a410e4450e0dd7ae4c6e2910900575da401fc07059f"
       "645e8b7e9bfdef33943054ff84011493c27b3429eaedb4ed5376441a77ed4385"
       "1ad77f16f541dfd269d50d6a5f14fb0aab1cbb4c1550be97f7ab4066193c4caa"
       "773dad38014bd2092fa755c824bb5e54c4f36ffda9fcea70b9c6e693e148c151"},
      {"IEEE 1619 vector 14, its beginning", ieee_key, 0, 0xff'ffff'ffff, counting_bytes(32),
       "64497e5a831e4a932c09be3e5393376daa599548b816031d224bbf50a818ed23"},
      // The tweak's bytes are adf8d926 27464ad2 f0428e84 a9f87564, the lowest first.
      {"NIST CAVP XTSGenAES256, count 1",
       "1ea661c58d943a0e4801e42f4b0947149e7f9f8e3e68d0c7505210bd311a0e7c"
       "d6e13ffdf2418d8d1911c004cda58da3d619b7e2b9141e58318eea392cf41b08",
       0x6475f8a9848e42f0, 0xd24a462726d9f8ad,
       "2eedea52cd8215e1acc647e810bbc3642e87287f8d2e57e36c0a24fbc12a202e",
       "cbaad0e2f6cea3f50b37f934d46a9b130b9d54f07e34f36af793e86f73c6d7db"},
  };
  for (const Vector& vector : vectors) {
    CAPTURE(vector.name);
    const auto cipher = with_key(from_hex(vector.key));
    const Bytes plain = from_hex(vector.plain);
    const Bytes expected = from_hex(vector.cipher);
    CHECK(encrypted(*cipher, vector.nonce_hi, vector.nonce_lo, plain) == expected);
    CHECK(decrypted(*cipher, vector.nonce_hi, vector.nonce_lo, expected) == plain);
  }
}

TEST_CASE("BlockCipher gives back what it was given, in place and out of place") {
  const auto cipher = with_fresh_key();
  std::uint64_t nonce = 0;
  for (const std::size_t nbytes : {std::size_t{16}, std::size_t{48}, kPageBytes, 3 * kPageBytes,
                                   17 * kPageBytes, 255 * kPageBytes, BlockCipher::kMaxBytes}) {
    CAPTURE(nbytes);
    const Bytes plain = random_bytes(nbytes, nbytes);
    const Bytes secret = encrypted(*cipher, 7, ++nonce, plain);
    CHECK(equal_units(plain, secret) == 0);
    CHECK(decrypted(*cipher, 7, nonce, secret) == plain);

    Bytes in_place = plain;
    CHECK(cipher->encrypt(7, nonce, in_place.data(), in_place.data(), nbytes).is_ok());
    CHECK(in_place == secret);
    CHECK(cipher->decrypt(7, nonce, in_place.data(), in_place.data(), nbytes).is_ok());
    CHECK(in_place == plain);
  }
}

TEST_CASE("BlockCipher shows no equality between nonces, within a block, or between keys") {
  const auto cipher = with_fresh_key();
  const Bytes zeros(5 * kPageBytes);
  const Bytes first = encrypted(*cipher, 0, 1, zeros);
  CHECK(equal_units(first, encrypted(*cipher, 0, 1, zeros)) == first.size() / 16);
  for (unsigned bit = 0; bit < 64; ++bit) {
    CAPTURE(bit);
    const std::uint64_t flipped = std::uint64_t{1} << bit;
    CHECK(equal_units(first, encrypted(*cipher, flipped, 1, zeros)) == 0);
    CHECK(equal_units(first, encrypted(*cipher, 0, flipped ^ 1, zeros)) == 0);
  }
  const Bytes shifted(first.begin() + 16, first.end());
  CHECK(equal_units(shifted, first) == 0);
  CHECK(equal_units(first, encrypted(*with_fresh_key(), 0, 1, zeros)) == 0);
  CHECK(decrypted(*cipher, 0, 2, first) != zeros);
}

TEST_CASE("BlockCipher refuses sizes that XTS has not, and leaves the output alone") {
  const auto cipher = with_fresh_key();
  const Bytes plain = random_bytes(BlockCipher::kMaxBytes + 16, 1);
  Bytes out(plain.size());
  for (const std::size_t nbytes : {std::size_t{0}, std::size_t{1}, std::size_t{15}, std::size_t{17},
                                   kPageBytes + 8, BlockCipher::kMaxBytes + 16}) {
    CAPTURE(nbytes);
    CHECK(cipher->encrypt(0, 1, plain.data(), out.data(), nbytes).code() == Code::kInvalid);
    CHECK(cipher->decrypt(0, 1, plain.data(), out.data(), nbytes).code() == Code::kInvalid);
  }
  CHECK(out == Bytes(out.size()));
  // A refusal spoils nothing.
  const Bytes page(plain.begin(), plain.begin() + kPageBytes);
  CHECK(decrypted(*cipher, 0, 2, encrypted(*cipher, 0, 2, page)) == page);
}

TEST_CASE("BlockCipher refuses a key of two equal halves") {
  const Bytes key(BlockCipher::kKeyBytes, std::byte{7});
  const auto cipher = BlockCipher::create_with_key(
      std::span<const std::byte, BlockCipher::kKeyBytes>(key.data(), BlockCipher::kKeyBytes));
  REQUIRE(!cipher.is_ok());
  CHECK(cipher.status().code() == Code::kInvalid);
}

TEST_CASE("BlockCipher serves threads at once") {
  const auto cipher = with_fresh_key();
  constexpr std::size_t kThreads = 4;
  constexpr std::uint64_t kRounds = 60;
  const Bytes plain = random_bytes(9 * kPageBytes, 5);
  std::vector<Bytes> expected;
  for (std::uint64_t nonce = 0; nonce < kRounds; ++nonce) {
    expected.push_back(encrypted(*cipher, 3, nonce, plain));
  }
  std::vector<int> wrong(kThreads, 0);
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      Bytes out(plain.size());
      for (std::uint64_t i = 0; i < kRounds; ++i) {
        const std::uint64_t nonce = (i * 7 + t) % kRounds;
        if (!cipher->encrypt(3, nonce, plain.data(), out.data(), out.size()).is_ok() ||
            out != expected[nonce] ||
            !cipher->decrypt(3, nonce, out.data(), out.data(), out.size()).is_ok() ||
            out != plain) {
          ++wrong[t];
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == std::vector<int>(kThreads, 0));
}

// Sanitizers turn mlock into nothing and report success.
#if defined(__has_feature)
#define OFFLOAD_HAS_FEATURE(feature) __has_feature(feature)
#else
#define OFFLOAD_HAS_FEATURE(feature) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || \
    OFFLOAD_HAS_FEATURE(address_sanitizer) || OFFLOAD_HAS_FEATURE(thread_sanitizer)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

struct Mapping {
  std::uintptr_t begin = 0;
  std::uintptr_t end = 0;
  std::string flags;  // VmFlags
};

// The writable mappings of this process; sanitizers' shadow memory, by its size, is left out.
std::vector<Mapping> writable_mappings() {
  constexpr std::uintptr_t kMostBytes = std::uintptr_t{256} << 20;
  std::vector<Mapping> mappings;
  std::FILE* file = std::fopen("/proc/self/smaps", "r");
  REQUIRE(file != nullptr);
  char line[4096];
  bool wanted = false;
  while (std::fgets(line, sizeof(line), file) != nullptr) {
    Mapping mapping;
    char mode[8];
    if (std::sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %7s", &mapping.begin, &mapping.end, mode) ==
        3) {
      wanted = std::strncmp(mode, "rw", 2) == 0 && mapping.end - mapping.begin <= kMostBytes;
      if (wanted) mappings.push_back(mapping);
    } else if (wanted && std::strncmp(line, "VmFlags:", 8) == 0) {
      mappings.back().flags = line;
    }
  }
  std::fclose(file);
  return mappings;
}

// A key, and the mappings of this process that hold its beginning as well. All copies that the
// search makes lie in a mapping of its own, which it leaves out.
class KeySearch {
 public:
  KeySearch() {
    void* memory = ::mmap(nullptr, kHeadBytes + kPieceBytes, PROT_READ | PROT_WRITE,
                          MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(memory != MAP_FAILED);
    memory_ = static_cast<std::byte*>(memory);
    REQUIRE(::getentropy(memory_, BlockCipher::kKeyBytes) == 0);
  }
  ~KeySearch() { ::munmap(memory_, kHeadBytes + kPieceBytes); }
  KeySearch(const KeySearch&) = delete;
  KeySearch& operator=(const KeySearch&) = delete;

  std::span<const std::byte, BlockCipher::kKeyBytes> key() const {
    return std::span<const std::byte, BlockCipher::kKeyBytes>(memory_, BlockCipher::kKeyBytes);
  }

  std::vector<Mapping> run() const {
    std::vector<Mapping> found;
    const int fd = ::open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
    REQUIRE(fd >= 0);
    const auto own = reinterpret_cast<std::uintptr_t>(memory_);
    for (const Mapping& mapping : writable_mappings()) {
      if (own >= mapping.begin && own < mapping.end) continue;
      if (holds(fd, mapping)) found.push_back(mapping);
    }
    ::close(fd);
    return found;
  }

 private:
  static constexpr std::size_t kHeadBytes = kPageBytes;
  static constexpr std::size_t kPieceBytes = std::size_t{1} << 20;
  // An AES block, which is the first or the last round key of an expanded key.
  static constexpr std::size_t kNeedleBytes = BlockCipher::kUnitBytes;

  bool holds(int fd, const Mapping& mapping) const {
    std::byte* piece = memory_ + kHeadBytes;
    for (std::uintptr_t at = mapping.begin; at < mapping.end; at += kPieceBytes - kNeedleBytes) {
      const std::size_t want = std::min<std::size_t>(kPieceBytes, mapping.end - at);
      const ssize_t got = ::pread(fd, piece, want, static_cast<off_t>(at));
      if (got <= 0) continue;  // memory that cannot be read so, of a device for example
      if (::memmem(piece, static_cast<std::size_t>(got), memory_, kNeedleBytes) != nullptr) {
        return true;
      }
    }
    return false;
  }

  std::byte* memory_ = nullptr;  // the key, then the piece of memory that is searched
};

TEST_CASE("BlockCipher leaves its key in one page, which is kept out of dumps and children") {
  const KeySearch search;
  Result<std::unique_ptr<BlockCipher>> made = BlockCipher::create_with_key(search.key());
  REQUIRE_MESSAGE(made.is_ok(), made.status().to_string());
  std::unique_ptr<BlockCipher> cipher = made.take();
  const Bytes plain = random_bytes(3 * kPageBytes, 6);
  CHECK(decrypted(*cipher, 0, 1, encrypted(*cipher, 0, 1, plain)) == plain);

  const std::vector<Mapping> found = search.run();
  REQUIRE(found.size() == 1);
  CHECK(found[0].end - found[0].begin == kPageBytes);
  CHECK(found[0].flags.find(" dd") != std::string::npos);  // MADV_DONTDUMP
  CHECK(found[0].flags.find(" wf") != std::string::npos);  // MADV_WIPEONFORK
  if (!kSanitized) CHECK((found[0].flags.find(" lo") != std::string::npos) == cipher->locked());
  cipher.reset();
  CHECK(search.run().empty());
}

TEST_CASE("BlockCipher is refused in a child of fork") {
  const auto cipher = with_fresh_key();
  Bytes block(kPageBytes);
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    const bool refused =
        cipher->encrypt(0, 1, block.data(), block.data(), block.size()).code() == Code::kInvalid &&
        cipher->decrypt(0, 1, block.data(), block.data(), block.size()).code() == Code::kInvalid;
    ::_exit(refused && block == Bytes(kPageBytes) ? 0 : 1);
  }
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  CHECK(cipher->encrypt(0, 1, block.data(), block.data(), block.size()).is_ok());
}

#else

TEST_CASE("A build without OpenSSL refuses encryption and says what is missing") {
  const Result<std::unique_ptr<BlockCipher>> cipher = BlockCipher::create();
  REQUIRE(!cipher.is_ok());
  CHECK(cipher.status().code() == Code::kUnsupported);
  CHECK(cipher.status().to_string().find("this build has no OpenSSL") != std::string::npos);
}

#endif

}  // namespace
}  // namespace offload
