// SwapStore's transfers in flight. For csrc/store/swap_store*.cc only.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "store/swap_store.h"

namespace offload {

class SwapStore::BlockRequest final : public IoRequest {
 public:
  Status prepare() override;              // checksum and encrypt
  void complete(Status status) override;  // decrypt and verify; divert when the disk is full

  Group* group = nullptr;
  ObjectId object = kNoObject;
  std::size_t index = 0;      // of the block in the object
  std::byte* data = nullptr;  // the caller's; `buffer` may be a copy of it
  Place place;                // where it is, or will be
  std::size_t diversions = 0;

 private:
  void give_back_copy();
};

class SwapStore::Group {
 public:
  // Starts a transfer with room for `blocks` requests, which are added to `requests`.
  void begin(SwapStore& owner, IoOp op_, std::size_t blocks, Completion done, BlockDone block_done,
             CacheUse use_);
  // Engine threads, and submitters; `data` is the caller's buffer of the block. The last block
  // publishes the transfer, calls the completion and hands `this` back to the store.
  void block_done(std::byte* data, const Status& status);
  Completion take_completion() { return std::exchange(done_, nullptr); }

  IoOp op = IoOp::kRead;
  CacheUse use = CacheUse::kPass;
  SwapStore* store = nullptr;
  std::vector<BlockRequest> requests;            // not resized while in flight
  std::vector<std::vector<IoRequest*>> batches;  // by stripe

 private:
  Completion done_;
  BlockDone block_done_ = {};
  std::atomic<std::size_t> left_{0};
  std::mutex mutex_;
  Status first_error_;  // guarded by mutex_
};

}  // namespace offload
