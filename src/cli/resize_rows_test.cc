#include "cli/resize_rows.h"

#include <gtest/gtest.h>

namespace elasticmoe::cli {
namespace {

constexpr TimeNs kMs = 1'000'000, kS = 1'000'000'000;

// A request due at `due` whose tokens come every `gap`.
RequestResult Whole(TimeNs due, TimeNs first, TimeNs gap, int tokens) {
  RequestResult request;
  request.state = RequestResult::State::kCompleted;
  request.due_ns = due;
  request.first_token_ns = first;
  request.last_token_ns = first + (tokens - 1) * gap;
  request.done_ns = request.last_token_ns;
  request.output_tokens = tokens;
  for (int i = 1; i < tokens; ++i) request.gaps_ms.push_back(static_cast<float>(gap) / 1e6F);
  for (int i = 0; i < tokens; ++i) request.token_ids.push_back(i);
  return request;
}

ResizeRun Steady() {
  ResizeRun run;
  run.strategy = "elastic";
  run.asked_ns = 4 * kS;
  run.done_ns = 5 * kS;
  run.scaling_latency_ms = 100;
  for (TimeNs due = 0; due < 10 * kS; due += 100 * kMs)
    run.load.requests.push_back(Whole(due, due + 10 * kMs, 10 * kMs, 9));
  run.memory = {{0, 1000}, {5 * kS, 1040}, {9 * kS, 1010}};
  return run;
}

TEST(ResizeRows, ASteadyServiceHasRatiosOfOne) {
  const ResizeRun run = Steady();
  const SloLimits slo = DefaultLimits(run);
  EXPECT_NEAR(*slo.ttft_ms, 50, 1e-6);
  EXPECT_NEAR(*slo.tpot_ms, 20, 1e-3);
  const ResizeRow row = MakeRow(run, run.load, slo, 2 * kS);
  EXPECT_NEAR(row.during_throughput_ratio, 1.0, 0.02);
  EXPECT_NEAR(row.after_throughput_ratio, 1.0, 0.1);
  EXPECT_NEAR(row.step_ms, 10, 1e-3);
  EXPECT_NEAR(row.pause_ms, 10, 0.1);  // between two requests nobody waits
  EXPECT_NEAR(row.usual_pause_ms, 10, 0.1);
  EXPECT_NEAR(row.peak_memory_ratio, 1040.0 / 1010, 1e-9);
  EXPECT_DOUBLE_EQ(row.slo_attainment, 1.0);
  EXPECT_TRUE(row.tokens_identical);
  EXPECT_EQ(row.refused + row.failed, 0);
}

TEST(ResizeRows, AStallIsSeenInEveryColumn) {
  ResizeRun run = Steady();
  for (RequestResult& request : run.load.requests) {
    if (request.due_ns < 4 * kS || request.due_ns >= 5 * kS) continue;
    request = {};
    request.state = RequestResult::State::kFailed;
    request.due_ns = 4 * kS;
    request.done_ns = 5 * kS;
    request.error_kind = "http 503";
  }
  run.load.requests[40].error_kind = "server error";
  const ResizeRow row = MakeRow(run, Steady().load, DefaultLimits(run), 2 * kS);
  EXPECT_EQ(row.refused, 9);
  EXPECT_EQ(row.failed, 1);
  EXPECT_NEAR(row.during_throughput_ratio, 0.5, 0.02);
  EXPECT_NEAR(row.pause_ms, 1010, 1);  // those that were refused waited all the while
  EXPECT_NEAR(row.slo_attainment, 0.9, 1e-9);
}

TEST(ResizeRows, ADifferentTokenIsADifference) {
  const ResizeRun run = Steady();
  LoadResult reference = run.load;
  EXPECT_TRUE(MakeRow(run, reference, {}, kS).tokens_identical);
  reference.requests[7].token_ids.back() += 1;
  EXPECT_FALSE(MakeRow(run, reference, {}, kS).tokens_identical);
}

// A load with a burst after the command: what counts is what it gets undisturbed.
TEST(ResizeRows, ThroughputIsComparedWithTheSameTimeUndisturbed) {
  ResizeRun run = Steady();
  for (TimeNs due = 4 * kS; due < 6 * kS; due += 100 * kMs)
    run.load.requests.push_back(Whole(due, due + 20 * kMs, 10 * kMs, 9));
  EXPECT_NEAR(MakeRow(run, run.load, {}, 2 * kS).during_throughput_ratio, 1.0, 1e-9);
  EXPECT_NEAR(MakeRow(run, Steady().load, {}, 2 * kS).during_throughput_ratio, 2.0, 0.02);
}

TEST(ResizeRows, TheCopysRateIsComparedWithPlainCopies) {
  ResizeRun run = Steady();
  run.bytes_copied = 1'000'000'000;
  run.copy_ms = 125;
  const ResizeRow row = MakeRow(run, run.load, {}, kS, 10e9);
  EXPECT_NEAR(row.copy_bytes_per_s, 8e9, 1);
  EXPECT_NEAR(row.copy_ratio, 1.25, 1e-9);
  EXPECT_EQ(MakeRow(Steady(), run.load, {}, kS, 10e9).copy_ratio, 0);
}

TEST(ResizeRows, TheTableComparesWithColdRestart) {
  ResizeRow elastic, cold, refused;
  elastic.strategy = "elastic";
  elastic.scaling_latency_ms = 100;
  cold.strategy = "cold-restart";
  cold.scaling_latency_ms = 4200;
  refused.strategy = "horizontal";
  refused.error = "no multiple";
  const std::string table = ToTable({elastic, cold, refused});
  EXPECT_NE(table.find("42.0x"), std::string::npos) << table;
  EXPECT_NE(table.find("no multiple"), std::string::npos);
  EXPECT_EQ(ToJson(refused)["error"], "no multiple");
  EXPECT_TRUE(ToJson(elastic)["error"].is_null());
}

}  // namespace
}  // namespace elasticmoe::cli
