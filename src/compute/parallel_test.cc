#include "compute/parallel.h"

#include <gtest/gtest.h>

#include <atomic>
#include <numeric>
#include <vector>

namespace elasticmoe::compute {
namespace {

TEST(ThreadPool, RunsEveryTaskOnceAndWaitsForAll) {
  for (int size = 1; size <= 5; ++size) {
    const std::vector<int> cpus(size, -1);
    ThreadPool pool(cpus);
    EXPECT_EQ(size, pool.Size());
    for (const int count : {0, 1, 2, 3, 17, 1000}) {
      std::vector<std::atomic<int>> calls(count);
      pool.Run(count, [&](int i) { calls[i].fetch_add(1, std::memory_order_relaxed); });
      for (int i = 0; i < count; ++i)
        ASSERT_EQ(1, calls[i].load()) << "task " << i << " of " << count << " on " << size;
    }
  }
}

// Rounds follow each other so fast that helpers wake late, in the middle of later rounds; results of one
// round are plain data to the next.
TEST(ThreadPool, LateHelpersNeverTakeTasksOfAnotherRound) {
  for (int size = 2; size <= 4; ++size) {
    const std::vector<int> cpus(size, -1);
    ThreadPool pool(cpus);
    std::vector<std::uint64_t> sums(7), want(7);
    for (std::uint64_t round = 0; round < 20000; ++round) {
      pool.Run(1 + static_cast<int>(round % 7), [&sums, round](int i) { sums[i] += round; });
      for (std::uint64_t i = 0; i <= round % 7; ++i) want[i] += round;
    }
    EXPECT_EQ(want, sums);
  }
}

TEST(ThreadPool, MayBeDestroyedAtOnceAndPinnedToOneCpuTwice) {
  for (int i = 0; i < 100; ++i) {
    const int cpus[] = {0, 0, -1};
    ThreadPool pool(cpus);
    std::atomic<int> sum{0};
    if (i % 2 == 0) pool.Run(10, [&](int task) { sum += task; });
    EXPECT_EQ(i % 2 == 0 ? 45 : 0, sum.load());
  }
}

}  // namespace
}  // namespace elasticmoe::compute
