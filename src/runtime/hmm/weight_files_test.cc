// Reading weight files: every piece comes once with its own bytes, from the page cache or past it, however
// it lies; a file that changed meanwhile is an error with its name.
#include "runtime/hmm/weight_files.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <thread>

#include "base/rng.h"
#include "runtime/hmm/async_reads.h"
#include "runtime/hmm/backing.h"

namespace elasticmoe::runtime {
namespace {

namespace fs = std::filesystem;

class WeightFilesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    // On a disk, where there is one: memory is always in the page cache.
    std::string name = (fs::current_path() / "weight_files_XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    directory_ = name;
  }
  void TearDown() override { fs::remove_all(directory_); }

  fs::path Write(const std::string& name, std::size_t bytes, std::uint64_t seed) {
    Rng rng(seed);
    std::string& text = texts_.emplace_back(bytes, '\0');
    for (char& c : text) c = static_cast<char>(rng.Below(256));
    std::ofstream(directory_ / name, std::ios::binary)
        .write(text.data(), static_cast<std::streamsize>(bytes));
    return directory_ / name;
  }

  static void DropFromPageCache(const fs::path& path) {
    const Fd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC));
    ASSERT_EQ(::fsync(fd.get()), 0);
    ASSERT_EQ(::posix_fadvise(fd.get(), 0, 0, POSIX_FADV_DONTNEED), 0);
  }

  // Reads all pieces on `threads` threads and compares.
  void ExpectAll(WeightFiles& files, const std::vector<FilePiece>& pieces, int threads) {
    files.SetPieces(pieces);
    std::vector<std::atomic<int>> seen(pieces.size());
    std::atomic<int> wrong{0};
    {
      std::vector<std::jthread> readers;
      for (int i = 0; i < threads; ++i)
        readers.emplace_back([&] {
          WeightFiles::Piece piece;
          for (;;) {
            const auto more = files.Next(piece);
            if (!more) ++wrong;
            if (!more || !*more) return;
            ++seen[piece.index()];
            const FilePiece& wanted = pieces[piece.index()];
            const char* bytes = texts_[wanted.file].data() + wanted.offset;
            if (!std::equal(bytes, bytes + wanted.bytes, reinterpret_cast<const char*>(piece.data())))
              ++wrong;
          }
        });
    }
    EXPECT_EQ(wrong, 0);
    EXPECT_TRUE(std::all_of(seen.begin(), seen.end(), [](const auto& count) { return count == 1; }));
  }

  fs::path directory_;
  std::vector<std::string> texts_;
};

TEST_F(WeightFilesTest, EveryPieceComesOnceWhereverItLies) {
  const std::vector<fs::path> paths{Write("a", 9'000'001, 1), Write("b", 12'345, 2)};
  std::vector<FilePiece> pieces;
  for (std::uint64_t at = 0; at < 9'000'001; at += 70'003)
    pieces.push_back({0, at, std::min<std::uint64_t>(90'000, 9'000'001 - at)});  // they overlap
  for (std::uint64_t at = 7; at < 12'000; at += 999) pieces.push_back({1, at, 3});
  std::uint64_t bytes = 0;
  for (const FilePiece& piece : pieces) bytes += piece.bytes;
  for (const int threads : {1, 3}) {
    for (const bool cold : {false, true}) {
      if (cold)
        for (const fs::path& path : paths) DropFromPageCache(path);
      auto files = WeightFiles::Open(paths);
      ASSERT_TRUE(files) << files.error().message;
      ExpectAll(**files, pieces, threads);
      EXPECT_EQ((*files)->totals().cached_bytes + (*files)->totals().disk_bytes, bytes);
    }
  }
}

TEST_F(WeightFilesTest, WhatIsPartlyInThePageCacheIsReadFromBoth) {
  const fs::path path = Write("a", 8 << 20, 3);
  DropFromPageCache(path);
  {
    const Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    ASSERT_EQ(::posix_fadvise(fd.get(), 0, 0, POSIX_FADV_RANDOM), 0);
    std::vector<char> buffer(3 << 20);
    ASSERT_EQ(::pread(fd.get(), buffer.data(), buffer.size(), 1 << 20), 3 << 20);
  }
  std::vector<FilePiece> pieces;
  for (std::uint64_t at = 0; at < 8 << 20; at += 1 << 18) pieces.push_back({0, at, 1 << 18});
  auto files = WeightFiles::Open({path});
  ASSERT_TRUE(files) << files.error().message;
  ExpectAll(**files, pieces, 2);
}

TEST_F(WeightFilesTest, AFileThatBecameShorterIsNamed) {
  const fs::path path = Write("short", 1 << 20, 4);
  for (const bool cold : {false, true}) {
    Write("short", 1 << 20, 4);
    auto files = WeightFiles::Open({path});
    ASSERT_TRUE(files) << files.error().message;
    (*files)->SetPieces({{0, 0, 4096}, {0, 500'000, 300'000}});
    fs::resize_file(path, 600'000);
    if (cold) DropFromPageCache(path);
    WeightFiles::Piece piece;
    std::string message;
    for (int i = 0; i < 2 && message.empty(); ++i)
      if (const auto more = (*files)->Next(piece); !more) {
        EXPECT_EQ(more.error().code, ErrorCode::kDataLoss);
        message = more.error().message;
      }
    EXPECT_NE(message.find(path.string() + ": it ends at byte 600000, 200000 bytes"), message.npos)
        << message;
  }
}

TEST_F(WeightFilesTest, AFileThatWasDeletedIsReadAllTheSame) {
  const fs::path path = Write("gone", 1 << 20, 5);
  DropFromPageCache(path);
  auto files = WeightFiles::Open({path});
  ASSERT_TRUE(files) << files.error().message;
  fs::remove(path);
  ExpectAll(**files, {{0, 0, 1 << 19}, {0, 1 << 19, 1 << 19}}, 1);
  EXPECT_FALSE(WeightFiles::Open({path}));
}

TEST_F(WeightFilesTest, ManyReadsAtOnceByEitherMechanism) {
  const fs::path path = Write("a", 100'000, 6);
  const Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  for (const bool threads : {false, true}) {
    constexpr int kDepth = 20;
    std::vector<std::array<std::byte, 6000>> out(kDepth);  // outlives the reads into it
    const auto reads = threads ? AsyncReads::MakeWithThreads(kDepth) : AsyncReads::Make(kDepth);
    EXPECT_FALSE(reads->Take(false));
    for (std::size_t i = 0; i < kDepth; ++i) reads->Submit(i, fd.get(), i * 5000, out[i].data(), 6000);
    std::set<std::size_t> tags;
    while (reads->InFlight() > 0) {
      const auto done = reads->Take(true);
      ASSERT_TRUE(done);
      EXPECT_TRUE(tags.insert(done->tag).second);
      EXPECT_EQ(done->bytes, done->tag == kDepth - 1 ? 5000 : 6000);  // the file ends
      EXPECT_EQ(std::memcmp(out[done->tag].data(), texts_[0].data() + done->tag * 5000, 5000), 0);
    }
    EXPECT_EQ(tags.size(), kDepth);
    reads->Submit(7, -1, 0, out[0].data(), 6000);
    EXPECT_EQ(reads->Take(true)->bytes, -EBADF);
    reads->Submit(8, fd.get(), 0, out[0].data(), 6000);  // under way when it ends
  }
}

TEST(BackingTest, EveryPieceHasMemoryWhoeverAskedFirst) {
  constexpr std::size_t kBytes = 37 * kHugePage + 4096;
  const auto fd = CreateMemory("backing", kBytes, PageKind::kSmall);
  const auto memory = Map(fd->get(), 0, kBytes, true);
  ASSERT_TRUE(memory) << memory.error().message;
  Backing backing(memory->data(), kBytes, PageKind::kSmall);
  const auto backed = [&] {
    struct stat info = {};
    EXPECT_EQ(::fstat(fd->get(), &info), 0);
    return static_cast<std::size_t>(info.st_blocks) * 512;
  };
  EXPECT_TRUE(backing.Back(memory->data() + kHugePage - 1, 2));
  EXPECT_EQ(backed(), 2 * kHugePage);
  EXPECT_TRUE(backing.Holds(memory->data() + kBytes - 1));
  EXPECT_FALSE(backing.Holds(memory->data() + kBytes));
  {
    std::vector<std::jthread> threads;
    for (int i = 0; i < 4; ++i)
      threads.emplace_back([&] {
        for (std::size_t at = 0; at < kBytes; at += kHugePage / 4) {
          EXPECT_TRUE(backing.Back(memory->data() + at, 1));
          memory->data()[at] = std::byte{1};
        }
      });
  }
  EXPECT_EQ(backed(), kBytes);
}

}  // namespace
}  // namespace elasticmoe::runtime
