#include "sys/syscall_hooks.h"

namespace offload {

namespace internal {
std::atomic<SyscallHooks*> g_syscall_hooks{nullptr};
}  // namespace internal

void install_syscall_hooks(SyscallHooks* hooks) {
  internal::g_syscall_hooks.store(hooks, std::memory_order_release);
}

}  // namespace offload
