#include "cli/autoscale_rows.h"

#include <gtest/gtest.h>

#include "cli/svg_curve.h"

namespace elasticmoe::cli {
namespace {

constexpr TimeNs kMs = 1'000'000;

RequestResult Request(double due_s, double ttft_ms, double tpot_ms, bool whole = true) {
  RequestResult request;
  request.state = whole ? RequestResult::State::kCompleted : RequestResult::State::kFailed;
  request.due_ns = static_cast<TimeNs>(due_s * 1e9);
  request.output_tokens = whole ? 11 : 0;
  if (whole) {
    request.first_token_ns = request.due_ns + static_cast<TimeNs>(ttft_ms * kMs);
    request.last_token_ns = request.first_token_ns + static_cast<TimeNs>(10 * tpot_ms * kMs);
    request.gaps_ms.assign(10, static_cast<float>(tpot_ms));
  }
  request.done_ns = whole ? request.last_token_ns : request.due_ns + kMs;
  return request;
}

AutoscaleRun SomeRun() {
  AutoscaleRun run;
  run.name = "a <run>";
  run.load.requests = {Request(0, 50, 5), Request(1, 150, 5), Request(10, 50, 15), Request(11, 50, 5, false),
                       Request(12, 60, 6)};
  run.samples = {{.at_s = 0, .devices = 1, .device_s = 100, .joules = 7},
                 {.at_s = 13, .devices = 2, .device_s = 120, .joules = 47}};
  run.decisions = Json::array({{{"at_s", 10.5}, {"from", 1}, {"to", 2}, {"reason", "a & b"}},
                               {{"at_s", 12.0}, {"from", 2}, {"to", 2}, {"reason", "hot"}}});
  return run;
}

TEST(AutoscaleRows, WhatIsCutOffHasMissedAndCostsAreOfTheRunAlone) {
  const AutoscaleRow row = MakeRow(SomeRun(), {100.0, 10.0}, {{10, 12}});
  EXPECT_EQ(5u, row.requests);
  EXPECT_EQ(1u, row.failed);
  EXPECT_DOUBLE_EQ(0.4, row.attainment);
  EXPECT_DOUBLE_EQ(0, row.burst_attainment);  // one is too slow, one failed
  EXPECT_DOUBLE_EQ(20, row.device_s);
  EXPECT_DOUBLE_EQ(40, row.joules);
  EXPECT_DOUBLE_EQ(40.0 / 44, row.joules_per_token);
  EXPECT_DOUBLE_EQ(4, row.device_s_per_request);
  EXPECT_EQ(1, row.resizes);
  EXPECT_EQ(1, row.rebalances);
  EXPECT_DOUBLE_EQ(1, row.resizes_per_burst);
}

TEST(AutoscaleRows, TheGapIsOnlyOfThoseWhoWait) {
  // Nobody waits between 1.3 s and 10 s.
  const AutoscaleRow row = MakeRow(SomeRun(), {100.0, 10.0}, {});
  EXPECT_GT(row.worst_gap_ms, 100);
  EXPECT_LT(row.worst_gap_ms, 1500);
}

TEST(AutoscaleRows, BurstsAreBinsWellAboveTheMedianAndCloseOnesAreOne) {
  std::vector<double> arrivals;
  for (int second = 0; second < 40; ++second) {
    const bool burst = (second >= 10 && second < 13) || second == 14 || second == 30;
    for (int i = 0; i < (burst ? 9 : 3); ++i) arrivals.push_back(second + i / 10.0);
  }
  const std::vector<Burst> bursts = FindBursts(arrivals, 1);
  ASSERT_EQ(2u, bursts.size());
  EXPECT_DOUBLE_EQ(10, bursts[0].from_s);
  EXPECT_DOUBLE_EQ(15, bursts[0].to_s);
  EXPECT_DOUBLE_EQ(30, bursts[1].from_s);
  EXPECT_TRUE(FindBursts({}, 1).empty());
}

TEST(AutoscaleRows, ThePageHasCurvesAndReasonsAndEscapesThem) {
  const AutoscaleRun run = SomeRun();
  const std::string page = AutoscaleHtml("t", {run}, {MakeRow(run, {}, {})}, {}, {{10, 12}});
  EXPECT_NE(std::string::npos, page.find("<h2>a &lt;run&gt;</h2>"));
  EXPECT_NE(std::string::npos, page.find("10.5 s: 1 to 2: a &amp; b"));
  EXPECT_NE(std::string::npos, page.find("Mean TTFT"));
}

TEST(SvgCurve, PointsAreScaledToTheirRange) {
  const std::string figure = SvgCurve({.label = "x", .points = {{0, 0}, {5, 10}, {10, 5}}, .limit = 5});
  EXPECT_NE(std::string::npos, figure.find("points=\"46.0,130 46.0,130.0 277.0,8.0 508.0,69.0 508.0,130\""))
      << figure;
  EXPECT_NE(std::string::npos, figure.find("class=\"limit\" d=\"M46 69.0H508\"")) << figure;
  EXPECT_NE(std::string::npos, SvgCurve({.label = "none"}).find("<polygon"));
}

TEST(SvgCurve, AxesHaveRoundTicksAboveAllPoints) {
  const std::string figure = SvgCurve({.label = "x", .unit = "ms", .points = {{0, 0}, {3600, 93}}});
  for (const char* tick : {">0<", ">50<", ">100<", ">10 min<", ">60 min<", "[ms]"})
    EXPECT_NE(std::string::npos, figure.find(tick)) << tick << "\n" << figure;
}

TEST(SvgCurve, AValueHoldsUntilTheNextWhereItIsANumberOfThings) {
  const std::string figure = SvgCurve({.label = "x", .points = {{0, 0}, {5, 2}, {10, 2}}, .steps = true});
  EXPECT_NE(std::string::npos, figure.find("46.0,130.0 277.0,130.0 277.0,8.0")) << figure;
}

}  // namespace
}  // namespace elasticmoe::cli
