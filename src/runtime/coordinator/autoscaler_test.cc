#include "runtime/coordinator/autoscaler.h"

#include <gtest/gtest.h>

namespace elasticmoe::runtime {
namespace {

constexpr TimeNs kSecond = 1'000'000'000, kTick = kSecond / 4;

// A server that does what it is told, at once.
class Obedient : public ScalingTarget {
 public:
  ScalingSnapshot Snapshot() override {
    ScalingSnapshot snapshot;
    snapshot.state = state;
    snapshot.since = std::exchange(since, {});
    snapshot.commanded = commanded;
    return snapshot;
  }
  Status ResizeTo(int devices, const std::string& strategy) override {
    ++asked;
    if (refuses) return Fail(ErrorCode::kResourceExhausted, "no memory for {} devices", devices);
    core::ResizeReport report;
    report.strategy = strategy;
    for (int i = 0; i < state.devices; ++i) report.from.emplace_back(i);
    for (int i = 0; i < devices; ++i) report.to.emplace_back(i);
    report.started = now, report.serving = now + kSecond / 100, report.finished = report.serving;
    since.resizes.push_back(report);
    state.devices = devices;
    return {};
  }
  std::optional<core::BalanceOutlook> Balance() override { return outlook; }
  Status Rebalance() override {
    ++rebalanced;
    outlook->now = outlook->planned;
    outlook->moves = 0;
    return {};
  }

  // `rate` requests of 100+20 tokens in this tick; each is served within the limits if `served`.
  void Load(int rate, bool served) {
    for (int i = 0; i < rate; ++i) {
      since.arrivals.push_back({now, 100});
      since.outcomes.push_back(
          {.at = now, .ttft_s = served ? 0.1 : 9.0, .tpot_s = 0.05, .output_tokens = 20});
    }
    state.waiting = served ? 0 : rate;
    state.running = rate;
    for (int i = 0; i < 10; ++i)
      since.steps.push_back(
          {{.devices = state.devices, .rows = 16.0 / state.devices}, 0.016 / state.devices});
  }

  core::ServingState state{.devices = 1};
  ServingLog::Batch since;
  std::optional<TimeNs> commanded;
  std::optional<core::BalanceOutlook> outlook;
  TimeNs now = 0;
  int asked = 0, rebalanced = 0;
  bool refuses = false;
};

AutoscalerSettings Settings(core::PolicyKind kind) {
  AutoscalerSettings settings;
  settings.policy.kind = kind;
  settings.policy.max_devices = 2;
  settings.policy.window_ns = 4 * kSecond;
  settings.policy.resize_s = settings.policy.stopped_s = 0.01;
  settings.hold_ns = 20 * kSecond;
  return settings;
}

class AutoscalerTest : public ::testing::Test {
 protected:
  void Make(const AutoscalerSettings& settings) {
    core::ServingShape shape;
    shape.max_running = 16;
    const core::StepCost prior{.fixed_s = 1e-4, .row_s = 1e-3};
    autoscaler_ = *Autoscaler::Make(settings, shape, prior, target_);
  }
  void Run(int seconds, int rate, bool served) {
    for (int tick = 0; tick < seconds * 4; ++tick) {
      target_.now += kTick;
      target_.Load(rate, served);
      autoscaler_->Look(target_.now);
    }
  }
  int Count(core::DecisionCode code) {
    const auto told = autoscaler_->Current().told;
    return static_cast<int>(std::count_if(
        told.begin(), told.end(), [&](const ToldDecision& one) { return one.decision.code == code; }));
  }
  Obedient target_;
  std::unique_ptr<Autoscaler> autoscaler_;
};

TEST_F(AutoscalerTest, GrowsInABurstAndShrinksAfterItWithReasons) {
  Make(Settings(core::PolicyKind::kSlo));
  Run(10, 0, true);
  EXPECT_EQ(0, target_.asked);
  Run(10, 4, false);
  EXPECT_EQ(2, target_.state.devices);
  Run(60, 0, true);
  EXPECT_EQ(1, target_.state.devices);
  EXPECT_EQ(2, target_.asked);
  for (const ToldDecision& one : autoscaler_->Current().told) EXPECT_FALSE(one.decision.reason.empty());
}

TEST_F(AutoscalerTest, ACommandHoldsTheSizeForItsTime) {
  Make(Settings(core::PolicyKind::kSlo));
  Run(1, 0, true);
  target_.commanded = target_.now;
  Run(10, 4, false);
  EXPECT_EQ(0, target_.asked);
  EXPECT_EQ("a command", autoscaler_->Current().held_by);
  EXPECT_GE(Count(core::DecisionCode::kManual), 1);
  EXPECT_LE(Count(core::DecisionCode::kManual), 3);  // not at each of forty looks
  Run(15, 4, false);
  EXPECT_EQ(2, target_.state.devices);
  EXPECT_TRUE(autoscaler_->Current().held_by.empty());
}

TEST_F(AutoscalerTest, ReleaseEndsAHold) {
  AutoscalerSettings settings = Settings(core::PolicyKind::kSlo);
  settings.hold_ns = 0;
  Make(settings);
  target_.commanded = 0;
  Run(40, 4, false);
  EXPECT_EQ(0, target_.asked);
  autoscaler_->Release();
  Run(2, 4, false);
  EXPECT_EQ(2, target_.state.devices);
}

TEST_F(AutoscalerTest, ObservingTellsAndDoesNothing) {
  AutoscalerSettings settings = Settings(core::PolicyKind::kSlo);
  settings.policy.observe = true;
  Make(settings);
  Run(10, 4, false);
  EXPECT_EQ(0, target_.asked);
  ASSERT_FALSE(autoscaler_->Current().told.empty());
  EXPECT_EQ(2, autoscaler_->Current().last.to);
  autoscaler_->SetObserve(false);
  Run(1, 4, false);
  EXPECT_EQ(2, target_.state.devices);
}

TEST_F(AutoscalerTest, WhatIsRefusedIsAskedForEverMoreRarely) {
  Make(Settings(core::PolicyKind::kSlo));
  target_.refuses = true;
  Run(60, 4, false);
  EXPECT_GE(target_.asked, 3);
  EXPECT_LE(target_.asked, 7);  // after 1, 2, 4, ... seconds
  const auto told = autoscaler_->Current().told;
  EXPECT_TRUE(std::any_of(told.begin(), told.end(), [](const ToldDecision& one) {
    return one.error.find("no memory for 2 devices") != std::string::npos;
  }));
}

TEST_F(AutoscalerTest, StaticNeverAsks) {
  Make(Settings(core::PolicyKind::kStatic));
  Run(20, 4, false);
  EXPECT_EQ(0, target_.asked);
  EXPECT_LT(autoscaler_->Current().attainment, 0.1);
}

TEST_F(AutoscalerTest, HotExpertsChangePlacesOnceThatHasPaid) {
  Make(Settings(core::PolicyKind::kSlo));
  target_.state.devices = 2;
  target_.outlook = core::BalanceOutlook{.now = 1.5, .planned = 1.1, .rows_per_expert = 1000, .moves = 4};
  Run(10, 4, false);
  EXPECT_EQ(1, target_.rebalanced);
  EXPECT_EQ(1, Count(core::DecisionCode::kRebalance));
}

TEST(AutoscalerSettings, BadOnesAreNamed) {
  Obedient target;
  AutoscalerSettings settings = Settings(core::PolicyKind::kSlo);
  settings.strategy = "horizontal";
  const auto made = Autoscaler::Make(settings, {}, {}, target);
  ASSERT_FALSE(made);
  EXPECT_NE(std::string::npos, made.error().message.find("strategy=horizontal"));
}

}  // namespace
}  // namespace elasticmoe::runtime
