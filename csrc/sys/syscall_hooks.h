// Test hooks on the syscalls of sys and io: how fault tests make a disk fail.
//
// Contract: when no hooks are installed, a call costs one atomic load. Hooks are called from every
// thread that does I/O, at once, and must be thread-safe. REQUIRES of install_syscall_hooks: no
// call that could consult the previous hooks is in flight (engines are idle or closed).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace offload {

enum class SysOp : std::uint8_t {
  kOpen,
  kFallocate,
  kFtruncate,
  kPread,
  kPwrite,
  kFdatasync,
  kFsync,  // of a directory
  kLock,
  kRename,  // fd: of the directory
  kUnlink,  // likewise
  kRingSetup,
  kRingEnter,
  kRingRegister,
  kRingRead,   // on_cqe only: a read that io_uring completed
  kRingWrite,  // on_cqe only
};

struct SysCall {
  SysOp op;
  int fd = -1;
  std::size_t nbytes = 0;
  std::uint64_t offset = 0;
  int flags = 0;  // kOpen: those of open(2)
};

class SyscallHooks {
 public:
  virtual ~SyscallHooks() = default;

  // Before the call is made. Nonzero: the call is not made and fails with that errno. Lowering
  // `call.nbytes` makes a short transfer.
  virtual int before(SysCall& call) {
    static_cast<void>(call);
    return 0;
  }
  // The result that an engine sees in place of `res` (bytes, or -errno) of a ring's completion. A
  // smaller count than `res` is a short transfer.
  virtual int on_cqe(const SysCall& call, int res) {
    static_cast<void>(call);
    return res;
  }
};

namespace internal {
extern std::atomic<SyscallHooks*> g_syscall_hooks;
}  // namespace internal

// Null removes them. Not an owner.
void install_syscall_hooks(SyscallHooks* hooks);

// The errno to fail with, or 0.
inline int hook_before(SysCall& call) {
  SyscallHooks* hooks = internal::g_syscall_hooks.load(std::memory_order_acquire);
  return hooks == nullptr ? 0 : hooks->before(call);
}

inline int hook_cqe(const SysCall& call, int res) {
  SyscallHooks* hooks = internal::g_syscall_hooks.load(std::memory_order_acquire);
  return hooks == nullptr ? res : hooks->on_cqe(call, res);
}

// Installs hooks for a scope. REQUIRES: as install_syscall_hooks, at both ends; not nested.
class ScopedSyscallHooks {
 public:
  explicit ScopedSyscallHooks(SyscallHooks& hooks) { install_syscall_hooks(&hooks); }
  ~ScopedSyscallHooks() { install_syscall_hooks(nullptr); }
  ScopedSyscallHooks(const ScopedSyscallHooks&) = delete;
  ScopedSyscallHooks& operator=(const ScopedSyscallHooks&) = delete;
};

}  // namespace offload
