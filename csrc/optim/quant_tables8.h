// The tables of block_quant.h for instruction sets that look up one of eight numbers, by the low
// three bits of the index: encoding by the number of decades' lower ends that are reached, decoding
// by the exponent field of a code's float.
#pragma once

#include <cstddef>

#include "optim/block_quant.h"

namespace offload::update_internal {

struct QuantTables8 {
  // From the segment below the first cell to the last decade's. What is zero in the unsigned map,
  // and one, have no place here.
  alignas(32) float slope[8];
  alignas(32) float intercept[8];
  // Zero, whose exponent field is 0, has none either: its value is to be masked.
  alignas(32) float value_slope[8];
  alignas(32) float value_intercept[8];
};

consteval QuantTables8 make_tables8(const QuantMap& map) {
  QuantTables8 tables = {};
  for (std::size_t i = 0; i < 8; ++i) {
    tables.slope[i] = map.slope[i + 1];
    tables.intercept[i] = map.intercept[i + 1];
  }
  const std::size_t first = map.is_signed ? 127 : 128;  // the exponent field of decade 0
  for (std::size_t i = 0; i < kDecades; ++i) {
    tables.value_slope[(first + i) % 8] = map.value_slope[i];
    tables.value_intercept[(first + i) % 8] = map.value_intercept[i];
  }
  const std::size_t one = map.is_signed ? 134 : 127;
  tables.value_intercept[one % 8] = 1.0f;
  return tables;
}

inline constexpr QuantTables8 kSignedTables8 = make_tables8(kSignedMap);
inline constexpr QuantTables8 kUnsignedTables8 = make_tables8(kUnsignedMap);

}  // namespace offload::update_internal
