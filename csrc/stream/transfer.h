// Transfer: bytes in flight between a lease and the swap store, which can be waited for. An
// optimizer update (update_pipeline.h) is a transfer that computes on the way.
//
// A transfer owns what it moves from or to (the Lease) until it completes and gives that up before
// a waiter wakes. Dropping the last handle to it does not cancel it; cancel() does, as far as it
// has not started. Thread-safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>

#include "base/status.h"
#include "mem/host_memory.h"
#include "store/file_ranges.h"
#include "store/swap_store.h"
#include "stream/prerequisite.h"

namespace offload {

class Transfer : public Prerequisite {
 public:
  // Moves the first `nbytes` of the lease to (write) or from (read) the whole of `object`. kInvalid
  // when that is not the object's size.
  static Result<std::shared_ptr<Transfer>> write(SwapStore& store, ObjectId object,
                                                 std::shared_ptr<Lease> lease, std::uint64_t nbytes,
                                                 IoPriority priority);
  static Result<std::shared_ptr<Transfer>> read(SwapStore& store, ObjectId object,
                                                std::shared_ptr<Lease> lease, std::uint64_t nbytes,
                                                IoPriority priority);

  // Bytes [begin, end) of an object and of the lease.
  using Span = FileRanges::Span;
  // Reads `spans` of an object of `nbytes`, each to its place in the lease, the rest of which stays
  // as it is. kInvalid when there are none, or one does not consist of whole blocks.
  static Result<std::shared_ptr<Transfer>> read_blocks(SwapStore& store, ObjectId object,
                                                       std::shared_ptr<Lease> lease,
                                                       std::uint64_t nbytes,
                                                       std::span<const Span> spans,
                                                       IoPriority priority);

  // Reads all of `ranges` to the lease. kInvalid when it is too small.
  static Result<std::shared_ptr<Transfer>> read(FileRanges& ranges, std::shared_ptr<Lease> lease,
                                                IoPriority priority);
  // Reads those of its blocks that `spans`, ascending, consist of.
  static Result<std::shared_ptr<Transfer>> read_blocks(FileRanges& ranges,
                                                       std::shared_ptr<Lease> lease,
                                                       std::span<const Span> spans,
                                                       IoPriority priority);

  // Blocks until done; the transfer's outcome. May be called any number of times.
  Status wait();
  // The same for at most `milliseconds`; false when that was not enough.
  bool wait_for(unsigned milliseconds) const;
  bool await(unsigned milliseconds) override { return wait_for(milliseconds); }

  // What of it has not started yet does not; the transfer then ends with kCancelled, a write
  // leaving the previous version. One that is further on, or an optimizer update, ends as it would
  // have.
  void cancel() { cancelled_ = true; }

  // By whoever carries the transfer out: before anybody else has it, what its work follows, which
  // a waiter waits for too; at last, once, its outcome.
  void follow(Prerequisites after);
  void finish(const Status& status);
  // Waits for what its work follows.
  void await_prerequisites() const;

 private:
  static Result<std::shared_ptr<Transfer>> start(SwapStore& store, IoOp op, ObjectId object,
                                                 std::shared_ptr<Lease> lease, std::uint64_t nbytes,
                                                 std::span<const Span> spans, IoPriority priority);
  // `read` starts a read to the memory it is given.
  template <typename Read>
  static Result<std::shared_ptr<Transfer>> from_files(const FileRanges& ranges,
                                                      std::shared_ptr<Lease> lease, Read read);

  Prerequisites prerequisites() const;

  std::atomic<bool> cancelled_{false};
  Prerequisites after_;  // until done; mutex_ guards it
};

}  // namespace offload
