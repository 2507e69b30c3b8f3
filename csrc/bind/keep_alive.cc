#include "bind/keep_alive.h"

#include <atomic>
#include <utility>

namespace py = pybind11;

namespace offload::bind {
namespace {

struct Kept {
  PyObject* object;
  Kept* next = nullptr;
};

// One list for the process, as there is one interpreter. A lock could be held in a forked child for
// ever; an atomic cannot.
std::atomic<Kept*> g_dropped{nullptr};

int release_all(void* unused) {
  static_cast<void>(unused);
  Kept* kept = g_dropped.exchange(nullptr, std::memory_order_acquire);
  while (kept != nullptr) {
    const std::unique_ptr<Kept> owned(kept);
    kept = kept->next;
    Py_DECREF(owned->object);  // may run any code, this function too
  }
  return 0;
}

void drop(Kept* kept) {
  kept->next = g_dropped.load(std::memory_order_relaxed);
  while (!g_dropped.compare_exchange_weak(kept->next, kept, std::memory_order_release,
                                          std::memory_order_relaxed)) {
  }
  // When there were some already, or the interpreter has no room for the call, those that are
  // dropped now go with the next call or release_dropped(). An interpreter that ended releases
  // nothing.
  if (kept->next == nullptr && Py_IsInitialized() != 0) {
    static_cast<void>(Py_AddPendingCall(&release_all, nullptr));
  }
}

}  // namespace

std::shared_ptr<void> keep_alive(py::object object) {
  return {new Kept{object.release().ptr()}, [](void* kept) { drop(static_cast<Kept*>(kept)); }};
}

void release_dropped() {
  release_all(nullptr);
}

}  // namespace offload::bind
