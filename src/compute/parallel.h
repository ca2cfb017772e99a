// The threads of one device: pinned, spinning briefly for work, then asleep (an idle device costs nothing).
#pragma once

#include <memory>
#include <span>

namespace elasticmoe::compute {

class ThreadPool {
 public:
  // One thread an entry of `cpus`, pinned there (-1 = not pinned); the first is the caller's own
  // thread, which is pinned by the constructor too. REQUIRES: !cpus.empty().
  explicit ThreadPool(std::span<const int> cpus);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int Size() const;

  // Calls task(i) once for each i in [0, count), on all threads, and returns when all are done. Which
  // thread runs which i is open, so results must not depend on it. From the owning thread only, not from
  // within a task. Allocates nothing; a helper that is still asleep is not waited for.
  template <class Task>
  void Run(int count, const Task& task) {
    RunErased(
        count, [](const void* erased, int i) { (*static_cast<const Task*>(erased))(i); }, &task);
  }

 private:
  using Call = void (*)(const void* task, int i);
  void RunErased(int count, Call call, const void* task);

  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace elasticmoe::compute
