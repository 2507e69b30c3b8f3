// What the tests of Journal share: journals in a directory, and their files as bytes.
//
// Single-threaded.
#pragma once

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "doctest/doctest.h"
#include "journal_testing.h"
#include "store/journal.h"
#include "temp_dir.h"

#define REQUIRE_OK(expr)                                                       \
  do {                                                                         \
    const ::offload::Status require_ok_status = (expr);                        \
    REQUIRE_MESSAGE(require_ok_status.is_ok(), require_ok_status.to_string()); \
  } while (false)

namespace offload {

inline std::unique_ptr<Journal> must_create(const TempDir& dir) {
  auto journal = Journal::create(dir.path(), "journal", test_header());
  REQUIRE_MESSAGE(journal.is_ok(), journal.status().to_string());
  return journal.take();
}

inline Journal::Opened must_open(const TempDir& dir) {
  auto opened = Journal::open(dir.path(), "journal");
  REQUIRE_MESSAGE(opened.is_ok(), opened.status().to_string());
  return opened.take();
}

inline void commit(Journal& journal, JournalModel& model) {
  JournalBatch batch;
  model.change(batch);
  REQUIRE_OK(journal.append(batch));
}

inline Status compact(Journal& journal, const JournalModel& model) {
  JournalBatch batch;
  model.snapshot(batch);
  return journal.compact(batch);
}

inline std::vector<std::string> names_in(const TempDir& dir) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(dir.path())) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

inline std::vector<std::byte> bytes_of(const TempDir& dir, const std::string& name) {
  std::ifstream file(dir.path() + "/" + name, std::ios::binary);
  REQUIRE(file.good());
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const auto* bytes = reinterpret_cast<const std::byte*>(text.data());
  return {bytes, bytes + text.size()};
}

// Keeps an existing file's mode; a new one gets 0600.
inline void write_bytes(const TempDir& dir, const std::string& name,
                        const std::vector<std::byte>& bytes) {
  const std::string path = dir.path() + "/" + name;
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
  file.close();
  REQUIRE(file.good());
  std::filesystem::permissions(
      path, std::filesystem::perms::owner_read | std::filesystem::perms::owner_write);
}

}  // namespace offload
