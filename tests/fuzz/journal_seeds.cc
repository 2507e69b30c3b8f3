// Writes the first inputs of journal_fuzz into the folder that is its argument: journals of random
// transactions, in both forms that the fuzzer takes.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <system_error>
#include <vector>

#include "journal_model.h"

namespace offload {
namespace {

using Bytes = std::vector<std::byte>;

void append(Bytes& to, std::span<const std::byte> bytes) {
  to.insert(to.end(), bytes.begin(), bytes.end());
}

// journal_fuzz.cc has the form.
Bytes compact_form(const JournalImage& image) {
  namespace head = journal_layout::head;
  namespace txn = journal_layout::txn;
  const std::span<const std::byte> file(image.bytes);
  Bytes seed{std::byte{0}};
  append(seed, file.subspan(head::kGeneration, head::kUnused - head::kGeneration));
  for (std::uint64_t at = kPageBytes; at < file.size();) {
    const auto payload =
        journal_layout::load<std::uint64_t>(image.bytes.data() + at + txn::kPayload);
    seed.push_back(std::byte{0});
    seed.push_back(static_cast<std::byte>(payload));
    seed.push_back(static_cast<std::byte>(payload >> 8));
    append(seed, file.subspan(at + txn::kHeadBytes, payload));
    at += align_up(txn::kHeadBytes + payload, kPageBytes);
  }
  return seed;
}

bool write(const std::filesystem::path& path, const Bytes& bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
  file.close();
  return file.good();
}

}  // namespace
}  // namespace offload

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: journal_seeds FOLDER\n");
    return 2;
  }
  const std::filesystem::path folder(argv[1]);
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  bool ok = !error;
  for (unsigned seed = 0; ok && seed < 32; ++seed) {
    const offload::JournalImage image =
        offload::random_image(seed, static_cast<int>(seed % 5), seed % 2 == 0);
    ok = offload::write(folder / ("compact" + std::to_string(seed)), offload::compact_form(image));
    if (!ok || seed >= 8) continue;
    offload::Bytes raw{std::byte{1}};
    offload::append(raw, image.bytes);
    ok = offload::write(folder / ("raw" + std::to_string(seed)), raw);
  }
  if (!ok) std::fprintf(stderr, "journal_seeds: cannot write to %s\n", argv[1]);
  return ok ? 0 : 1;
}
