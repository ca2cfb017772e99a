// Reads from files of which several are under way at once: what a fast disk needs to be fast. By io_uring,
// and where that is refused (containers often do), by threads that read one each. Not thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

namespace elasticmoe::runtime {

class AsyncReads {
 public:
  struct Done {
    std::size_t tag = 0;
    std::int64_t bytes = 0;  // read, fewer than asked for at the file's end; or -errno
  };

  // For at most `depth` reads at once. The destructor waits for those under way.
  static std::unique_ptr<AsyncReads> Make(int depth);
  static std::unique_ptr<AsyncReads> MakeWithThreads(int depth);  // never io_uring
  virtual ~AsyncReads() = default;

  // Starts to read `bytes` from `offset` into `out`, which stays until that read is done. With O_DIRECT all
  // three are multiples of 4 KiB. REQUIRES: InFlight() < depth.
  void Submit(std::size_t tag, int fd, std::uint64_t offset, std::byte* out, std::size_t bytes) {
    ++in_flight_;
    DoSubmit(tag, fd, offset, out, bytes);
  }
  // One that is done, if any is; with `block`, waits for one. REQUIRES: InFlight() > 0 where it blocks.
  std::optional<Done> Take(bool block) {
    auto done = in_flight_ == 0 ? std::nullopt : DoTake(block);
    if (done) --in_flight_;
    return done;
  }
  int InFlight() const { return in_flight_; }

 private:
  virtual void DoSubmit(std::size_t tag, int fd, std::uint64_t offset, std::byte* out, std::size_t bytes) = 0;
  virtual std::optional<Done> DoTake(bool block) = 0;

  int in_flight_ = 0;
};

}  // namespace elasticmoe::runtime
