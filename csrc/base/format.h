// Numbers as people read them, for messages. Pure functions, safe from any thread.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

namespace offload {

// "512 B", "4.0 KiB", "1.5 GiB": binary units, one decimal above bytes.
inline std::string human_bytes(std::uint64_t bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  constexpr unsigned kLast = sizeof(kUnits) / sizeof(kUnits[0]) - 1;
  if (bytes < 1024) return std::to_string(bytes) + " B";
  double value = static_cast<double>(bytes);
  unsigned unit = 0;
  // 1023.95 would print as "1024.0" of the smaller unit.
  while (value >= 1023.95 && unit < kLast) {
    value /= 1024.0;
    ++unit;
  }
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f %s", value, kUnits[unit]);
  return text;
}

}  // namespace offload
