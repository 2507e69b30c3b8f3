// Compile-time tables of CRC32C: bytes to registers, and "append L zero bytes" to a register.
//
// A register holds a polynomial over GF(2) modulo the Castagnoli polynomial, reflected: bit i is
// the coefficient of x^(31-i). Constants only: thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>

namespace offload::crc32c_internal {

inline constexpr std::uint32_t kPolynomial = 0x82f63b78;

// a * b modulo the polynomial.
constexpr std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
  std::uint32_t product = 0;
  for (std::uint32_t bit = 0x80000000; bit != 0; bit >>= 1) {
    if ((a & bit) != 0) product ^= b;
    b = (b >> 1) ^ ((b & 1) != 0 ? kPolynomial : 0);
  }
  return product;
}

// x^exponent modulo the polynomial.
constexpr std::uint32_t power_of_x(std::uint64_t exponent) {
  std::uint32_t result = 0x80000000;  // x^0
  std::uint32_t square = 0x40000000;  // x^1
  for (; exponent != 0; exponent >>= 1) {
    if ((exponent & 1) != 0) result = multiply(result, square);
    square = multiply(square, square);
  }
  return result;
}

// entry[k][b]: the register after byte b and then k zero bytes, from a zero register.
struct SlicingTable {
  std::uint32_t entry[8][256];
};

constexpr SlicingTable make_slicing_table() {
  SlicingTable table{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? kPolynomial : 0);
    table.entry[0][byte] = crc;
  }
  for (int k = 1; k < 8; ++k) {
    for (std::size_t byte = 0; byte < 256; ++byte) {
      const std::uint32_t previous = table.entry[k - 1][byte];
      table.entry[k][byte] = (previous >> 8) ^ table.entry[0][previous & 0xff];
    }
  }
  return table;
}

inline constexpr SlicingTable kSlicing = make_slicing_table();

// entry[k][b]: the register whose byte k is b and whose other bytes are zero, after appending a
// fixed number of zero bytes. Appending is linear, so four look-ups give any register.
struct ShiftTable {
  std::uint32_t entry[4][256];
};

constexpr ShiftTable make_shift_table(std::uint64_t zero_bytes) {
  ShiftTable table{};
  const std::uint32_t factor = power_of_x(8 * zero_bytes);
  for (std::size_t k = 0; k < 4; ++k) {
    for (std::size_t bit = 0; bit < 8; ++bit) {
      const std::size_t power = std::size_t{1} << bit;
      const std::uint32_t column = multiply(std::uint32_t{1} << (8 * k + bit), factor);
      for (std::size_t low = 0; low < power; ++low) {
        table.entry[k][power + low] = table.entry[k][low] ^ column;
      }
    }
  }
  return table;
}

}  // namespace offload::crc32c_internal
