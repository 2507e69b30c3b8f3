// SwapStore with encryption: the same bytes back, none of them on disk.
#ifdef OFFLOAD_HAVE_OPENSSL

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "doctest/doctest.h"
#include "store/swap_store.h"
#include "store_testing.h"
#include "temp_dir.h"

namespace offload {
namespace {

template <typename Engine>
std::shared_ptr<SwapStore> open_encrypted(const TempDir& dir) {
  Result<std::shared_ptr<SwapStore>> store = SwapStore::open(
      {.dirs = {{dir.path()}}, .engine = Engine::kKind, .io = {.queue_depth = 4}, .encrypt = true});
  if (!store.is_ok()) {
    MESSAGE("skipped: ", store.status().to_string());
    return nullptr;
  }
  return store.take();
}

// Everything that is in the file.
std::vector<std::byte> raw(const SwapStore& store) {
  const int fd = store.stripes()[0].file.fd.get();
  struct stat info = {};
  REQUIRE(::fstat(fd, &info) == 0);
  const auto nbytes = static_cast<std::size_t>(info.st_size);
  const Buffer buffer(nbytes);
  REQUIRE(::pread(fd, buffer.get(), nbytes, 0) == static_cast<ssize_t>(nbytes));
  return {buffer.get(), buffer.get() + nbytes};
}

}  // namespace

TEST_CASE_TEMPLATE("An encrypted SwapStore gives back what it was given and shows none of it",
                   Engine, OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_encrypted<Engine>(dir);
  if (!store) return;
  CHECK(store->encrypted());
  CHECK(store->bounce_bytes() == SwapStore::bounce_bytes_for(1, 4, kBlock));
  constexpr std::uint64_t kNbytes = 12 * kBlock + 777;
  REQUIRE(store->reserve(16 * kBlock, 16 * kBlock).is_ok());
  const ObjectId object = create_object(*store, kNbytes);
  const Buffer zeros(kNbytes);
  // Equal blocks, written again and again: every page in the file is different from the others.
  for (int version = 0; version < 3; ++version) must_write(*store, object, zeros, kNbytes);
  CHECK(reads_as(*store, object, zeros, kNbytes));
  const std::vector<std::byte> file = raw(*store);
  std::set<std::string> pages;
  std::size_t count = 0;
  std::size_t plain = 0;
  for (std::size_t at = 0; at + kPageBytes <= file.size(); at += kPageBytes) {
    if (at / kBlock >= 2 * 12 + 2) break;  // slots that were never written hold zeros
    const std::string page(reinterpret_cast<const char*>(file.data() + at), kPageBytes);
    if (page == std::string(kPageBytes, '\0')) {
      ++plain;
      continue;
    }
    ++count;
    pages.insert(page);
  }
  CHECK(pages.size() == count);
  // All but the unwritten rest of the two slots with the short last block.
  CHECK(count >= 24 * kBlock / kPageBytes);
  CHECK(plain <= 2 * (kBlock / kPageBytes - 1) + 6 * kBlock / kPageBytes);
  const auto bytes = random_bytes(kNbytes, 3);
  must_write(*store, object, *bytes, kNbytes);
  CHECK(reads_as(*store, object, *bytes, kNbytes));
  CHECK(store->close().is_ok());
}

TEST_CASE_TEMPLATE("An encrypted SwapStore keeps versions, and finds changed bytes", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_encrypted<Engine>(dir);
  if (!store) return;
  REQUIRE(store->reserve(40 * kBlock, 40 * kBlock).is_ok());
  const ObjectId object = create_object(*store, 40 * kBlock);
  const auto first = random_bytes(40 * kBlock, 1);
  must_write(*store, object, *first, 40 * kBlock);
  const auto second = random_bytes(40 * kBlock, 2);
  {
    OpFaults faults(IoOp::kWrite, [](unsigned n) { return n % 7 == 6 ? EIO : 0; });
    for (int i = 0; i < 3; ++i) {  // every buffer comes back from a failed write
      CHECK(write_now(*store, {{object, 0, second->get(), 40 * kBlock}}).os_errno() == EIO);
    }
  }
  CHECK(reads_as(*store, object, *first, 40 * kBlock));
  must_write(*store, object, *second, 40 * kBlock);
  CHECK(reads_as(*store, object, *second, 40 * kBlock));
  const int fd = store->stripes()[0].file.fd.get();
  const Buffer page(kPageBytes);
  for (std::uint64_t slot = 0; slot < 80; ++slot) {
    const auto at = static_cast<off_t>(slot * kBlock);
    REQUIRE(::pread(fd, page.get(), kPageBytes, at) == static_cast<ssize_t>(kPageBytes));
    page.get()[100] ^= std::byte{1};
    REQUIRE(::pwrite(fd, page.get(), kPageBytes, at) == static_cast<ssize_t>(kPageBytes));
  }
  const Buffer buffer(40 * kBlock);
  CHECK(read_now(*store, {{object, 0, buffer.get(), 40 * kBlock}}).code() == Code::kCorrupt);
}

TEST_CASE("A durable store is not encrypted") {
  TempDir dir;
  const auto refused =
      SwapStore::open_durable({.dirs = {{dir.path()}}, .io = {}, .encrypt = true}, "model", true);
  CHECK(refused.status().code() == Code::kInvalid);
  CHECK(dir.empty());
}

}  // namespace offload

#endif  // OFFLOAD_HAVE_OPENSSL
