#include "core/placement/planner.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "base/rng.h"
#include "core/placement/plan_check.h"

namespace elasticmoe::core {
namespace {

constexpr std::uint64_t kExpertBytes = 1000;

PlanFacts Facts(int layers, int experts, int devices, bool domain_per_device = false) {
  PlanFacts facts;
  facts.layers = layers;
  facts.experts = experts;
  facts.expert_bytes = kExpertBytes;
  facts.shared_bytes = 500;
  for (int i = 0; i < devices; ++i)
    facts.devices.push_back({DeviceId(i), DomainId(domain_per_device ? i : 0)});
  return facts;
}

std::vector<DeviceId> Devices(int first, int end) {
  std::vector<DeviceId> devices;
  for (int i = first; i < end; ++i) devices.emplace_back(i);
  return devices;
}

PlanInput Resize(int from, int to, int layers, int experts, bool domain_per_device = false) {
  return {EvenPlacement(Epoch(7), Devices(0, from), layers, experts), Devices(0, to),
          Facts(layers, experts, std::max(from, to), domain_per_device)};
}

ResizePlan Checked(const PlanInput& input) {
  auto plan = PlanResize(input);
  EXPECT_TRUE(plan) << plan.error().message;
  if (!plan) return {};
  const Status status = CheckPlan(input, *plan);
  EXPECT_TRUE(status) << status.error().message;
  return *std::move(plan);
}

double LoadOn(const PlanInput& input, const Placement& placement, DeviceId device, int layer) {
  double load = 0;
  for (int expert = 0; expert < input.facts.experts; ++expert)
    if (placement.Owns(device, layer, expert))
      load += input.facts.load[layer * input.facts.experts + expert] /
              static_cast<double>(placement.Owners(layer, expert).size());
  return load;
}

TEST(Planner, GrowingGivesTheNewDeviceItsShareAndNothingElseMoves) {
  const ResizePlan plan = Checked(Resize(1, 2, 3, 16));
  EXPECT_EQ(plan.Final().ExpertsOn(DeviceId(1)), 24);
  EXPECT_EQ(plan.moves, 24);
  EXPECT_EQ(plan.lower_bound, 24);
  EXPECT_EQ(plan.bytes_copied, 0U);
  EXPECT_EQ(plan.bytes_remapped, 24 * kExpertBytes);
  EXPECT_EQ(plan.Final().epoch(), Epoch(7 + plan.stages.size()));
}

TEST(Planner, FirstStageIsTheNewDeviceWithoutExperts) {
  const ResizePlan plan = Checked(Resize(2, 3, 2, 8));
  ASSERT_GT(plan.stages.size(), 2U);
  EXPECT_TRUE(plan.stages[0].moves.empty());
  EXPECT_EQ(plan.stages[0].placement.RankOf(DeviceId(2)), 2);
  EXPECT_EQ(plan.stages[0].placement.ExpertsOn(DeviceId(2)), 0);
}

TEST(Planner, ShrinkingEmptiesTheVictimsBeforeTheyLeave) {
  PlanInput input = Resize(3, 3, 2, 8);
  input.target = {DeviceId(0), DeviceId(2)};
  const ResizePlan plan = Checked(input);
  ASSERT_GT(plan.stages.size(), 2U);
  const PlanStage& last = plan.stages.back();
  EXPECT_TRUE(last.moves.empty());
  EXPECT_EQ(last.placement.members(), (std::vector{DeviceId(0), DeviceId(2)}));
  EXPECT_EQ(plan.stages[plan.stages.size() - 2].placement.ExpertsOn(DeviceId(1)), 0);
  EXPECT_EQ(plan.moves, input.present->ExpertsOn(DeviceId(1)));
}

TEST(Planner, BetweenDomainsExpertsAreCopiedInsideTheyAreRemapped) {
  PlanInput input = Resize(2, 4, 1, 8, true);
  input.facts.devices[3].domain = DomainId(0);
  const ResizePlan plan = Checked(input);
  // Device 3 shares device 0's domain and takes from it; device 2 copies from device 1.
  EXPECT_EQ(plan.moves, 4);
  EXPECT_EQ(plan.bytes_copied, 2 * kExpertBytes);
  EXPECT_EQ(plan.bytes_remapped, 2 * kExpertBytes);
}

TEST(Planner, ThePresentMembersNeedNoPlan) {
  const ResizePlan plan = Checked(Resize(3, 3, 4, 10));
  EXPECT_TRUE(plan.stages.empty());
  EXPECT_EQ(plan.Final(), plan.base);
}

TEST(Planner, SlowerDevicesGetFewerExperts) {
  PlanInput input = Resize(1, 3, 4, 32);
  input.facts.devices[2].weight = 0.5;
  const ResizePlan plan = Checked(input);
  EXPECT_NEAR(plan.Final().ExpertsOn(DeviceId(2)), 4 * 32 * 0.2, 1.0);
  EXPECT_NEAR(plan.Final().ExpertsOn(DeviceId(1)), 4 * 32 * 0.4, 1.0);
}

TEST(Planner, HottestExpertsGoFirstAndLoadIsSharedEvenly) {
  PlanInput input = Resize(1, 2, 2, 8);
  input.facts.load = {80, 10, 10, 10, 10, 10, 10, 40, 1, 1, 1, 1, 1, 1, 1, 1};
  input.facts.stage_experts = 1;
  const ResizePlan plan = Checked(input);
  ASSERT_GT(plan.stages.size(), 3U);
  EXPECT_EQ(plan.stages[1].moves[0].expert, 7);
  double before = 1e9;
  for (std::size_t k = 1; k < plan.stages.size(); ++k)
    for (const ExpertMove& move : plan.stages[k].moves) {
      EXPECT_LE(input.facts.load[move.layer * 8 + move.expert], before);
      before = input.facts.load[move.layer * 8 + move.expert];
    }
  // Expert 0 and three of ten stay, 40 and three of ten go: no four experts come nearer to the half of 180.
  EXPECT_EQ(LoadOn(input, plan.Final(), DeviceId(1), 0), 70);
}

TEST(Planner, HotExpertsGetTheRedundantCopies) {
  PlanInput input = Resize(4, 4, 2, 8, true);
  input.facts.load = {100, 1, 1, 1, 1, 1, 50, 1, 1, 1, 1, 90, 1, 1, 1, 1};
  input.facts.redundancy = 2;
  const ResizePlan plan = Checked(input);
  EXPECT_EQ(plan.replicas, 4);
  EXPECT_GE(plan.Final().Owners(0, 0).size(), 2U);
  EXPECT_GE(plan.Final().Owners(1, 3).size(), 2U);
}

TEST(Planner, AReplicaToManyDomainsIsChainedNotReadTwice) {
  PlanInput input = Resize(1, 4, 1, 1, true);
  input.facts.redundancy = 3;
  const ResizePlan plan = Checked(input);
  ASSERT_EQ(plan.moves, 3);
  std::vector<DeviceId> sources;
  for (const PlanStage& stage : plan.stages)
    for (const ExpertMove& move : stage.moves) sources.push_back(move.from);
  std::sort(sources.begin(), sources.end());
  EXPECT_EQ(std::unique(sources.begin(), sources.end()), sources.end());
}

TEST(Planner, FirstPlacementLoadsFromTheCheckpoint) {
  PlanInput input;
  input.target = Devices(0, 3);
  input.facts = Facts(4, 10, 3);
  const ResizePlan plan = Checked(input);
  ASSERT_EQ(plan.stages.size(), 1U);
  EXPECT_EQ(plan.bytes_loaded, 40 * kExpertBytes);
  EXPECT_EQ(plan.Final().epoch(), Epoch(1));
}

TEST(Planner, ADenseModelHasMembershipStagesOnly) {
  PlanInput input;
  input.present = Placement(Epoch(3), Devices(0, 2), 0, 0);
  input.target = {DeviceId(1), DeviceId(2)};
  input.facts = Facts(0, 0, 3);
  const ResizePlan plan = Checked(input);
  ASSERT_EQ(plan.stages.size(), 2U);
  EXPECT_EQ(plan.stages[0].placement.members().size(), 3U);
  EXPECT_EQ(plan.Final().members(), (std::vector{DeviceId(1), DeviceId(2)}));
}

TEST(Planner, BudgetsThatCannotHoldTheExpertsAreRefusedWithNumbers) {
  PlanInput input = Resize(2, 1, 2, 8);
  input.facts.devices[0].expert_budget_bytes = 10 * kExpertBytes;
  const auto plan = PlanResize(input);
  ASSERT_FALSE(plan);
  EXPECT_EQ(plan.error().code, ErrorCode::kResourceExhausted);
  EXPECT_NE(plan.error().message.find("need 16 slots"), std::string::npos) << plan.error().message;
  EXPECT_NE(plan.error().message.find("room for 10"), std::string::npos) << plan.error().message;
  EXPECT_NE(plan.error().message.find("--device-memory"), std::string::npos) << plan.error().message;
}

TEST(Planner, ASmallBudgetGetsLessAndTheOthersMore) {
  PlanInput input = Resize(2, 3, 3, 12);
  input.facts.devices[2].expert_budget_bytes = 5 * kExpertBytes;
  const ResizePlan plan = Checked(input);
  EXPECT_EQ(plan.Final().ExpertsOn(DeviceId(2)), 5);
  EXPECT_NEAR(plan.Final().ExpertsOn(DeviceId(0)), 15.5, 1.0);
}

TEST(Planner, FullDevicesSwapThroughAFreeSlotWhereThereIsOne) {
  // Device 0 is full and must give one and take one: what leaves it has to be committed first.
  PlanInput input;
  Placement present(Epoch(1), Devices(0, 2), 2, 3);
  for (int e = 0; e < 3; ++e) present.SetOwners(0, e, {DeviceId(0)}), present.SetOwners(1, e, {DeviceId(1)});
  input.present = present;
  input.target = Devices(0, 2);
  input.facts = Facts(2, 3, 2);
  input.facts.devices[0].expert_budget_bytes = 3 * kExpertBytes;
  input.facts.devices[1].expert_budget_bytes = 4 * kExpertBytes;
  const ResizePlan plan = Checked(input);
  EXPECT_GE(plan.stages.size(), 2U);
  input.facts.devices[1].expert_budget_bytes = 3 * kExpertBytes;
  const auto refused = PlanResize(input);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kResourceExhausted);
  EXPECT_NE(refused.error().message.find("free slot"), std::string::npos) << refused.error().message;
}

TEST(Planner, PeakIsOldAndNewTogether) {
  PlanInput input = Resize(2, 2, 1, 4, true);
  input.facts.devices.push_back({DeviceId(2), DomainId(2)});
  input.target = {DeviceId(1), DeviceId(2)};
  input.facts.stage_experts = 2;
  const ResizePlan plan = Checked(input);
  // Device 0 hands its two experts to device 2 in one stage; each of the domains holds two, never more.
  for (const DomainPeak& peak : plan.domain_peaks)
    EXPECT_EQ(peak.bytes, 500 + 2 * kExpertBytes) << peak.domain.value;
}

TEST(Planner, RefusesBadInput) {
  const auto expect_invalid = [](const PlanInput& input, const std::string& word) {
    const auto plan = PlanResize(input);
    ASSERT_FALSE(plan) << word;
    EXPECT_EQ(plan.error().code, ErrorCode::kInvalidArgument);
    EXPECT_NE(plan.error().message.find(word), std::string::npos) << plan.error().message;
  };
  PlanInput input = Resize(2, 2, 2, 4);
  input.target = {};
  expect_invalid(input, "target=0");
  input.target = {DeviceId(0), DeviceId(0)};
  expect_invalid(input, "twice");
  input.target = {DeviceId(9)};
  expect_invalid(input, "unknown");
  input = Resize(2, 2, 2, 4);
  input.facts.devices[1].weight = 0;
  expect_invalid(input, "weight");
  input = Resize(2, 2, 2, 4);
  input.facts.load = {1, 2};
  expect_invalid(input, "load");
  input = Resize(2, 2, 2, 4);
  input.facts.load.assign(8, -1);
  expect_invalid(input, "load");
  input = Resize(2, 2, 2, 4);
  input.facts.redundancy = 5;
  expect_invalid(input, "redundancy");
  input = Resize(2, 2, 2, 4);
  input.present->SetOwners(1, 1, {});
  expect_invalid(input, "nowhere");
  input = Resize(2, 2, 2, 4);
  input.facts.experts = 5;
  expect_invalid(input, "experts");
}

TEST(Planner, GrowingOverAndOverKeepsTheTotalsEven) {
  const int layers = 12, experts = 64;
  Placement present = EvenPlacement(Epoch(1), Devices(0, 2), layers, experts);
  for (const int size : {3, 4, 5, 6, 7, 9, 8, 6, 5, 3, 7, 2, 6}) {
    PlanInput input{present, Devices(0, size), Facts(layers, experts, 9)};
    const ResizePlan plan = Checked(input);
    EXPECT_LE(plan.moves, plan.lower_bound + layers);
    int least = 1 << 30, most = 0;
    for (const DeviceId member : plan.Final().members()) {
      least = std::min(least, plan.Final().ExpertsOn(member));
      most = std::max(most, plan.Final().ExpertsOn(member));
    }
    EXPECT_LE(most - least, 2) << size;
    present = plan.Final();
  }
}

TEST(ChooseMembers, VictimsGoThenTheNewestOrTheLowestCome) {
  const auto present = Devices(0, 4), available = Devices(0, 6);
  EXPECT_EQ(*ChooseMembers(present, available, 2, {}), Devices(0, 2));
  const std::vector victims{DeviceId(1)};
  EXPECT_EQ(*ChooseMembers(present, available, 2, victims), (std::vector{DeviceId(0), DeviceId(2)}));
  EXPECT_EQ(*ChooseMembers(present, available, 5, victims),
            (std::vector{DeviceId(0), DeviceId(2), DeviceId(3), DeviceId(4), DeviceId(5)}));
  EXPECT_EQ(ChooseMembers(present, available, 0, {}).error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(ChooseMembers(present, available, 7, {}).error().code, ErrorCode::kInvalidArgument);
  const std::vector stranger{DeviceId(5)};
  EXPECT_EQ(ChooseMembers(present, available, 2, stranger).error().code, ErrorCode::kInvalidArgument);
}

TEST(Planner, AtOnceIsOneCommitInsideADomainAndOfFewBytesBetweenDomains) {
  for (const bool apart : {false, true}) {
    PlanInput input = Resize(2, 4, 3, 8, apart);
    input.facts.at_once_bytes = 0;
    const auto plan = PlanResize(input);
    ASSERT_TRUE(plan) << plan.error().message;
    EXPECT_TRUE(CheckPlan(input, *plan));
    EXPECT_EQ(plan->stages.size() == 1, !apart);
    if (!apart) continue;
    const std::uint64_t copied = plan->bytes_copied;
    for (const std::uint64_t limit : {copied - 1, copied}) {
      input.facts.at_once_bytes = limit;
      const auto again = PlanResize(input);
      ASSERT_TRUE(again) << again.error().message;
      EXPECT_TRUE(CheckPlan(input, *again));
      EXPECT_EQ(again->bytes_copied, copied);
      EXPECT_EQ(again->stages.size() == 1, limit == copied);
    }
  }
  PlanInput swap = Resize(2, 2, 3, 8);
  swap.facts.devices.push_back({DeviceId(2), DomainId(0)});
  swap.target = {DeviceId(0), DeviceId(2)};
  swap.facts.at_once_bytes = 0;
  const auto plan = PlanResize(swap);
  ASSERT_TRUE(plan) << plan.error().message;
  EXPECT_GT(plan->stages.size(), 1u);  // who leaves hands over to members only
}

// Random clusters, loads and budgets, several resizes in a row: every plan passes the check, or is refused
// for a budget; the way back passes, too.
TEST(PlannerProperty, EveryRandomPlanPassesTheCheck) {
  int planned = 0, refused = 0;
  for (std::uint64_t seed = 0; seed < 400; ++seed) {
    SCOPED_TRACE(seed);
    Rng rng(seed);
    const int devices = 1 + static_cast<int>(rng.Below(9));
    PlanInput input;
    input.facts = Facts(static_cast<int>(rng.Below(6)), 1 + static_cast<int>(rng.Below(40)), devices);
    PlanFacts& facts = input.facts;
    const int domains = 1 + static_cast<int>(rng.Below(devices));
    const bool budgets = rng.Below(3) == 0;
    const bool weights = rng.Below(2) == 0;
    for (PlanDevice& device : facts.devices) {
      device.domain = DomainId(static_cast<int>(rng.Below(domains)));
      if (weights) device.weight = 0.1 + 2 * rng.Uniform();
      if (budgets)
        device.expert_budget_bytes =
            (1 + rng.Below(1 + 3 * facts.layers * facts.experts / devices)) * kExpertBytes;
    }
    facts.stage_experts = static_cast<int>(rng.Below(12));
    if (rng.Below(2) == 0) facts.at_once_bytes = rng.Below(40) * kExpertBytes;
    for (int round = 0; round < 6; ++round) {
      input.target.clear();
      for (int i = 0; i < devices; ++i)
        if (rng.Below(2) == 0) input.target.emplace_back(i);
      if (input.target.empty()) input.target.emplace_back(static_cast<int>(rng.Below(devices)));
      facts.load.clear();
      if (rng.Below(2) == 0)
        for (int i = 0; i < facts.layers * facts.experts; ++i)
          facts.load.push_back(std::floor(1000 * rng.Uniform() * rng.Uniform() * rng.Uniform()));
      facts.redundancy = rng.Below(3) == 0
                             ? static_cast<int>(rng.Below(
                                   1 + std::min<std::size_t>(8, facts.experts * (input.target.size() - 1))))
                             : 0;
      auto plan = PlanResize(input);
      if (!plan) {
        EXPECT_EQ(plan.error().code, ErrorCode::kResourceExhausted) << plan.error().message;
        ++refused;
        continue;
      }
      ++planned;
      const Status status = CheckPlan(input, *plan);
      ASSERT_TRUE(status) << status.error().message;
      if (!plan->base.members().empty())
        for (int committed = 0; committed < static_cast<int>(plan->stages.size()); ++committed) {
          const ResizePlan back = ReversePlan(facts, *plan, committed);
          const Status way_back = CheckReversePlan(facts, *plan, committed, back);
          ASSERT_TRUE(way_back) << way_back.error().message;
        }
      const auto again = PlanResize(input);
      EXPECT_EQ(again->Final(), plan->Final());
      input.present = plan->Final();
    }
  }
  EXPECT_GT(planned, 1500);
  EXPECT_GT(refused, 50);
}

}  // namespace
}  // namespace elasticmoe::core
