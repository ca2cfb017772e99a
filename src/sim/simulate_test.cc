#include "sim/simulate.h"

#include <gtest/gtest.h>

namespace elasticmoe::sim {
namespace {

std::string Text(const SimulationReport& report) {
  std::string text = report.failure + "\n";
  const std::size_t first = report.trace.size() > 60 ? report.trace.size() - 60 : 0;
  for (std::size_t i = first; i < report.trace.size(); ++i) text += report.trace[i] + "\n";
  return text;
}

TEST(Simulate, NoWorldBreaksAPromise) {
  SimulationOptions options;
  options.seeds = 800;
  const SimulationReport report = Simulate(options);
  if (report.failed > 0) {
    const SimulationReport replay = Simulate({report.failed_seed, 1, true});
    FAIL() << "seed " << report.failed_seed << ": " << Text(replay);
  }
  // The worlds have seen what they are for.
  EXPECT_GT(report.resizes_done, 300U);
  EXPECT_GT(report.resizes_aborted, 100U);
  EXPECT_GT(report.worker_deaths, 300U);
  EXPECT_GT(report.memory_deaths, 50U);
  EXPECT_GT(report.messages_lost, 500U);
  EXPECT_GT(report.messages_doubled, 500U);
  EXPECT_GT(report.messages_late, 500U);
  EXPECT_GT(report.sequences_moved, 500U);
  EXPECT_GT(report.steps_abandoned, 100U);
  EXPECT_GT(report.coordinator_deaths, 100U);
  EXPECT_GT(report.requests_again, 100U);
  EXPECT_GT(report.kv_shrinks, 100U);
}

TEST(Simulate, TwoRunsOfASeedAreTheSame) {
  const SimulationReport a = Simulate({77, 20, true}), b = Simulate({77, 20, true});
  EXPECT_EQ(a.hash, b.hash);
  EXPECT_EQ(a.trace, b.trace);
  EXPECT_FALSE(a.trace.empty());
  EXPECT_NE(a.hash, Simulate({78, 20}).hash);
}

}  // namespace
}  // namespace elasticmoe::sim
