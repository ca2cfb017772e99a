// The weight files as a stream of pieces, each at the speed of where it lies: what the page cache holds is
// read from there, the rest past it (O_DIRECT, several reads at once, into a bounded ring of buffers), so
// that loading a model does not fill the machine's memory with a second copy of it.
//
// Effects: files, and memory of kRingBytes while cold pieces are read, and of the largest piece a Piece.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "base/error.h"
#include "runtime/fd.h"
#include "runtime/hmm/async_reads.h"

namespace elasticmoe::runtime {

struct FilePiece {
  int file = 0;  // index into the files
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
};

struct ReadTotals {
  std::uint64_t cached_bytes = 0;  // from the page cache
  std::uint64_t disk_bytes = 0;    // past it
};

class WeightFiles {
 public:
  // A piece that has been read. The bytes stay until it is given to Next again, or destroyed. Must not
  // outlive the WeightFiles.
  class Piece {
   public:
    std::size_t index() const { return index_; }
    const std::byte* data() const { return data_; }

   private:
    friend class WeightFiles;
    std::size_t index_ = 0;
    const std::byte* data_ = nullptr;
    int buffer_ = -1;             // of the ring
    std::vector<std::byte> own_;  // of pieces from the page cache
  };

  static Expected<std::unique_ptr<WeightFiles>> Open(const std::vector<std::filesystem::path>& paths);

  // What Next gives from now on. Call it once, before.
  void SetPieces(std::vector<FilePiece> pieces);

  // Fills in another of the pieces, each once, about in their order; false after the last. Thread-safe; each
  // thread has a Piece of its own. Blocking. kDataLoss where the file has become shorter, kUnavailable where
  // it cannot be read; both name it.
  Expected<bool> Next(Piece& piece);

  // Any bytes, by an ordinary read. Thread-safe. Errors as Next's.
  Status ReadAt(int file, std::uint64_t offset, std::byte* out, std::uint64_t bytes) const;

  ReadTotals totals() const { return totals_; }  // REQUIRES: no thread is in Next

 private:
  struct File {
    std::filesystem::path path;
    Fd cached;
    Fd direct;  // none where the file system refuses O_DIRECT
    std::uint64_t bytes = 0;
    std::byte* map = nullptr;  // asked what is in the page cache, never read: a file may shrink
  };
  struct Buffer {
    std::byte* data = nullptr;
    std::size_t piece = 0;
  };

  WeightFiles() = default;
  bool InPageCache(const FilePiece& piece) const;
  std::size_t ReadFrom(const FilePiece& piece) const;  // where a read past the cache begins: aligned
  void MakeRing();
  void Start(int buffer, std::size_t index);
  // Starts reads while the ring has room; the next piece that is in the page cache, if it comes to one.
  std::optional<std::size_t> Fill();

  std::vector<File> files_;
  std::vector<FilePiece> pieces_;
  std::mutex mutex_;  // of what follows
  std::size_t next_ = 0;
  std::unique_ptr<std::byte, void (*)(void*)> ring_{nullptr, nullptr};
  std::vector<Buffer> buffers_;
  std::vector<int> free_;
  std::unique_ptr<AsyncReads> reads_;
  ReadTotals totals_;

 public:
  ~WeightFiles();
  WeightFiles(const WeightFiles&) = delete;
  WeightFiles& operator=(const WeightFiles&) = delete;
};

}  // namespace elasticmoe::runtime
