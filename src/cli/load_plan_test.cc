#include "cli/load_plan.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <numeric>

#include "cli/load_report.h"
#include "cli/samples.h"

namespace elasticmoe::cli {
namespace {

using ::testing::Each;
using ::testing::HasSubstr;

std::vector<TimeNs> All(Arrivals arrivals, std::size_t most) {
  std::vector<TimeNs> times;
  while (times.size() < most) {
    const auto next = arrivals.Next();
    if (!next) break;
    times.push_back(*next);
  }
  return times;
}

TEST(Samples, PercentilesAreExactAndLinearBetweenRanks) {
  Samples samples;
  for (const double value : {15.0, 20.0, 35.0, 40.0, 50.0}) samples.Add(value);
  EXPECT_DOUBLE_EQ(samples.Percentile(0), 15);
  EXPECT_DOUBLE_EQ(samples.Percentile(40), 29);  // numpy.percentile([15, 20, 35, 40, 50], 40)
  EXPECT_DOUBLE_EQ(samples.Percentile(50), 35);
  EXPECT_DOUBLE_EQ(samples.Percentile(99), 49.6);
  EXPECT_DOUBLE_EQ(samples.Percentile(100), 50);
  samples.Add(1);
  EXPECT_DOUBLE_EQ(samples.Percentile(0), 1);
  EXPECT_DOUBLE_EQ(samples.Mean(), 161.0 / 6);
}

TEST(Samples, OneSampleIsEveryPercentileAndNoneIsNull) {
  Samples samples;
  EXPECT_TRUE(samples.ToJson()["p99"].is_null());
  samples.Add(3);
  const Json json = samples.ToJson();
  for (const auto& [key, value] : json.items()) EXPECT_EQ(value, 3) << key;
}

TEST(Samples, BeyondItsLimitItKeepsAUniformSampleAndExactEnds) {
  Samples samples(10'000, 7);
  constexpr int kCount = 200'000;
  for (int i = 0; i < kCount; ++i) samples.Add(i);
  EXPECT_EQ(samples.Count(), static_cast<std::uint64_t>(kCount));
  EXPECT_DOUBLE_EQ(samples.Max(), kCount - 1);
  EXPECT_DOUBLE_EQ(samples.Percentile(100), kCount - 1);
  // A quantile of n uniform samples deviates by sqrt(q(1-q)/n): 0.5 % at the median; six of them allowed.
  EXPECT_NEAR(samples.Percentile(50), kCount / 2.0, 6 * 0.005 * kCount);
  EXPECT_NEAR(samples.Percentile(99), kCount * 0.99, 6 * 0.001 * kCount);
}

TEST(LoadPlan, ArrivalsAreTheSameForOneSeedAndOthersForAnother) {
  const std::vector<RateStep> rate = {{10, 1e9}};
  EXPECT_EQ(All(Arrivals::Poisson(rate, 1), 100), All(Arrivals::Poisson(rate, 1), 100));
  EXPECT_NE(All(Arrivals::Poisson(rate, 1), 100), All(Arrivals::Poisson(rate, 2), 100));
}

TEST(LoadPlan, ArrivalsHaveTheMeanAndTheSpreadOfAPoissonProcess) {
  constexpr std::size_t kCount = 20'000;
  const std::vector<TimeNs> times = All(Arrivals::Poisson({{50, 1e9}}, 3), kCount);
  EXPECT_TRUE(std::ranges::is_sorted(times));
  double sum = 0, squares = 0;
  for (std::size_t i = 1; i < kCount; ++i) {
    const double gap_s = static_cast<double>(times[i] - times[i - 1]) * 1e-9;
    sum += gap_s;
    squares += gap_s * gap_s;
  }
  const double mean = sum / (kCount - 1), variance = squares / (kCount - 1) - mean * mean;
  EXPECT_NEAR(mean, 0.02, 6 * 0.02 / 141);                  // standard error of the mean: 1/rate/sqrt(n)
  EXPECT_NEAR(variance / (mean * mean), 1, 6 * 2.9 / 141);  // exponential: variance = mean squared
}

TEST(LoadPlan, TheScheduleSetsTheRateAndTheEnd) {
  const std::vector<TimeNs> times =
      All(Arrivals::Poisson(*ParseRateSchedule("100:10,0:10,400:10"), 5), 100'000);
  const auto within = [&](double from_s, double to_s) {
    return std::ranges::count_if(times, [&](TimeNs t) { return t >= from_s * 1e9 && t < to_s * 1e9; });
  };
  EXPECT_NEAR(static_cast<double>(within(0, 10)), 1000,
              6 * 32);  // a Poisson count deviates by its square root
  EXPECT_EQ(within(10, 20), 0);
  EXPECT_NEAR(static_cast<double>(within(20, 30)), 4000, 6 * 64);
  EXPECT_EQ(within(30, 1e9), 0);
}

TEST(LoadPlan, RefusesSchedulesAndRangesThatMakeNoSense) {
  for (const char* text : {"", "4", "4:", ":4", "4:0", "-1:4", "nan:4", "4:inf", "4:5;6:7", "1e9:1"})
    EXPECT_FALSE(ParseRateSchedule(text)) << text;
  for (const char* text : {"", "0", "-3", "5-2", "1-", "a", "1-2-3", "99999999999"})
    EXPECT_FALSE(ParseTokenRange(text)) << text;
  EXPECT_EQ(ParseTokenRange("7")->max, 7);
  EXPECT_EQ(ParseTokenRange("7-9")->max, 9);
}

TEST(LoadPlan, LengthsAndPromptsStayWithinTheirRangesAndRepeat) {
  LoadShape shape{.seed = 4, .input = {3, 9}, .output = {1, 2}, .first_id = 100, .end_id = 120};
  bool low = false, high = false;
  for (std::uint64_t i = 0; i < 200; ++i) {
    const RequestLength length = LengthOf(shape, i);
    EXPECT_THAT(length.input_tokens, ::testing::AllOf(::testing::Ge(3), ::testing::Le(9)));
    EXPECT_THAT(length.output_tokens, ::testing::AllOf(::testing::Ge(1), ::testing::Le(2)));
    low = low || length.input_tokens == 3;
    high = high || length.input_tokens == 9;
    const auto ids = PromptIds(shape, i, length.input_tokens);
    EXPECT_THAT(ids, Each(::testing::AllOf(::testing::Ge(100), ::testing::Lt(120))));
    EXPECT_EQ(ids, PromptIds(shape, i, length.input_tokens));
  }
  EXPECT_TRUE(low && high);
  EXPECT_NE(PromptIds(shape, 0, 64), PromptIds(shape, 1, 64));
  EXPECT_EQ(PromptText(shape, 0, 5), PromptText(shape, 0, 5));
  const std::string text = PromptText(shape, 0, 5);
  EXPECT_EQ(std::ranges::count(text, ' '), 4);
}

TEST(LoadPlan, ATraceGivesLengthsAndTimes) {
  LoadShape shape{.trace = {{0, 500, 0}, {4'000'000'000, 10, 20}}, .trace_speed = 2, .trace_max_tokens = 100};
  EXPECT_EQ(LengthOf(shape, 0).input_tokens, 100);
  EXPECT_EQ(LengthOf(shape, 0).output_tokens, 1);
  EXPECT_EQ(LengthOf(shape, 3).input_tokens, 10);
  EXPECT_EQ(All(Arrivals::FromTrace(shape), 9), (std::vector<TimeNs>{0, 2'000'000'000}));
}

TEST(LoadReport, CountsTokensErrorsAndTheShareThatMeetsTheLimits) {
  constexpr TimeNs kMs = 1'000'000;
  LoadResult result;
  result.duration_ns = 2000 * kMs;
  const auto add = [&](RequestResult::State state, TimeNs first_ms, TimeNs last_ms, int tokens) {
    RequestResult request;
    request.state = state;
    request.error_kind = state == RequestResult::State::kFailed ? "reset" : "";
    request.error_message = "gone";
    request.input_tokens = 10;
    request.output_tokens = tokens;
    request.due_ns = 100 * kMs;
    request.first_token_ns = (100 + first_ms) * kMs;
    request.last_token_ns = request.done_ns = (100 + last_ms) * kMs;
    if (tokens > 1) request.gaps_ms = {static_cast<float>(last_ms - first_ms)};
    result.requests.push_back(request);
  };
  add(RequestResult::State::kCompleted, 50, 150, 11);   // TPOT 10
  add(RequestResult::State::kCompleted, 200, 300, 11);  // too late
  add(RequestResult::State::kCompleted, 50, 1050, 11);  // too slow: TPOT 100
  add(RequestResult::State::kCompleted, 60, 60, 1);     // one token has no TPOT
  add(RequestResult::State::kFailed, 50, 60, 5);
  add(RequestResult::State::kCancelled, 50, 60, 5);
  LoadReport report = Summarize(result, {.ttft_ms = 100, .tpot_ms = 20});
  const Json json = ToJson(report, Json::object());
  EXPECT_EQ(json["requests"], 6);
  EXPECT_EQ(json["failed"], 1);
  EXPECT_EQ(json["cancelled"], 1);
  EXPECT_EQ(json["output_tokens"], 34);
  EXPECT_DOUBLE_EQ(json["output_tokens_per_s"].get<double>(), 17);
  EXPECT_DOUBLE_EQ(json["total_tokens_per_s"].get<double>(), 37);
  EXPECT_DOUBLE_EQ(json["slo"]["attainment"].get<double>(), 0.4);
  EXPECT_DOUBLE_EQ(json["slo"]["goodput_request_per_s"].get<double>(), 1);
  EXPECT_DOUBLE_EQ(json["tpot_ms"]["max"].get<double>(), 100);
  EXPECT_EQ(json["errors"]["reset"]["count"], 1);
  for (const char* key : {"ttft_ms", "tpot_ms", "itl_ms"})
    for (const char* part : {"p50", "p95", "p99", "max", "mean", "min"})
      EXPECT_TRUE(json[key][part].is_number()) << key << part;
  const std::string table = ToTable(report, "title");
  EXPECT_THAT(table, HasSubstr("1 x reset: gone"));
  EXPECT_THAT(table, HasSubstr("40.0 %"));
}

}  // namespace
}  // namespace elasticmoe::cli
