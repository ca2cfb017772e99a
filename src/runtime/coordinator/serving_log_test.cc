#include "runtime/coordinator/serving_log.h"

#include <gtest/gtest.h>

namespace elasticmoe::runtime {
namespace {

constexpr TimeNs kMs = 1'000'000;
const RequestId kOne(1), kTwo(2);

core::TokenEvent Tokens(RequestId request, int count) {
  core::TokenEvent event;
  event.request = request;
  event.tokens.assign(static_cast<std::size_t>(count), TokenId{7});
  return event;
}

core::TokenEvent End(RequestId request, core::FinishReason reason, int tokens = 0) {
  core::TokenEvent event = Tokens(request, tokens);
  event.finish = reason;
  return event;
}

TEST(ServingLog, ARequestIsAnArrivalThenAnOutcomeWithItsTimes) {
  ServingLog log;
  log.Arrived(kOne, 100 * kMs, 12);
  EXPECT_EQ(12, log.WaitingPromptTokens());
  log.Event(Tokens(kOne, 1), 130 * kMs);
  EXPECT_EQ(0, log.WaitingPromptTokens());
  log.Event(Tokens(kOne, 1), 140 * kMs);
  log.Event(End(kOne, core::FinishReason::kLength, 1), 150 * kMs);
  const ServingLog::Batch batch = log.Take();
  ASSERT_EQ(1u, batch.arrivals.size());
  EXPECT_EQ(12, batch.arrivals[0].prompt_tokens);
  ASSERT_EQ(1u, batch.outcomes.size());
  EXPECT_DOUBLE_EQ(0.030, batch.outcomes[0].ttft_s);
  EXPECT_DOUBLE_EQ(0.010, batch.outcomes[0].tpot_s);
  EXPECT_EQ(3, batch.outcomes[0].output_tokens);
  EXPECT_FALSE(batch.outcomes[0].failed);
  EXPECT_TRUE(log.Take().outcomes.empty());
  EXPECT_EQ(1u, log.Sums().requests);
  EXPECT_EQ(3u, log.Sums().output_tokens);
}

TEST(ServingLog, WhatAClientGaveUpIsNoOutcome) {
  ServingLog log;
  log.Arrived(kOne, 0, 5);
  log.Event(End(kOne, core::FinishReason::kAbort), kMs);
  EXPECT_TRUE(log.Take().outcomes.empty());
  EXPECT_EQ(0, log.WaitingPromptTokens());
}

TEST(ServingLog, AnErrorIsAFailedOutcome) {
  ServingLog log;
  log.Arrived(kOne, 0, 5);
  log.Event(End(kOne, core::FinishReason::kError), kMs);
  const auto outcomes = log.Take().outcomes;
  ASSERT_EQ(1u, outcomes.size());
  EXPECT_TRUE(outcomes[0].failed);
}

TEST(ServingLog, ARefusalCountsOnlyWhereItIsOurs) {
  ServingLog log;
  log.Arrived(kOne, 1, 5);
  log.Refused(kOne, 2, true);  // no engine takes it
  log.Arrived(kTwo, 3, 5);
  log.Refused(kTwo, 4, false);  // a bad request
  const ServingLog::Batch batch = log.Take();
  EXPECT_EQ(1u, batch.arrivals.size());
  ASSERT_EQ(1u, batch.outcomes.size());
  EXPECT_TRUE(batch.outcomes[0].failed);
  EXPECT_EQ(0, log.WaitingPromptTokens());
}

TEST(ServingLog, StepsAddUpDeviceSeconds) {
  ServingLog log;
  log.Stepped({.devices = 2, .rows = 4}, 0.5);
  log.Stepped({.devices = 1, .rows = 4}, 0.25);
  EXPECT_DOUBLE_EQ(1.25, log.Sums().busy_device_s);
  EXPECT_EQ(2u, log.Take().steps.size());
}

TEST(ServingLog, TheOldestAreDroppedWhereNobodyLooks) {
  ServingLog log;
  for (int i = 0; i < 100'000; ++i) log.Stepped({.devices = 1, .rows = static_cast<double>(i)}, 0);
  const auto steps = log.Take().steps;
  EXPECT_LT(steps.size(), 50'000u);
  EXPECT_EQ(99'999, steps.back().shape.rows);
}

}  // namespace
}  // namespace elasticmoe::runtime
