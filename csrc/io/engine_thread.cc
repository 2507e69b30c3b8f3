#include "io/engine_thread.h"

#include <pthread.h>
#include <signal.h>

#include <system_error>
#include <utility>

namespace offload {

Result<std::thread> start_engine_thread(const char* name, std::function<void()> body) {
  // A thread inherits the mask of its creator; blocking here leaves it no moment with signals open.
  sigset_t all;
  sigset_t former;
  sigfillset(&all);
  int err = pthread_sigmask(SIG_SETMASK, &all, &former);
  if (err != 0) return Status::from_errno(err, "pthread_sigmask", "");
  std::thread thread;
  int start_err = 0;
  try {
    thread = std::thread(std::move(body));
  } catch (const std::system_error& error) {
    start_err = error.code().value();
  }
  if (thread.joinable()) {
    // The name is for debuggers and top; a kernel that refuses it changes nothing else.
    static_cast<void>(pthread_setname_np(thread.native_handle(), name));
  }
  // Cannot fail: SIG_SETMASK and a mask that the kernel itself returned.
  static_cast<void>(pthread_sigmask(SIG_SETMASK, &former, nullptr));
  if (start_err != 0) return Status::from_errno(start_err, "pthread_create", name);
  return thread;
}

}  // namespace offload
