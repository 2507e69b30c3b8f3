// Streams and kinds of access by name, and an Event as Python holds it.
#pragma once

#include <string>

#include "bind/errors.h"
#include "device/device_event.h"
#include "device/order_checker.h"
#include "device/stream_id.h"

namespace offload::bind {

struct BoundEvent {  // pybind11 has no holder for a const class
  Event event;
};

// Both raise OffloadError for another name.
inline StreamId stream_of(const std::string& name) {
  for (const StreamId stream : {StreamId::kCompute, StreamId::kH2d, StreamId::kD2h}) {
    if (name == stream_name(stream)) return stream;
  }
  raise(Status::error(Code::kInvalid, "stream '" + name + "' is none of: compute, h2d, d2h"));
}

inline AccessKind access_of(const std::string& name) {
  if (name == "read") return AccessKind::kRead;
  if (name == "write") return AccessKind::kWrite;
  raise(Status::error(Code::kInvalid, "access '" + name + "' is none of: read, write"));
}

}  // namespace offload::bind
