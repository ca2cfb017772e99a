#include "compute/parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <set>
#include <thread>
#include <vector>

#include "base/check.h"

namespace elasticmoe::compute {
namespace {

// ~40 us of pauses: the gap between two parallel parts of a layer. Longer gaps are slept through.
constexpr int kSpins = 1000;
// Between two of these the core is offered to whoever else is pinned there (devices may outnumber cores).
constexpr int kSpinsAYield = 100;

void Pin(int cpu) {
  if (cpu < 0) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof(set),
                         &set);  // best effort: an unpinned thread is slower, not wrong
}

void Pause(int spin) {
  if (spin % kSpinsAYield == kSpinsAYield - 1) {
    sched_yield();
    return;
  }
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// More threads than cores of their own: then waiting must not burn what a working thread needs.
bool Crowded(std::span<const int> cpus) {
  std::set<int> pinned;
  std::size_t loose = 0;
  for (const int cpu : cpus) {
    if (cpu < 0) {
      ++loose;
    } else if (!pinned.insert(cpu).second) {
      return true;
    }
  }
  return loose > 0 && cpus.size() > std::thread::hardware_concurrency();
}

}  // namespace

// A round is one call of Run. Tasks are claimed by counting `claims` down; the round in its upper half keeps
// a helper that woke late from claiming what is not of the round it woke for. `call`, `task` and `count` are
// written between rounds only and read only by who holds a claim, and a round lasts until all its claims are
// done.
struct ThreadPool::Impl {
  int size = 1;
  int spins = kSpins;
  Call call = nullptr;
  const void* task = nullptr;
  std::uint32_t count = 0;
  alignas(64) std::atomic<std::uint64_t> claims{0};  // round << 32 | tasks nobody has claimed
  alignas(64) std::atomic<std::uint32_t> unfinished{0};
  alignas(64) std::atomic<std::uint32_t> round{0};
  std::atomic<bool> stopping{false};
  std::vector<std::jthread> helpers;

  void Work(std::uint32_t my_round) {
    std::uint64_t now = claims.load(std::memory_order_acquire);
    while (now >> 32 == my_round && static_cast<std::uint32_t>(now) != 0) {
      if (!claims.compare_exchange_weak(now, now - 1, std::memory_order_acq_rel, std::memory_order_acquire))
        continue;
      call(task, static_cast<int>(count - static_cast<std::uint32_t>(now)));
      if (unfinished.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished.notify_one();
      now = claims.load(std::memory_order_acquire);
    }
  }

  void Help(int cpu) {
    Pin(cpu);
    std::uint32_t seen = 0;
    for (;;) {
      std::uint32_t now = round.load(std::memory_order_acquire);
      for (int i = 0; i < spins && now == seen; ++i) {
        Pause(i);
        now = round.load(std::memory_order_acquire);
      }
      if (now == seen) {
        round.wait(seen, std::memory_order_acquire);
        continue;
      }
      seen = now;
      if (stopping.load(std::memory_order_acquire)) return;
      Work(seen);
    }
  }
};

ThreadPool::ThreadPool(std::span<const int> cpus) : impl_(std::make_unique<Impl>()) {
  EM_CHECK(!cpus.empty());
  impl_->size = static_cast<int>(cpus.size());
  if (Crowded(cpus)) impl_->spins = 0;
  Pin(cpus[0]);
  for (std::size_t i = 1; i < cpus.size(); ++i)
    impl_->helpers.emplace_back([impl = impl_.get(), cpu = cpus[i]] { impl->Help(cpu); });
}

ThreadPool::~ThreadPool() {
  impl_->stopping.store(true, std::memory_order_release);
  impl_->round.fetch_add(1, std::memory_order_release);
  impl_->round.notify_all();
}

int ThreadPool::Size() const {
  return impl_->size;
}

void ThreadPool::RunErased(int count, Call call, const void* task) {
  Impl& impl = *impl_;
  if (impl.helpers.empty() || count <= 1) {
    for (int i = 0; i < count; ++i) call(task, i);
    return;
  }
  impl.call = call;
  impl.task = task;
  impl.count = static_cast<std::uint32_t>(count);
  impl.unfinished.store(impl.count, std::memory_order_relaxed);
  const std::uint32_t round = impl.round.load(std::memory_order_relaxed) + 1;
  impl.claims.store(std::uint64_t{round} << 32 | impl.count, std::memory_order_release);
  impl.round.store(round, std::memory_order_release);
  impl.round.notify_all();
  impl.Work(round);
  for (int i = 0; i < impl.spins; ++i) {
    if (impl.unfinished.load(std::memory_order_acquire) == 0) return;
    Pause(i);
  }
  for (std::uint32_t left = impl.unfinished.load(std::memory_order_acquire); left != 0;
       left = impl.unfinished.load(std::memory_order_acquire))
    impl.unfinished.wait(left, std::memory_order_acquire);
}

}  // namespace elasticmoe::compute
