// Python objects that native memory needs alive, and that may be done with on any thread.
//
// No thread of ours ever waits for the GIL. So an object whose last native reference goes is put on
// a list, and the list is released with the GIL held: by the interpreter, which is asked to as soon
// as it can (Py_AddPendingCall), or by release_dropped(), whichever is first.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

namespace offload::bind {

// Keeps `object` alive until some time after the last copy of the pointer is gone. REQUIRES: the
// GIL is held here; copies may go without it.
std::shared_ptr<void> keep_alive(pybind11::object object);

// Releases what was dropped up to now. REQUIRES: the GIL is held. Called after a wait, so that what
// was waited for holds nothing any more.
void release_dropped();

}  // namespace offload::bind
