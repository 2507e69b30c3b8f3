#include "sys/engine_thread.h"

#include <signal.h>

#include <memory>
#include <utility>

namespace offload {
namespace {

using Body = std::function<void()>;

void* run(void* argument) {
  const std::unique_ptr<Body> body(static_cast<Body*>(argument));
  (*body)();
  return nullptr;
}

}  // namespace

Result<EngineThread> EngineThread::start(const char* name, std::function<void()> body) {
  // A thread inherits the mask of its creator; blocking here leaves it no moment with signals open.
  sigset_t all;
  sigset_t former;
  sigfillset(&all);
  int err = pthread_sigmask(SIG_SETMASK, &all, &former);
  if (err != 0) return Status::from_errno(err, "pthread_sigmask", "");
  pthread_attr_t attributes;
  err = pthread_attr_init(&attributes);
  pthread_t handle{};
  if (err == 0) {
    auto owned = std::make_unique<Body>(std::move(body));
    err = pthread_attr_setstacksize(&attributes, kStackBytes);
    if (err == 0) err = pthread_create(&handle, &attributes, run, owned.get());
    if (err == 0) static_cast<void>(owned.release());  // run() owns it now
    // Frees nothing on Linux; its result says nothing about the thread.
    static_cast<void>(pthread_attr_destroy(&attributes));
  }
  // Cannot fail: SIG_SETMASK and a mask that the kernel itself returned.
  static_cast<void>(pthread_sigmask(SIG_SETMASK, &former, nullptr));
  if (err != 0) return Status::from_errno(err, "pthread_create", name);
  // The name is for debuggers and top; a kernel that refuses it changes nothing else.
  static_cast<void>(pthread_setname_np(handle, name));
  return EngineThread(handle);
}

EngineThread::EngineThread(EngineThread&& other) noexcept {
  *this = std::move(other);
}

EngineThread& EngineThread::operator=(EngineThread&& other) noexcept {
  if (this != &other) {
    join();
    if (other.handle_.has_value()) handle_.emplace(*other.handle_);
    other.handle_.reset();
  }
  return *this;
}

EngineThread::~EngineThread() {
  join();
}

void EngineThread::join() {
  if (!handle_.has_value()) return;
  // Fails only for a thread that is not joinable or is this one, which start() and REQUIRES rule
  // out.
  if (handle_->owner.is_current()) static_cast<void>(pthread_join(handle_->thread, nullptr));
  handle_.reset();
}

}  // namespace offload
