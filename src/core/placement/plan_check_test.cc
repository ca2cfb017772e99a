#include "core/placement/plan_check.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

namespace elasticmoe::core {
namespace {

// Three devices in two domains: device 0 leaves, 3 and 4 come. Everything that a plan can have is in it.
PlanInput Input() {
  PlanInput input;
  input.facts.layers = 3;
  input.facts.experts = 10;
  input.facts.expert_bytes = 100;
  input.facts.shared_bytes = 50;
  input.facts.stage_experts = 4;
  input.facts.devices = {{DeviceId(0), DomainId(0)}, {DeviceId(1), DomainId(0)}, {DeviceId(2), DomainId(1)},
                         {DeviceId(3), DomainId(1)}, {DeviceId(4), DomainId(2)}, {DeviceId(5), DomainId(2)}};
  input.present = EvenPlacement(Epoch(4), {DeviceId(0), DeviceId(1), DeviceId(2)}, 3, 10);
  input.target = {DeviceId(1), DeviceId(2), DeviceId(3), DeviceId(4)};
  return input;
}

int FirstStageWith(const ResizePlan& plan, MoveKind kind) {
  for (std::size_t k = 0; k < plan.stages.size(); ++k)
    for (const ExpertMove& move : plan.stages[k].moves)
      if (move.kind == kind) return static_cast<int>(k);
  return -1;
}

ExpertMove& FirstMove(ResizePlan& plan, MoveKind kind) {
  for (PlanStage& stage : plan.stages)
    for (ExpertMove& move : stage.moves)
      if (move.kind == kind) return move;
  ADD_FAILURE() << "no move of kind " << static_cast<int>(kind);
  return plan.stages.front().moves.front();
}

void ExpectCaught(const PlanInput& input, const ResizePlan& plan, const std::string& word) {
  const Status status = CheckPlan(input, plan);
  ASSERT_FALSE(status) << "not caught: " << word;
  EXPECT_EQ(status.error().code, ErrorCode::kInternal);
  EXPECT_NE(status.error().message.find(word), std::string::npos)
      << status.error().message << "\nexpected: " << word;
}

TEST(PlanCheck, AcceptsThePlanItself) {
  const PlanInput input = Input();
  const auto plan = PlanResize(input);
  ASSERT_TRUE(plan);
  EXPECT_TRUE(CheckPlan(input, *plan));
  EXPECT_GE(FirstStageWith(*plan, MoveKind::kRemap), 1);
  EXPECT_GE(FirstStageWith(*plan, MoveKind::kCopy), 1);
}

struct Mutation {
  const char* caught;
  std::function<void(PlanInput&, ResizePlan&)> apply;
};

TEST(PlanCheck, CatchesEveryCorruption) {
  const auto after_move = [](ResizePlan& plan,
                             auto change) {  // to the placements from the first move's stage on
    const ExpertMove move = FirstMove(plan, MoveKind::kCopy);
    bool seen = false;
    for (PlanStage& stage : plan.stages) {
      seen = seen || std::find(stage.moves.begin(), stage.moves.end(), move) != stage.moves.end();
      if (seen) change(stage, move);
    }
  };
  const std::vector<Mutation> mutations = {
      {"present placement", [](PlanInput&, ResizePlan& p) { p.base.SetOwners(0, 0, {DeviceId(2)}); }},
      {"present placement",
       [](PlanInput& in, ResizePlan&) { in.present = in.present->With(Epoch(5), in.present->members()); }},
      {"another shape",
       [](PlanInput&, ResizePlan& p) {
         p.stages[1].placement = EvenPlacement(Epoch(6), p.stages[1].placement.members(), 3, 9);
       }},
      {"epoch=",
       [](PlanInput&, ResizePlan& p) {
         p.stages[1].placement = p.stages[1].placement.With(Epoch(9), p.stages[1].placement.members());
       }},
      {"epoch=", [](PlanInput&, ResizePlan& p) { std::swap(p.stages[1], p.stages[2]); }},
      {"epoch=", [](PlanInput&, ResizePlan& p) { p.stages.erase(p.stages.begin()); }},
      {"member twice",
       [](PlanInput&, ResizePlan& p) {
         auto m = p.stages[0].placement.members();
         m.push_back(m[0]);
         p.stages[0].placement = p.stages[0].placement.With(Epoch(5), m);
       }},
      {"is unknown",
       [](PlanInput&, ResizePlan& p) {
         auto m = p.stages[0].placement.members();
         m.emplace_back(77);
         p.stages[0].placement = p.stages[0].placement.With(Epoch(5), m);
       }},
      {"joins but is not wanted",
       [](PlanInput&, ResizePlan& p) {
         auto m = p.stages[0].placement.members();
         m.emplace_back(5);
         p.stages[0].placement = p.stages[0].placement.With(Epoch(5), m);
       }},
      {"joins after the first",
       [](PlanInput&, ResizePlan& p) {
         auto m = p.stages[0].placement.members();
         m.pop_back();
         p.stages[0].placement = p.stages[0].placement.With(Epoch(5), m);
       }},
      {"joins with experts",
       [](PlanInput&, ResizePlan& p) { p.stages[0].placement.SetOwners(0, 0, {DeviceId(3)}); }},
      {"leaves before the last",
       [](PlanInput&, ResizePlan& p) {
         auto m = p.stages[2].placement.members();
         m.erase(m.begin());
         p.stages[2].placement = p.stages[2].placement.With(p.stages[2].placement.epoch(), m);
       }},
      {"should have left", [](PlanInput&, ResizePlan& p) { p.stages.pop_back(); }},
      {"leaves but is wanted",
       [](PlanInput&, ResizePlan& p) {
         auto m = p.stages.back().placement.members();
         m.pop_back();
         p.stages.back().placement = p.stages.back().placement.With(p.stages.back().placement.epoch(), m);
       }},
      {"leaves with experts",
       [](PlanInput&, ResizePlan& p) {
         const PlanStage last = p.stages.back();
         const Epoch epoch = p.stages[p.stages.size() - 2].placement.epoch();
         p.stages[p.stages.size() - 2] = {last.placement.With(epoch, last.placement.members()), {}, {}};
         p.stages.pop_back();
       }},
      {"served by nobody", [](PlanInput&, ResizePlan& p) { p.stages[2].placement.SetOwners(1, 1, {}); }},
      {"no member", [](PlanInput&, ResizePlan& p) { p.stages[2].placement.SetOwners(1, 1, {DeviceId(5)}); }},
      {"on device=2 twice",
       [](PlanInput&, ResizePlan& p) {
         p.stages[2].placement.SetOwners(1, 1, {DeviceId(2), DeviceId(2)});
       }},
      {"twice or is not in the model",
       [](PlanInput&, ResizePlan& p) { p.stages[1].moves.push_back(p.stages[1].moves[0]); }},
      {"twice or is not in the model",
       [](PlanInput&, ResizePlan& p) { p.stages[1].drops.push_back(p.stages[1].drops[0]); }},
      {"is not in the model", [](PlanInput&, ResizePlan& p) { p.stages[1].moves[0].expert = 10; }},
      {"is not in the model", [](PlanInput&, ResizePlan& p) { p.stages[1].drops[0].layer = -1; }},
      {"without a move", [](PlanInput&, ResizePlan& p) { p.stages[1].moves.pop_back(); }},
      {"vanishes", [](PlanInput&, ResizePlan& p) { p.stages[1].drops.pop_back(); }},
      {"new owners",
       [](PlanInput&, ResizePlan& p) {
         p.stages[1].moves.push_back({2, 9, DeviceId(2), DeviceId(0), MoveKind::kCopy, 100});
       }},
      {"owners that end",
       [](PlanInput&, ResizePlan& p) {
         p.stages[1].drops.push_back({2, 9, DeviceId(4)});
       }},
      {"changes its owners again",
       [&](PlanInput&, ResizePlan& p) {
         const ExpertMove move = FirstMove(p, MoveKind::kCopy);
         PlanStage& later = p.stages[p.stages.size() - 2];
         later.placement.SetOwners(move.layer, move.expert, {DeviceId(2)});
         later.moves.push_back({move.layer, move.expert, move.to, DeviceId(2), MoveKind::kCopy, 100});
       }},
      {"without a move",
       [&](PlanInput&, ResizePlan& p) {
         after_move(p, [](PlanStage& stage, const ExpertMove& move) {
           stage.placement.SetOwners(
               move.layer, move.expert,
               std::vector{move.to, move.to == DeviceId(2) ? DeviceId(1) : DeviceId(2)});
         });
       }},
      {"is kind=", [](PlanInput&, ResizePlan& p) { FirstMove(p, MoveKind::kCopy).kind = MoveKind::kRemap; }},
      {"is kind=", [](PlanInput&, ResizePlan& p) { FirstMove(p, MoveKind::kRemap).kind = MoveKind::kCopy; }},
      {"is kind=", [](PlanInput&, ResizePlan& p) { FirstMove(p, MoveKind::kCopy).kind = MoveKind::kLoad; }},
      {"that has it not",
       [](PlanInput&, ResizePlan& p) { FirstMove(p, MoveKind::kCopy).from = DeviceId(4); }},
      {"that has it not",
       [](PlanInput&, ResizePlan& p) {
         ExpertMove& move = FirstMove(p, MoveKind::kRemap);
         move.from = move.to;
       }},
      {"moves with bytes", [](PlanInput&, ResizePlan& p) { ++FirstMove(p, MoveKind::kCopy).bytes; }},
      {"moves with bytes", [](PlanInput&, ResizePlan& p) { FirstMove(p, MoveKind::kRemap).bytes = 100; }},
      {"before the commit",
       [](PlanInput& in, ResizePlan&) { in.facts.devices[3].expert_budget_bytes = 300; }},
      {"before the commit",
       [](PlanInput& in, ResizePlan&) { in.facts.devices[4].expert_budget_bytes = 600; }},
      {"are stated", [](PlanInput&, ResizePlan& p) { ++p.moves; }},
      {"are stated", [](PlanInput&, ResizePlan& p) { p.bytes_copied += 1; }},
      {"are stated", [](PlanInput&, ResizePlan& p) { p.bytes_remapped -= 100; }},
      {"are stated", [](PlanInput&, ResizePlan& p) { p.bytes_loaded = 1; }},
      {"are stated", [](PlanInput&, ResizePlan& p) { p.device_peaks.pop_back(); }},
      {"peak at another", [](PlanInput&, ResizePlan& p) { p.device_peaks[0].expert_bytes -= 100; }},
      {"peak at another", [](PlanInput&, ResizePlan& p) { p.domain_peaks[1].bytes += 50; }},
      {"replicas=", [](PlanInput&, ResizePlan& p) { p.replicas = 1; }},
      {"lower bound", [](PlanInput&, ResizePlan& p) { --p.lower_bound; }},
      {"wanted are", [](PlanInput& in, ResizePlan&) { in.target.emplace_back(5); }},
      {"beside device", [](PlanInput& in, ResizePlan&) { in.facts.devices[1].weight = 3; }},
  };
  const PlanInput good_input = Input();
  const ResizePlan good = *PlanResize(good_input);
  for (std::size_t i = 0; i < mutations.size(); ++i) {
    SCOPED_TRACE(i);
    PlanInput input = good_input;
    ResizePlan plan = good;
    mutations[i].apply(input, plan);
    ExpectCaught(input, plan, mutations[i].caught);
  }
}

// A plan by hand, all else right: the check must see what is wrong with the whole.
TEST(PlanCheck, CatchesMovesThatWereNotNeeded) {
  PlanInput input;
  input.facts.layers = 1;
  input.facts.experts = 8;
  input.facts.expert_bytes = 1;
  input.facts.devices = {{DeviceId(0), DomainId(0)}, {DeviceId(1), DomainId(0)}};
  input.present = EvenPlacement(Epoch(1), {DeviceId(0), DeviceId(1)}, 1, 8);
  input.target = {DeviceId(0), DeviceId(1)};
  ResizePlan plan;
  plan.base = *input.present;
  PlanStage stage{plan.base.With(Epoch(2), plan.base.members()), {}, {}};
  for (int i = 0; i < 2; ++i) {
    const DeviceId from(i), to(1 - i);
    const int expert = 4 * i;
    stage.placement.SetOwners(0, expert, std::vector{to});
    stage.moves.push_back({0, expert, from, to, MoveKind::kRemap, 0});
    stage.drops.push_back({0, expert, from});
  }
  plan.stages = {stage};
  plan.moves = 2;
  plan.bytes_remapped = 2;
  plan.device_peaks = {{DeviceId(0), 5}, {DeviceId(1), 5}};
  plan.domain_peaks = {{DomainId(0), 8}};
  ExpectCaught(input, plan, "2 experts move, 0 would do");
}

TEST(PlanCheck, CatchesASourceThatIsReadTwice) {
  PlanInput input;
  input.facts.layers = 1;
  input.facts.experts = 1;
  input.facts.expert_bytes = 1;
  input.facts.redundancy = 2;
  input.facts.devices = {{DeviceId(0), DomainId(0)}, {DeviceId(1), DomainId(1)}, {DeviceId(2), DomainId(2)}};
  input.present = EvenPlacement(Epoch(1), {DeviceId(0)}, 1, 1);
  input.target = {DeviceId(0), DeviceId(1), DeviceId(2)};
  ResizePlan plan = *PlanResize(input);
  ASSERT_TRUE(CheckPlan(input, plan));
  ASSERT_EQ(plan.stages[1].moves.size(), 2U);
  plan.stages[1].moves[1].from = DeviceId(0);
  ExpectCaught(input, plan, "twice");
}

TEST(PlanCheck, CatchesAWayBackThatLeadsElsewhere) {
  const PlanInput input = Input();
  const ResizePlan plan = *PlanResize(input);
  const ResizePlan back = ReversePlan(input.facts, plan, 3);
  ASSERT_TRUE(CheckReversePlan(input.facts, plan, 3, back));
  EXPECT_FALSE(CheckReversePlan(input.facts, plan, 2, back));
  ResizePlan wrong = back;
  wrong.stages.pop_back();
  EXPECT_FALSE(CheckReversePlan(input.facts, plan, 3, wrong));
}

}  // namespace
}  // namespace elasticmoe::core
