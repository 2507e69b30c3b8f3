// What the tests of replay_journal share: its answer compared with the model's.
//
// Single-threaded.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "doctest/doctest.h"
#include "journal_model.h"
#include "store/journal_format.h"

namespace offload {

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// Whether `bytes` replay to the state after transaction `n` of `image`.
inline bool replays_as(const std::vector<std::byte>& bytes, const JournalImage& image,
                       std::size_t n) {
  const Result<JournalReplay> replay = replay_journal(bytes);
  if (!replay.is_ok()) {
    MESSAGE(replay.status().to_string());
    return false;
  }
  return replay.value().objects == image.states[n] && replay.value().valid_bytes == image.ends[n] &&
         replay.value().sequence == image.sequence - (image.ends.size() - 1 - n);
}

inline bool is_corrupt(const std::vector<std::byte>& bytes) {
  const Result<JournalReplay> replay = replay_journal(bytes);
  return !replay.is_ok() && replay.status().code() == Code::kCorrupt &&
         contains(replay.status().to_string(), "at byte ");
}

inline void check_rejected(const JournalImage& image, const std::string& why) {
  const Result<JournalReplay> replay = replay_journal(image.bytes);
  REQUIRE_FALSE(replay.is_ok());
  INFO(replay.status().to_string());
  CHECK(replay.status().code() == Code::kCorrupt);
  CHECK(contains(replay.status().to_string(), why));
}

}  // namespace offload
