// Exchanging experts between the same members until their loads are even.
#include <gtest/gtest.h>

#include "base/rng.h"
#include "core/placement/plan_check.h"
#include "core/placement/planner.h"
#include "core/policy/hot_experts.h"

namespace elasticmoe::core {
namespace {

PlanInput Skewed(int layers, int experts, int devices, bool domain_per_device = false) {
  PlanInput input;
  input.facts.layers = layers;
  input.facts.experts = experts;
  input.facts.expert_bytes = 1000;
  input.facts.shared_bytes = 500;
  input.facts.even_load = true;
  input.facts.at_once_bytes = 0;
  for (int i = 0; i < devices; ++i) {
    input.facts.devices.push_back({DeviceId(i), DomainId(domain_per_device ? i : 0)});
    input.target.emplace_back(i);
  }
  input.present = EvenPlacement(Epoch(3), input.target, layers, experts);
  // All of device 0's experts are ten times as hot.
  for (int layer = 0; layer < layers; ++layer)
    for (int expert = 0; expert < experts; ++expert)
      input.facts.load.push_back(input.present->Owns(DeviceId(0), layer, expert) ? 1000 : 100);
  return input;
}

TEST(EvenLoad, HotExpertsAreExchangedForColdOnesInOneCommit) {
  const PlanInput input = Skewed(3, 16, 2);
  const auto plan = PlanResize(input);
  ASSERT_TRUE(plan) << plan.error().message;
  EXPECT_TRUE(CheckPlan(input, *plan));
  EXPECT_EQ(1u, plan->stages.size());
  EXPECT_NEAR(1.818, Imbalance(*input.present, input.facts.load), 1e-3);
  EXPECT_DOUBLE_EQ(1, Imbalance(plan->Final(), input.facts.load));
  EXPECT_EQ(0u, plan->bytes_copied);
  EXPECT_EQ(3 * 8, plan->moves);  // four each way a layer
  for (const DeviceId device : input.target) EXPECT_EQ(3 * 8, plan->Final().ExpertsOn(device));
}

TEST(EvenLoad, BetweenDomainsItIsCopiedInSeveralCommits) {
  const PlanInput input = Skewed(3, 16, 4, true);
  const auto plan = PlanResize(input);
  ASSERT_TRUE(plan) << plan.error().message;
  EXPECT_TRUE(CheckPlan(input, *plan));
  EXPECT_GT(plan->stages.size(), 1u);
  EXPECT_GT(plan->bytes_copied, 0u);
  EXPECT_LT(Imbalance(plan->Final(), input.facts.load), 1.1);
}

TEST(EvenLoad, WhatIsEvenStays) {
  PlanInput input = Skewed(2, 8, 2);
  input.facts.load.assign(2 * 8, 50);
  const auto plan = PlanResize(input);
  ASSERT_TRUE(plan);
  EXPECT_TRUE(plan->stages.empty());
  input.facts.load.clear();
  EXPECT_TRUE(PlanResize(input)->stages.empty());
}

TEST(EvenLoad, OneExpertThatIsTooHotForAnyDeviceIsCopiedWhereThereIsRoomForCopies) {
  PlanInput input = Skewed(1, 8, 4);
  input.facts.load = {900, 10, 10, 10, 10, 10, 10, 10};
  const double before = Imbalance(*input.present, input.facts.load);
  const auto exchanged = PlanResize(input);
  ASSERT_TRUE(exchanged);
  EXPECT_GT(Imbalance(exchanged->Final(), input.facts.load), 0.9 * before);
  input.facts.redundancy = 4;
  const auto copied = PlanResize(input);
  ASSERT_TRUE(copied) << copied.error().message;
  EXPECT_TRUE(CheckPlan(input, *copied));
  EXPECT_LT(Imbalance(copied->Final(), input.facts.load), 0.5 * before);
}

TEST(EvenLoad, RandomLoadsNeverGetWorseAndPlansHold) {
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    Rng rng(seed);
    const int devices = 2 + static_cast<int>(rng.Below(6));
    PlanInput input = Skewed(1 + static_cast<int>(rng.Below(4)), 4 + static_cast<int>(rng.Below(60)), devices,
                             rng.Below(2) == 0);
    for (double& load : input.facts.load) load = static_cast<double>(rng.Below(1000));
    for (PlanDevice& device : input.facts.devices) device.weight = 1 + static_cast<double>(rng.Below(3)) / 2;
    const auto plan = PlanResize(input);
    ASSERT_TRUE(plan) << "seed " << seed << ": " << plan.error().message;
    const Status checked = CheckPlan(input, *plan);
    ASSERT_TRUE(checked) << "seed " << seed << ": " << checked.error().message;
  }
}

TEST(EvenLoad, TheCheckSeesALayerThatGetsWorse) {
  PlanInput input = Skewed(1, 4, 2);
  auto plan = PlanResize(input);
  ASSERT_TRUE(plan);
  ASSERT_TRUE(CheckPlan(input, *plan));
  // The same plan under a load for which it is bad.
  PlanInput other = input;
  for (int expert = 0; expert < 4; ++expert)
    other.facts.load[static_cast<std::size_t>(expert)] =
        plan->Final().Owns(DeviceId(0), 0, expert) ? 1000 : 1;
  const Status status = CheckPlan(other, *plan);
  ASSERT_FALSE(status);
  EXPECT_NE(std::string::npos, status.error().message.find("busiest"));
}

TEST(HotExperts, TheyMoveOnceWhatIsLostExceedsTwoResizes) {
  HotExperts hot;
  const BalanceOutlook outlook{.now = 2, .planned = 1, .rows_per_expert = 1000, .moves = 4};
  // Half of the experts' time is lost: 0.5 x 0.8 x 1 device-second a look; two resizes cost 2 x 0.5 x 2.
  int looks = 1;
  while (!hot.Look(outlook, 2, 1, 0.8, 0.5).rebalance) ++looks;
  EXPECT_EQ(5, looks);
  EXPECT_FALSE(hot.Look(outlook, 2, 1, 0.8, 0.5).rebalance);  // counted anew
}

TEST(HotExperts, WhatComesBackAtOnceIsChanceAndNotChased) {
  HotExperts hot;
  const BalanceOutlook chance{.now = 1.05, .planned = 1, .rows_per_expert = 1000, .moves = 14};
  int moved = 0;
  for (int look = 0; look < 30; ++look) moved += hot.Look(chance, 2, 1, 1, 0).rebalance;
  EXPECT_EQ(1, moved);
  const BalanceOutlook hotter{.now = 1.5, .planned = 1, .rows_per_expert = 1000, .moves = 4};
  EXPECT_TRUE(hot.Look(hotter, 2, 1, 1, 0).rebalance);
}

TEST(HotExperts, FewRowsOrLittleGainOrOneDeviceMoveNothing) {
  HotExperts hot;
  const BalanceOutlook good{.now = 2, .planned = 1, .rows_per_expert = 1000, .moves = 4};
  BalanceOutlook rare = good, even = good;
  rare.rows_per_expert = 10;
  even.planned = 1.99;
  EXPECT_FALSE(hot.Look(rare, 2, 1e9, 1, 0).rebalance);
  EXPECT_FALSE(hot.Look(even, 2, 1e9, 1, 0).rebalance);
  EXPECT_FALSE(hot.Look(good, 1, 1e9, 1, 0).rebalance);
  EXPECT_TRUE(hot.Look(good, 2, 1, 1, 0).rebalance);
}

}  // namespace
}  // namespace elasticmoe::core
