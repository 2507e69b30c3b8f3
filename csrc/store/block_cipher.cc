#include "store/block_cipher.h"

#ifdef OFFLOAD_HAVE_OPENSSL

#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <sys/mman.h>
#include <sys/random.h>

#include <cerrno>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/align.h"
#include "base/format.h"
#include "sys/at_fork.h"

namespace offload {
namespace {

constexpr std::size_t kHalfBytes = BlockCipher::kKeyBytes / 2;

// What libcrypto says of its failed call `op`; empties its queue of errors, which is the thread's
// and not ours alone.
Status openssl_error(Code code, const char* op) {
  std::string message = std::string("libcrypto failed in ") + op;
  char text[256];
  while (const unsigned long error = ERR_get_error()) {
    ERR_error_string_n(error, text, sizeof(text));
    message += std::string(": ") + text;
  }
  return Status::error(code, message);
}

// A page for one key; contract point 5.
class KeyPage {
 public:
  static Result<KeyPage> map() {
    void* page =
        ::mmap(nullptr, kPageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) return Status::from_errno(errno, "mmap", "a key");
    KeyPage key(static_cast<unsigned char*>(page));
    for (const int advice : {MADV_DONTDUMP, MADV_WIPEONFORK}) {
      if (::madvise(page, kPageBytes, advice) != 0) {
        return Status::from_errno(errno, "madvise", "a key");
      }
    }
    key.locked_ = ::mlock(page, kPageBytes) == 0;
    return key;
  }

  KeyPage(KeyPage&& other) noexcept
      : bytes_(std::exchange(other.bytes_, nullptr)), locked_(other.locked_) {}
  KeyPage& operator=(KeyPage&&) = delete;
  ~KeyPage() {
    if (bytes_ == nullptr) return;
    OPENSSL_cleanse(bytes_, BlockCipher::kKeyBytes);
    // Unlocks as well; it cannot fail on a mapping of our own.
    static_cast<void>(::munmap(bytes_, kPageBytes));
  }

  unsigned char* bytes() const { return bytes_; }
  bool locked() const { return locked_; }
  // XTS is not secure when its two keys are the same.
  bool halves_differ() const { return CRYPTO_memcmp(bytes_, bytes_ + kHalfBytes, kHalfBytes) != 0; }

 private:
  explicit KeyPage(unsigned char* bytes) : bytes_(bytes) {}

  unsigned char* bytes_;
  bool locked_ = false;
};

struct CipherFree {
  void operator()(EVP_CIPHER* cipher) const { EVP_CIPHER_free(cipher); }
};
struct ContextFree {
  void operator()(EVP_CIPHER_CTX* context) const { EVP_CIPHER_CTX_free(context); }
};
using CipherPtr = std::unique_ptr<EVP_CIPHER, CipherFree>;
using ContextPtr = std::unique_ptr<EVP_CIPHER_CTX, ContextFree>;

// Set in place of the key at the end of each call: libcrypto expands it over the real one.
struct WipingKey {
  unsigned char bytes[BlockCipher::kKeyBytes] = {1};
};
constexpr WipingKey kWipingKey;

void put_little_endian(std::uint64_t value, unsigned char* out) {
  for (int i = 0; i < 8; ++i) out[i] = static_cast<unsigned char>(value >> (8 * i));
}

class XtsCipher final : public BlockCipher {
 public:
  XtsCipher(CipherPtr cipher, KeyPage key) : cipher_(std::move(cipher)), key_(std::move(key)) {}

  Status encrypt(std::uint64_t nonce_hi, std::uint64_t nonce_lo, const std::byte* in,
                 std::byte* out, std::size_t nbytes) const override {
    return run(Direction::kEncrypt, nonce_hi, nonce_lo, in, out, nbytes);
  }
  Status decrypt(std::uint64_t nonce_hi, std::uint64_t nonce_lo, const std::byte* in,
                 std::byte* out, std::size_t nbytes) const override {
    return run(Direction::kDecrypt, nonce_hi, nonce_lo, in, out, nbytes);
  }
  bool locked() const override { return key_.locked(); }

  // Also makes the first context, so that a libcrypto which cannot is found early.
  Status warm_up() {
    std::byte block[kUnitBytes] = {};
    return encrypt(0, 0, block, block, sizeof(block));
  }

 private:
  enum Direction : int { kDecrypt = 0, kEncrypt = 1 };  // as EVP_CipherInit_ex2 has them

  Status run(Direction direction, std::uint64_t nonce_hi, std::uint64_t nonce_lo,
             const std::byte* in, std::byte* out, std::size_t nbytes) const {
    if (!owner_.is_current()) {
      return Status::error(Code::kInvalid, "a BlockCipher has no key in a child of fork()");
    }
    if (nbytes == 0 || nbytes > kMaxBytes || nbytes % kUnitBytes != 0) {
      return Status::error(Code::kInvalid, "AES-256-XTS of " + std::to_string(nbytes) +
                                               " bytes: a multiple of 16, at most " +
                                               human_bytes(kMaxBytes) + ", is needed");
    }
    Result<ContextPtr> acquired = acquire();
    if (!acquired.is_ok()) return acquired.status();
    ContextPtr context = acquired.take();
    const Status status =
        transform(context.get(), direction, nonce_hi, nonce_lo, in, out, static_cast<int>(nbytes));
    if (EVP_CipherInit_ex2(context.get(), nullptr, kWipingKey.bytes, nullptr, direction, nullptr) ==
        1) {
      release(std::move(context));
    } else {
      ERR_clear_error();  // freeing the context cleanses the expanded key as well
    }
    return status;
  }

  Status transform(EVP_CIPHER_CTX* context, Direction direction, std::uint64_t nonce_hi,
                   std::uint64_t nonce_lo, const std::byte* in, std::byte* out, int nbytes) const {
    unsigned char tweak[16];
    put_little_endian(nonce_lo, tweak);
    put_little_endian(nonce_hi, tweak + 8);
    if (EVP_CipherInit_ex2(context, nullptr, key_.bytes(), tweak, direction, nullptr) != 1) {
      return openssl_error(Code::kUnsupported, "EVP_CipherInit_ex2");
    }
    int done = 0;
    if (EVP_CipherUpdate(context, reinterpret_cast<unsigned char*>(out), &done,
                         reinterpret_cast<const unsigned char*>(in), nbytes) != 1) {
      return openssl_error(Code::kUnsupported, "EVP_CipherUpdate");
    }
    if (done != nbytes) {
      return Status::error(Code::kUnsupported, "libcrypto ciphered " + std::to_string(done) +
                                                   " of " + std::to_string(nbytes) + " bytes");
    }
    return Status::ok();
  }

  // A context that has the cipher and no key.
  Result<ContextPtr> acquire() const {
    {
      std::lock_guard lock(mutex_);
      if (!idle_.empty()) {
        ContextPtr context = std::move(idle_.back());
        idle_.pop_back();
        return context;
      }
    }
    ContextPtr context(EVP_CIPHER_CTX_new());
    if (context == nullptr) return openssl_error(Code::kNoMemory, "EVP_CIPHER_CTX_new");
    if (EVP_CipherInit_ex2(context.get(), cipher_.get(), nullptr, nullptr, kEncrypt, nullptr) !=
        1) {
      return openssl_error(Code::kUnsupported, "EVP_CipherInit_ex2");
    }
    return context;
  }

  void release(ContextPtr context) const {
    std::lock_guard lock(mutex_);
    idle_.push_back(std::move(context));
  }

  const OwnerProcess owner_;
  const CipherPtr cipher_;
  const KeyPage key_;
  mutable std::mutex mutex_;
  mutable std::vector<ContextPtr> idle_;  // guarded by mutex_
};

Result<std::unique_ptr<BlockCipher>> make(KeyPage key) {
  CipherPtr cipher(EVP_CIPHER_fetch(nullptr, "AES-256-XTS", nullptr));
  if (cipher == nullptr) return openssl_error(Code::kUnsupported, "EVP_CIPHER_fetch AES-256-XTS");
  auto made = std::make_unique<XtsCipher>(std::move(cipher), std::move(key));
  OFFLOAD_RETURN_IF_ERROR(made->warm_up());
  return std::unique_ptr<BlockCipher>(std::move(made));
}

Status fill_random(unsigned char* out, std::size_t nbytes) {
  while (nbytes > 0) {
    const ssize_t got = ::getrandom(out, nbytes, 0);
    if (got < 0) {
      if (errno == EINTR) continue;
      return Status::from_errno(errno, "getrandom", "a key");
    }
    out += got;
    nbytes -= static_cast<std::size_t>(got);
  }
  return Status::ok();
}

}  // namespace

Result<std::unique_ptr<BlockCipher>> BlockCipher::create() {
  Result<KeyPage> page = KeyPage::map();
  if (!page.is_ok()) return page.status();
  do {
    OFFLOAD_RETURN_IF_ERROR(fill_random(page.value().bytes(), kKeyBytes));
  } while (!page.value().halves_differ());
  return make(page.take());
}

Result<std::unique_ptr<BlockCipher>> BlockCipher::create_with_key(
    std::span<const std::byte, kKeyBytes> key) {
  Result<KeyPage> page = KeyPage::map();
  if (!page.is_ok()) return page.status();
  std::memcpy(page.value().bytes(), key.data(), kKeyBytes);
  if (!page.value().halves_differ()) {
    return Status::error(Code::kInvalid, "the two halves of an XTS key must differ");
  }
  return make(page.take());
}

}  // namespace offload

#else  // without OpenSSL

namespace offload {
namespace {

Status no_openssl() {
  return Status::error(Code::kUnsupported,
                       "this build has no OpenSSL (3.0 or later), so swap cannot be encrypted; "
                       "install its headers (Debian: libssl-dev) and build again");
}

}  // namespace

Result<std::unique_ptr<BlockCipher>> BlockCipher::create() {
  return no_openssl();
}

Result<std::unique_ptr<BlockCipher>> BlockCipher::create_with_key(
    std::span<const std::byte, kKeyBytes>) {
  return no_openssl();
}

}  // namespace offload

#endif  // OFFLOAD_HAVE_OPENSSL
