// The streams of a device. Work on one stream happens in the order in which it was submitted; work
// on different ones is ordered by events only.
#pragma once

#include <cstddef>
#include <cstdint>

namespace offload {

enum class StreamId : std::uint8_t {
  kCompute,  // where the model computes: torch's current stream
  kH2d,      // copies to the device
  kD2h,      // copies to the host
};
inline constexpr std::size_t kStreams = 3;

constexpr const char* stream_name(StreamId stream) {
  switch (stream) {
    case StreamId::kCompute:
      return "compute";
    case StreamId::kH2d:
      return "h2d";
    case StreamId::kD2h:
      return "d2h";
  }
  return "unknown";
}

}  // namespace offload
