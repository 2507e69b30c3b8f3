// BlockCipher: AES-256-XTS (IEEE Std 1619) of the blocks of a swap file, by OpenSSL's libcrypto.
//
// Contract
//  1. The key is 512 random bits of the kernel's generator, made by create() and gone with the
//     object: what it encrypted can be read by nobody afterwards, its process included.
//  2. The nonce is XTS's 128-bit tweak. REQUIRES: no nonce is given to encrypt() twice (a counter
//     of writes does, a disk offset does not). Then equal plaintexts never show as equal
//     ciphertexts, also when a slot is rewritten with the bytes it had, and nobody who compares
//     two images of the disk sees which 16-byte pieces of a slot have changed.
//  3. XTS hides the bytes; it does not authenticate them. A changed ciphertext decrypts to noise
//     that a checksum of the plaintext finds.
//  4. `in` and `out` are the same address or do not overlap. `nbytes` is a multiple of kUnitBytes,
//     from one to kMaxBytes; anything else is kInvalid and leaves `out` alone.
//  5. The key lies in memory that is locked where RLIMIT_MEMLOCK allows (locked() tells), left out
//     of core dumps, zero in a child of fork() and wiped by the destructor. libcrypto's expanded
//     keys, which it keeps on the heap, are overwritten at the end of each call.
//  6. In a child of fork() encrypt() and decrypt() are refused (kInvalid).
//
// Thread-safe; calls on several threads run at once. Allocates only when more threads are inside a
// call than ever before.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "base/status.h"

namespace offload {

class BlockCipher {
 public:
  static constexpr std::size_t kKeyBytes = 64;   // two different AES-256 keys: data, then tweak
  static constexpr std::size_t kUnitBytes = 16;  // an AES block
  static constexpr std::size_t kMaxBytes = std::size_t{16} << 20;  // IEEE 1619: 2^20 AES blocks

  // With a fresh key. kUnsupported: this build has no OpenSSL, or its libcrypto no AES-256-XTS.
  static Result<std::unique_ptr<BlockCipher>> create();
  // With a given key, for published test vectors. kInvalid: its halves are equal.
  static Result<std::unique_ptr<BlockCipher>> create_with_key(
      std::span<const std::byte, kKeyBytes> key);

  BlockCipher() = default;
  BlockCipher(const BlockCipher&) = delete;
  BlockCipher& operator=(const BlockCipher&) = delete;
  virtual ~BlockCipher() = default;

  // The nonce's value is nonce_hi * 2^64 + nonce_lo.
  virtual Status encrypt(std::uint64_t nonce_hi, std::uint64_t nonce_lo, const std::byte* in,
                         std::byte* out, std::size_t nbytes) const = 0;
  virtual Status decrypt(std::uint64_t nonce_hi, std::uint64_t nonce_lo, const std::byte* in,
                         std::byte* out, std::size_t nbytes) const = 0;
  // Whether the key can not be written to the system's own swap.
  virtual bool locked() const = 0;
};

}  // namespace offload
