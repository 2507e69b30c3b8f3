// IoEngine: asynchronous reads and writes of (buffer, bytes, offset), the only way bytes reach a
// swap file after it is opened. Two engines implement it (io_uring, thread pool); one contract
// suite, tests/cpp/io_engine_contract_test.cc, runs against both.
//
// Contract
//  1. submit() is thread-safe, never blocks on the disk and allocates nothing. When it returns ok,
//     complete() is called exactly once for every request of the batch; when it fails, for none.
//     kInvalid: a request is null, has no file, buffer or bytes, or ends beyond 2^63 - 1. A batch
//     may be empty: its Status tells whether the engine takes requests.
//  2. A short transfer is continued, EINTR and EAGAIN are retried, inside the engine: a request
//     completes with ok only when all of its bytes were moved. End of file inside a read is an
//     error (kCorrupt: the file is shorter than its map).
//  3. The request and its buffer belong to the engine from submit() until complete() is entered.
//  4. prepare() and complete() run on an engine thread, without any engine lock held. They must
//     not block on other I/O of the same engine, nor call close(); they may call submit().
//     complete() may destroy the request. When prepare() fails, the request completes with its
//     Status and no byte moves. An engine may prepare one request while it waits for a place; it
//     can then still be cancelled or closed, or be overtaken.
//  5. Order: see io_scheduler.h. Demand requests that wait for a place overtake background ones;
//     within a priority (and, in phases, a direction) requests start in the order in which they
//     were submitted. They complete in any order.
//  6. close() refuses new requests, waits for those in flight, and completes queued ones that were
//     never started with kClosed. It is idempotent and thread-safe; the destructor calls it.
//     Called on an engine thread it is refused (kInvalid).
//     A request whose `cancel` was set by the time it would start completes with kCancelled; one
//     in flight runs to its end.
//  7. A failure of the engine itself (not of one request) is sticky: it ends every request that is
//     queued, refuses new ones, and is what close() returns.
//  8. Engine threads block all signals. An engine does not survive fork(): in a child, submit()
//     and close() are refused (kInvalid), and the destructor lets go of what the child shares.
//  9. add_memory() names memory that requests will often move to or from. The engine may keep it
//     pinned (and its owner alive) until it is closed; requests elsewhere are served as well.
//     Around a fork() everything is unpinned, so that children share memory instead of copying it;
//     only the buffers of transfers in flight stay pinned, as for any direct I/O.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"

namespace offload {

enum class IoOp : std::uint8_t { kRead, kWrite };
enum class IoPriority : std::uint8_t { kDemand, kBackground };

class IoRequest {
 public:
  virtual ~IoRequest() = default;

  IoOp op = IoOp::kRead;
  IoPriority priority = IoPriority::kBackground;
  int fd = -1;
  const char* path = "";  // for messages only; must outlive the request
  std::byte* buffer = nullptr;
  std::size_t nbytes = 0;
  std::uint64_t offset = 0;
  const std::atomic<bool>* cancel = nullptr;  // not an owner; must outlive the request

  // Engine thread, once, before the first byte moves: the place for a checksum of what is written.
  // May point `buffer` elsewhere.
  virtual Status prepare() { return Status::ok(); }
  // Engine thread, once, when all bytes moved or the request failed.
  virtual void complete(Status status) = 0;

 private:
  friend class IoEngineAccess;
  std::size_t moved_ = 0;      // bytes done so far; engines only
  unsigned retries_ = 0;       // since the last byte moved; engines only
  std::uint64_t ticket_ = 0;   // order of submission; engines only
  IoRequest* next_ = nullptr;  // in the one engine list that holds it
};

// Engines reach a request's progress and list link through this alone.
class IoEngineAccess {
 public:
  static std::size_t& moved(IoRequest& request) { return request.moved_; }
  static unsigned& retries(IoRequest& request) { return request.retries_; }
  static std::uint64_t& ticket(IoRequest& request) { return request.ticket_; }
  static std::uint64_t ticket(const IoRequest* request) { return request->ticket_; }
  static IoRequest*& next(IoRequest& request) { return request.next_; }
};

struct IoCounters {
  std::uint64_t bytes_read = 0;     // those of failed requests included
  std::uint64_t bytes_written = 0;  // likewise
  std::uint64_t requests = 0;       // started and completed, failed ones included
  std::uint64_t continued = 0;      // short transfers that were continued
  std::uint64_t retried = 0;        // EINTR / EAGAIN
  std::uint64_t failed = 0;         // of `requests`
  std::uint64_t busy_ns = 0;        // time with at least one request in flight

  IoCounters& operator+=(const IoCounters& other);
};

struct IoEngineOptions {
  unsigned queue_depth = 16;      // requests in flight at the most; 1 to kMaxQueueDepth
  unsigned threads = 4;           // of the thread-pool engine; 1 to kMaxThreads
  std::uint64_t phase_bytes = 0;  // bytes of one direction before the other has its turn; 0: mix
  std::vector<int> files = {};    // descriptors that most requests will be on, open until close()

  static constexpr unsigned kMaxQueueDepth = 4096;
  static constexpr unsigned kMaxThreads = 256;
};

// Memory that stays mapped as long as `owner` lives.
struct MemoryRegion {
  std::byte* base = nullptr;
  std::size_t nbytes = 0;
  std::shared_ptr<const void> owner;
};

class IoEngine {
 public:
  virtual ~IoEngine() = default;
  virtual const char* name() const = 0;      // "io_uring" or "threads"
  virtual std::string describe() const = 0;  // what of the kernel it uses, and what it lacks
  [[nodiscard]] virtual Status submit(std::span<IoRequest* const> requests) = 0;
  [[nodiscard]] Status submit(std::initializer_list<IoRequest*> requests) {
    return submit(std::span<IoRequest* const>(requests.begin(), requests.size()));
  }
  virtual void add_memory(MemoryRegion region) = 0;
  [[nodiscard]] virtual Status close() = 0;
  virtual IoCounters counters() const = 0;
};

}  // namespace offload
