// Words in shared memory that processes wait on: spin a little, then sleep in the kernel. Works across
// processes (no FUTEX_PRIVATE). Effects: blocks the calling thread.
#pragma once

#include <atomic>
#include <cstdint>

namespace elasticmoe::runtime {

static_assert(std::atomic<std::uint32_t>::is_always_lock_free);

// A counter with sleepers. Lives in shared memory, zero-initialised.
struct alignas(64) SharedWord {
  std::atomic<std::uint32_t> value;
  std::atomic<std::uint32_t> sleepers;

  // Stores and wakes whoever sleeps on the word.
  void Set(std::uint32_t v);
  void Increment();
  void WakeAll();
};

// Sleeps while word.value == seen, at most `timeout_ns`. May return early.
void SleepWhileEqual(SharedWord& word, std::uint32_t seen, std::int64_t timeout_ns);

inline void CpuRelax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// How long a waiter spins before it sleeps. Zero where threads outnumber cores: a spinner would only keep
// away the one that it waits for.
struct SpinPolicy {
  int spins = 0;  // pauses, ~40 ns each
};

// Waits until done(value) holds or `give_up()` does; returns whether done. `give_up` is asked at least every
// `sleep_ns` (and whenever somebody wakes the word).
template <class Done, class GiveUp>
bool WaitFor(SharedWord& word, SpinPolicy spin, const Done& done, const GiveUp& give_up,
             std::int64_t sleep_ns = 20'000'000) {
  for (int i = 0; i < spin.spins; ++i) {
    if (done(word.value.load(std::memory_order_acquire))) return true;
    if ((i & 63) == 63 && give_up()) return false;
    CpuRelax();
  }
  for (;;) {
    const std::uint32_t seen = word.value.load(std::memory_order_acquire);
    if (done(seen)) return true;
    if (give_up()) return false;
    SleepWhileEqual(word, seen, sleep_ns);
  }
}

}  // namespace elasticmoe::runtime
