#include "compute/parallel.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <thread>
#include <vector>

#include "base/check.h"

namespace elasticmoe::compute {
namespace {

// ~40 us of pauses: the gap between two parallel parts of a layer. Longer gaps are slept through.
constexpr int kSpins = 1000;

void Pin(int cpu) {
  if (cpu < 0) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof(set), &set);  // best effort: an unpinned thread is slower, not wrong
}

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

struct ThreadPool::Impl {
  std::vector<int> cpus;
  int spins = kSpins;
  const std::function<void(int)>* task = nullptr;
  int count = 0;
  std::atomic<int> next{0};
  std::atomic<int> working{0};
  std::atomic<std::uint32_t> round{0};
  std::atomic<bool> stopping{false};
  std::vector<std::jthread> helpers;

  void Work() {
    for (int i = next.fetch_add(1, std::memory_order_relaxed); i < count; i = next.fetch_add(1, std::memory_order_relaxed))
      (*task)(i);
  }

  void Help(int cpu) {
    Pin(cpu);
    std::uint32_t seen = 0;
    for (;;) {
      std::uint32_t now = round.load(std::memory_order_acquire);
      for (int i = 0; i < spins && now == seen; ++i) {
        Pause();
        now = round.load(std::memory_order_acquire);
      }
      if (now == seen) {
        round.wait(seen, std::memory_order_acquire);
        continue;
      }
      seen = now;
      if (stopping.load(std::memory_order_acquire)) return;
      Work();
      if (working.fetch_sub(1, std::memory_order_acq_rel) == 1) working.notify_one();
    }
  }
};

ThreadPool::ThreadPool(std::span<const int> cpus) : impl_(std::make_unique<Impl>()) {
  EM_CHECK(!cpus.empty());
  impl_->cpus.assign(cpus.begin(), cpus.end());
  if (cpus.size() > std::thread::hardware_concurrency()) impl_->spins = 0;
  Pin(cpus[0]);
  for (std::size_t i = 1; i < cpus.size(); ++i)
    impl_->helpers.emplace_back([impl = impl_.get(), cpu = cpus[i]] { impl->Help(cpu); });
}

ThreadPool::~ThreadPool() {
  impl_->stopping.store(true, std::memory_order_release);
  impl_->round.fetch_add(1, std::memory_order_release);
  impl_->round.notify_all();
}

int ThreadPool::Size() const { return static_cast<int>(impl_->cpus.size()); }

void ThreadPool::Run(int count, const std::function<void(int)>& task) {
  if (impl_->helpers.empty() || count <= 1) {
    for (int i = 0; i < count; ++i) task(i);
    return;
  }
  impl_->task = &task;
  impl_->count = count;
  impl_->next.store(0, std::memory_order_relaxed);
  impl_->working.store(static_cast<int>(impl_->helpers.size()), std::memory_order_relaxed);
  impl_->round.fetch_add(1, std::memory_order_release);
  impl_->round.notify_all();
  impl_->Work();
  for (int i = 0; i < impl_->spins; ++i) {
    if (impl_->working.load(std::memory_order_acquire) == 0) return;
    Pause();
  }
  for (int left = impl_->working.load(std::memory_order_acquire); left != 0; left = impl_->working.load(std::memory_order_acquire))
    impl_->working.wait(left, std::memory_order_acquire);
}

}  // namespace elasticmoe::compute
