#include "runtime/hmm/async_reads.h"

#include <liburing.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "base/check.h"
#include "base/log.h"

namespace elasticmoe::runtime {
namespace {

// Beyond so many, further threads bring a disk nothing.
constexpr int kMostThreads = 8;

class UringReads final : public AsyncReads {
 public:
  // 0, or the errno with which the kernel refuses. IORING_OP_READ is as old as Linux 5.6: a ring that lacks
  // it counts as refused.
  int Init(int depth) {
    if (const int result = ::io_uring_queue_init(static_cast<unsigned>(depth), &ring_, 0); result < 0)
      return -result;
    made_ = true;
    io_uring_probe* probe = ::io_uring_get_probe_ring(&ring_);
    const bool reads = probe != nullptr && ::io_uring_opcode_supported(probe, IORING_OP_READ) != 0;
    ::io_uring_free_probe(probe);
    return reads ? 0 : EOPNOTSUPP;
  }

  ~UringReads() override {
    while (InFlight() > 0) Take(true);
    if (made_) ::io_uring_queue_exit(&ring_);
  }

 private:
  void DoSubmit(std::size_t tag, int fd, std::uint64_t offset, std::byte* out, std::size_t bytes) override {
    io_uring_sqe* entry = ::io_uring_get_sqe(&ring_);
    EM_CHECK(entry != nullptr, "in_flight={}", InFlight());
    ::io_uring_prep_read(entry, fd, out, static_cast<unsigned>(bytes), offset);
    ::io_uring_sqe_set_data64(entry, tag);
    int result;
    while ((result = ::io_uring_submit(&ring_)) == -EINTR || result == -EAGAIN) {
    }
    EM_CHECK(result == 1, "io_uring_submit={}", result);
  }

  std::optional<Done> DoTake(bool block) override {
    io_uring_cqe* entry = nullptr;
    int result;
    do result = block ? ::io_uring_wait_cqe(&ring_, &entry) : ::io_uring_peek_cqe(&ring_, &entry);
    while (result == -EINTR || (block && result == -EAGAIN));
    if (result == -EAGAIN) return std::nullopt;
    EM_CHECK(result == 0, "io_uring_wait_cqe={}", result);
    const Done done{static_cast<std::size_t>(entry->user_data), entry->res};
    ::io_uring_cqe_seen(&ring_, entry);
    return done;
  }

  io_uring ring_ = {};
  bool made_ = false;
};

class ThreadReads final : public AsyncReads {
 public:
  explicit ThreadReads(int depth) {
    for (int i = 0; i < std::min(depth, kMostThreads); ++i)
      threads_.emplace_back([this](const std::stop_token& stop) { Run(stop); });
  }

  ~ThreadReads() override {
    while (InFlight() > 0) Take(true);
  }

 private:
  struct Job {
    std::size_t tag;
    int fd;
    std::uint64_t offset;
    std::byte* out;
    std::size_t bytes;
  };

  void DoSubmit(std::size_t tag, int fd, std::uint64_t offset, std::byte* out, std::size_t bytes) override {
    const std::scoped_lock lock(mutex_);
    jobs_.push_back({tag, fd, offset, out, bytes});
    changed_.notify_one();
  }

  std::optional<Done> DoTake(bool block) override {
    std::unique_lock lock(mutex_);
    if (block) finished_.wait(lock, [&] { return !done_.empty(); });
    if (done_.empty()) return std::nullopt;
    const Done done = done_.front();
    done_.pop_front();
    return done;
  }

  void Run(const std::stop_token& stop) {
    std::unique_lock lock(mutex_);
    while (changed_.wait(lock, stop, [&] { return !jobs_.empty(); })) {
      const Job job = jobs_.front();
      jobs_.pop_front();
      lock.unlock();
      ssize_t got;
      do got = ::pread(job.fd, job.out, job.bytes, static_cast<off_t>(job.offset));
      while (got < 0 && errno == EINTR);
      const Done done{job.tag, got < 0 ? -errno : got};
      lock.lock();
      done_.push_back(done);
      finished_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::condition_variable finished_;
  std::deque<Job> jobs_;
  std::deque<Done> done_;
  std::vector<std::jthread> threads_;  // last: they end before what they use
};

}  // namespace

std::unique_ptr<AsyncReads> AsyncReads::MakeWithThreads(int depth) {
  return std::make_unique<ThreadReads>(depth);
}

std::unique_ptr<AsyncReads> AsyncReads::Make(int depth) {
  auto uring = std::make_unique<UringReads>();
  const int refused = uring->Init(depth);
  if (refused == 0) return uring;
  LogInfo("io_uring is refused ({}): the checkpoint is read by {} threads", std::strerror(refused),
          std::min(depth, kMostThreads));
  return MakeWithThreads(depth);
}

}  // namespace elasticmoe::runtime
