#include "core/control/resize.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <typeinfo>

namespace elasticmoe::core {
namespace {

constexpr int kLayers = 2, kExperts = 6;

std::vector<DeviceId> Devices(std::initializer_list<int> numbers) {
  std::vector<DeviceId> devices;
  for (const int number : numbers) devices.emplace_back(number);
  return devices;
}

// Drives a machine by hand: actions that came out wait in `asked` until they are answered.
struct Bench {
  explicit Bench(std::initializer_list<int> members = {0, 1})
      : machine({}, EvenPlacement(Epoch(1), Devices(members), kLayers, kExperts)) {
    facts.layers = kLayers;
    facts.experts = kExperts;
    facts.expert_bytes = 10;
    facts.stage_experts = 2;
    for (int i = 0; i < 5; ++i) facts.devices.push_back({DeviceId(i), DomainId(i)});
  }

  void Send(const ResizeEvent& event) {
    std::vector<ResizeAction> actions;
    machine.Step(now, event, actions);
    machine.CheckIntegrity();
    for (ResizeAction& action : actions) {
      if (const auto* reply = std::get_if<ReplyAction>(&action))
        replies.push_back(*reply);
      else if (const auto* report = std::get_if<ReportAction>(&action))
        reports.push_back(report->report);
      else
        asked.push_back(std::move(action));
    }
  }
  void Command(const std::string& operation, int count, std::vector<DeviceId> victims = {},
               TimeNs deadline = 0) {
    Send(CommandEvent{{operation, count, std::move(victims), {}, deadline}, facts});
  }

  template <class Action>
  const Action* Asked() const {
    for (const ResizeAction& action : asked)
      if (const auto* found = std::get_if<Action>(&action)) return found;
    return nullptr;
  }
  // Answers the oldest action of this kind.
  template <class Action>
  Action Answer(std::optional<Error> error = std::nullopt) {
    const auto at = std::find_if(asked.begin(), asked.end(),
                                 [](const ResizeAction& a) { return std::holds_alternative<Action>(a); });
    if (at == asked.end()) {
      ADD_FAILURE() << "not asked: " << typeid(Action).name();
      return {};
    }
    const Action action = std::get<Action>(*at);
    asked.erase(at);
    Send(AnswerEvent{action.ticket, std::move(error)});
    return action;
  }
  // Answers everything, in order, until nothing is asked.
  void AnswerAll() {
    for (int i = 0; i < 1000 && !asked.empty(); ++i) {
      const ResizeAction action = asked.front();
      asked.erase(asked.begin());
      std::visit(
          [&](const auto& a) {
            if constexpr (requires { a.ticket; }) Send(AnswerEvent{a.ticket, std::nullopt});
          },
          action);
    }
  }
  void ExpectEnded(ResizeState state, std::initializer_list<int> members) {
    ASSERT_FALSE(machine.Running());
    ASSERT_EQ(reports.size(), 1U);
    EXPECT_EQ(reports[0].state, state);
    std::vector<DeviceId> sorted = machine.placement().members();
    std::sort(sorted.begin(), sorted.end());
    EXPECT_EQ(sorted, Devices(members));
    for (int layer = 0; layer < kLayers; ++layer)
      for (int expert = 0; expert < kExperts; ++expert)
        EXPECT_FALSE(machine.placement().Owners(layer, expert).empty());
  }
  void ExpectSameExpertsAs(const Placement& before) {
    EXPECT_EQ(machine.placement(), before.With(machine.placement().epoch(), before.members()));
  }

  PlanFacts facts;
  ResizeMachine machine;
  TimeNs now = 1;
  std::vector<ResizeAction> asked;
  std::vector<ReplyAction> replies;
  std::vector<ResizeReport> reports;
};

const Error kBroken{ErrorCode::kUnavailable, "broken"};

TEST(Resize, GrowsByStagesAndReportsIt) {
  Bench bench;
  bench.facts.shared_bytes = 7;  // copied to the domain that opens
  bench.Command("grow", 3);
  ASSERT_EQ(bench.replies.size(), 1U);
  EXPECT_FALSE(bench.replies[0].error);
  EXPECT_EQ(bench.machine.devices().at(DeviceId(2)), DevicePhase::kDesired);
  bench.Answer<ProvisionDevice>();
  EXPECT_EQ(bench.machine.devices().at(DeviceId(2)), DevicePhase::kAllocated);
  const PrepareStage first = bench.Answer<PrepareStage>();
  EXPECT_TRUE(first.stage.moves.empty());
  EXPECT_EQ(bench.machine.devices().at(DeviceId(2)), DevicePhase::kAttached);
  bench.Answer<CommitStage>();
  EXPECT_EQ(bench.machine.devices().at(DeviceId(2)), DevicePhase::kRoutable);
  bench.now = 50;
  bench.Send(FirstTokenEvent{DeviceId(2)});
  bench.Send(TrafficEvent{7, 0, 0});
  bench.Send(TrafficEvent{5, 0, 0});
  bench.now = 90;
  bench.AnswerAll();
  bench.ExpectEnded(ResizeState::kDone, {0, 1, 2});
  const ResizeReport& report = bench.reports[0];
  EXPECT_EQ(report.first_capacity, 50);
  EXPECT_EQ(report.finished, 90);
  EXPECT_EQ(report.longest_step_gap, 7);
  EXPECT_EQ(report.stages_committed, report.stages);
  EXPECT_EQ(report.bytes_copied, 7 + 10U * kLayers * kExperts / 3);
  EXPECT_EQ(report.refused, 0);
}

TEST(Resize, ShrinkWaitsForTheSequencesBeforeTheMemberLeaves) {
  Bench bench({0, 1, 2});
  bench.Command("shrink", 2, Devices({1}));
  EXPECT_EQ(bench.Asked<MoveSequences>()->leaving, Devices({1}));
  EXPECT_EQ(bench.machine.devices().at(DeviceId(1)), DevicePhase::kActive);
  const int stages = bench.replies[0].report.stages;
  for (int k = 0; k + 1 < stages; ++k) {
    bench.Answer<PrepareStage>();
    bench.Answer<CommitStage>();
    bench.Answer<ReleaseStage>();
  }
  bench.Answer<PrepareStage>();
  EXPECT_EQ(bench.Asked<CommitStage>(), nullptr);
  bench.Answer<MoveSequences>();
  ASSERT_NE(bench.Asked<CommitStage>(), nullptr);
  bench.Answer<CommitStage>();
  EXPECT_EQ(bench.machine.devices().at(DeviceId(1)), DevicePhase::kSafeToTerminate);
  bench.AnswerAll();
  bench.ExpectEnded(ResizeState::kDone, {0, 2});
}

TEST(Resize, NextStageWaitsUntilTheLastIsReleased) {
  Bench bench({0, 1, 2});
  bench.Command("shrink", 1);
  bench.Answer<PrepareStage>();
  bench.Answer<CommitStage>();
  EXPECT_EQ(bench.Asked<PrepareStage>(), nullptr);
  bench.Answer<ReleaseStage>(kBroken);
  EXPECT_EQ(bench.Asked<PrepareStage>(), nullptr);
  bench.now += ResizeOptions{}.resend_ns;
  bench.Send(TickEvent{});
  bench.Answer<ReleaseStage>();
  EXPECT_NE(bench.Asked<PrepareStage>(), nullptr);
}

TEST(Resize, TheSameIdIsTheSameOperation) {
  Bench bench;
  bench.Command("a", 3);
  bench.Command("a", 3);
  EXPECT_FALSE(bench.replies[1].error);
  EXPECT_EQ(bench.replies[1].report.to, bench.replies[0].report.to);
  EXPECT_EQ(std::count_if(bench.asked.begin(), bench.asked.end(),
                          [](const auto& a) { return std::holds_alternative<ProvisionDevice>(a); }),
            1);
  bench.Command("a", 4);
  EXPECT_EQ(bench.replies[2].error->code, ErrorCode::kAlreadyExists);
  bench.AnswerAll();
  bench.Command("a", 3);
  EXPECT_FALSE(bench.replies[3].error);
  EXPECT_EQ(bench.replies[3].report.state, ResizeState::kDone);
  EXPECT_FALSE(bench.machine.Running());
}

TEST(Resize, ASecondOperationIsRefusedAndToldWhichOneRuns) {
  Bench bench;
  bench.Command("a", 3);
  bench.Command("b", 1);
  ASSERT_TRUE(bench.replies[1].error);
  EXPECT_EQ(bench.replies[1].error->code, ErrorCode::kFailedPrecondition);
  EXPECT_NE(bench.replies[1].error->message.find("operation=a"), std::string::npos);
  EXPECT_EQ(bench.replies[1].report.operation, "a");
  bench.AnswerAll();
  bench.ExpectEnded(ResizeState::kDone, {0, 1, 2});
}

TEST(Resize, BadTargetsAreRefusedAndNothingChanges) {
  Bench bench;
  const Placement before = bench.machine.placement();
  bench.Command("zero", 0);
  bench.Command("many", 6);
  bench.Command("victim", 1, Devices({4}));
  bench.Command("", 3);
  bench.Send(CommandEvent{{"unknown", 0, {}, Devices({0, 9})}, bench.facts});
  bench.facts.devices[0].expert_budget_bytes = 50;
  bench.Command("memory", 1);
  ASSERT_EQ(bench.replies.size(), 6U);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(bench.replies[i].error->code, ErrorCode::kInvalidArgument) << i;
  EXPECT_EQ(bench.replies[5].error->code, ErrorCode::kResourceExhausted);
  EXPECT_TRUE(bench.asked.empty());
  EXPECT_FALSE(bench.machine.Running());
  EXPECT_EQ(bench.machine.placement(), before);
  // A refused id may be used again.
  bench.facts.devices[0].expert_budget_bytes = 0;
  bench.Command("memory", 1);
  EXPECT_FALSE(bench.replies.back().error);
}

TEST(Resize, ThePresentSizeIsDoneAtOnce) {
  Bench bench;
  bench.Command("same", 2);
  bench.ExpectEnded(ResizeState::kDone, {0, 1});
  EXPECT_TRUE(bench.asked.empty());
}

TEST(Resize, AJoiningDeviceThatFailsIsAskedForAgainThenGivenUp) {
  Bench bench;
  const Placement before = bench.machine.placement();
  bench.Command("grow", 3);
  bench.Answer<ProvisionDevice>(kBroken);
  bench.Answer<ProvisionDevice>(kBroken);
  EXPECT_TRUE(bench.machine.Running());
  bench.Answer<ProvisionDevice>(kBroken);
  EXPECT_EQ(bench.machine.Last()->state, ResizeState::kRollingBack);
  bench.AnswerAll();
  bench.ExpectEnded(ResizeState::kAborted, {0, 1});
  EXPECT_NE(bench.reports[0].error->message.find("provisioning device=2 failed 3 times: broken"),
            std::string::npos);
  EXPECT_EQ(bench.machine.placement(), before);
}

TEST(Resize, AStageThatFailsIsPreparedAgainThenTakenBack) {
  Bench bench({0, 1, 2});
  const Placement before = bench.machine.placement();
  bench.Command("shrink", 2);
  bench.Answer<PrepareStage>(kBroken);
  bench.Answer<PrepareStage>();
  bench.Answer<CommitStage>();
  bench.Answer<ReleaseStage>();
  const Epoch committed = bench.machine.placement().epoch();
  for (int i = 0; i < 3; ++i) bench.Answer<PrepareStage>(kBroken);
  EXPECT_EQ(bench.Asked<RollBack>()->placement.epoch(), committed);
  bench.AnswerAll();
  bench.ExpectEnded(ResizeState::kAborted, {0, 1, 2});
  bench.ExpectSameExpertsAs(before);
  EXPECT_GT(bench.machine.placement().epoch(), committed);
  EXPECT_EQ(bench.reports[0].stages_committed, 0);
}

TEST(Resize, IfTheWayBackFailsTooTheLastCommitStaysWithAllItsMembers) {
  Bench bench;
  bench.Command("grow", 3);
  bench.Answer<ProvisionDevice>();
  for (int k = 0; k < 2; ++k) {
    bench.Answer<PrepareStage>();
    bench.Answer<CommitStage>();
    bench.Answer<ReleaseStage>();
  }
  const Placement last = bench.machine.placement();
  bench.Send(CancelEvent{"grow"});
  bench.Answer<RollBack>();
  // The prepare asked for before the cancel is still in `asked`: its answer is ignored.
  bench.Answer<PrepareStage>(kBroken);
  for (int i = 0; i < 3; ++i) bench.Answer<PrepareStage>(kBroken);
  bench.AnswerAll();
  bench.ExpectEnded(ResizeState::kAborted, {0, 1, 2});
  EXPECT_EQ(bench.machine.placement(), last);
  EXPECT_EQ(bench.machine.devices().at(DeviceId(2)), DevicePhase::kRoutable);
  EXPECT_NE(bench.reports[0].error->message.find("the way back failed too"), std::string::npos);
}

// The operation is stopped after each number of answers, by a cancel or a deadline: it ends where it began,
// or at its target if all was committed.
class ResizeStopped : public testing::TestWithParam<bool> {};

TEST_P(ResizeStopped, EverywhereEndsAtTheStartOrTheTarget) {
  const bool by_deadline = GetParam();
  int aborted = 0, done = 0;
  for (const auto& [from, target] : std::vector<std::pair<std::vector<DeviceId>, std::vector<DeviceId>>>{
           {Devices({0, 1}), Devices({0, 1, 2, 3})},
           {Devices({0, 1, 2, 3}), Devices({1, 3})},
           {Devices({0, 1, 2}), Devices({1, 2, 3})}})
    for (int stop = 0; stop < 60; ++stop) {
      SCOPED_TRACE(stop);
      Bench bench;
      bench.machine = ResizeMachine({}, EvenPlacement(Epoch(1), from, kLayers, kExperts));
      const Placement before = bench.machine.placement();
      bench.Send(CommandEvent{{"op", 0, {}, target, 1000}, bench.facts});
      for (int i = 0; i < stop && !bench.asked.empty(); ++i) {
        const ResizeAction action = bench.asked.front();
        bench.asked.erase(bench.asked.begin());
        std::visit(
            [&](const auto& a) {
              if constexpr (requires { a.ticket; }) bench.Send(AnswerEvent{a.ticket, std::nullopt});
            },
            action);
      }
      if (by_deadline) {
        bench.now = 1000;
        bench.Send(TickEvent{});
      } else {
        bench.Send(CancelEvent{"op"});
      }
      bench.AnswerAll();
      ASSERT_FALSE(bench.machine.Running());
      ASSERT_EQ(bench.reports.size(), 1U);
      if (bench.reports[0].state == ResizeState::kAborted) {
        ++aborted;
        EXPECT_EQ(bench.reports[0].error->code,
                  by_deadline ? ErrorCode::kDeadlineExceeded : ErrorCode::kCancelled);
        bench.ExpectSameExpertsAs(before);
      } else {
        ++done;
        std::vector<DeviceId> members = bench.machine.placement().members();
        std::sort(members.begin(), members.end());
        EXPECT_EQ(members, target);
      }
    }
  EXPECT_GT(aborted, 30);
  EXPECT_GT(done, 20);
}
INSTANTIATE_TEST_SUITE_P(Causes, ResizeStopped, testing::Bool());

TEST(Resize, ACancelDuringACommitWaitsForItsAnswer) {
  Bench bench({0, 1, 2});
  const Placement before = bench.machine.placement();
  bench.Command("shrink", 2);
  bench.Answer<PrepareStage>();
  bench.Send(CancelEvent{"shrink"});
  EXPECT_EQ(bench.Asked<RollBack>(), nullptr);
  bench.Answer<CommitStage>();
  EXPECT_EQ(bench.machine.placement().epoch(), Epoch(2));
  bench.AnswerAll();
  bench.ExpectEnded(ResizeState::kAborted, {0, 1, 2});
  bench.ExpectSameExpertsAs(before);
}

TEST(Resize, CancellingWhatServesAlreadyIsRefused) {
  Bench bench;
  bench.Command("grow", 3);
  while (bench.machine.Last()->state != ResizeState::kSettling) {
    if (bench.Asked<ProvisionDevice>())
      bench.Answer<ProvisionDevice>();
    else if (bench.Asked<PrepareStage>())
      bench.Answer<PrepareStage>();
    else if (bench.Asked<CommitStage>())
      bench.Answer<CommitStage>();
    else
      bench.Answer<ReleaseStage>();
  }
  bench.Send(CancelEvent{"grow"});
  EXPECT_EQ(bench.replies.back().error->code, ErrorCode::kFailedPrecondition);
  bench.Send(CancelEvent{"other"});
  EXPECT_EQ(bench.replies.back().error->code, ErrorCode::kNotFound);
  bench.AnswerAll();
  bench.ExpectEnded(ResizeState::kDone, {0, 1, 2});
  bench.Send(CancelEvent{"grow"});
  EXPECT_EQ(bench.replies.back().error->code, ErrorCode::kFailedPrecondition);
}

TEST(Resize, AStageIsPreparedAnewForAMemberThatDied) {
  Bench bench({0, 1, 2});
  bench.Command("shrink", 2);
  const PrepareStage before = *bench.Asked<PrepareStage>();
  bench.Send(WorkerDiedEvent{DeviceId(0)});
  bench.Answer<PrepareStage>();  // of before the death: worth nothing
  EXPECT_EQ(bench.Asked<CommitStage>(), nullptr);
  EXPECT_EQ(bench.Asked<PrepareStage>(), nullptr);
  bench.Send(WorkerRecoveredEvent{DeviceId(0)});
  const PrepareStage after = bench.Answer<PrepareStage>();
  EXPECT_GT(after.ticket, before.ticket);
  EXPECT_EQ(after.stage.moves, before.stage.moves);
  EXPECT_NE(bench.Asked<CommitStage>(), nullptr);
  bench.AnswerAll();
  bench.ExpectEnded(ResizeState::kDone, {0, 1});
}

TEST(Resize, ANewDeviceThatDiesBeforeItIsAMemberIsReplaced) {
  Bench bench;
  bench.Command("grow", 3);
  bench.Answer<ProvisionDevice>();
  bench.Send(WorkerDiedEvent{DeviceId(2)});
  EXPECT_EQ(bench.machine.devices().at(DeviceId(2)), DevicePhase::kDesired);
  ASSERT_NE(bench.Asked<ProvisionDevice>(), nullptr);
  bench.Answer<PrepareStage>();  // for the dead one
  EXPECT_EQ(bench.Asked<CommitStage>(), nullptr);
  bench.AnswerAll();
  bench.ExpectEnded(ResizeState::kDone, {0, 1, 2});
}

TEST(Resize, ANewDeviceThatDiesDuringItsCommitIsReplacedIfTheCommitFails) {
  Bench bench;
  bench.Command("grow", 3);
  bench.Answer<ProvisionDevice>();
  bench.Answer<PrepareStage>();
  bench.Send(WorkerDiedEvent{DeviceId(2)});
  bench.Answer<CommitStage>(kBroken);
  ASSERT_NE(bench.Asked<ProvisionDevice>(), nullptr);
  bench.AnswerAll();
  bench.ExpectEnded(ResizeState::kDone, {0, 1, 2});
}

TEST(Resize, AnswersThatDoNotComeAreAskedForAgainWithTheSameTicket) {
  Bench bench;
  bench.Command("grow", 3);
  const Ticket ticket = bench.Asked<ProvisionDevice>()->ticket;
  bench.asked.clear();
  bench.Send(TickEvent{});
  EXPECT_TRUE(bench.asked.empty());
  bench.now += ResizeOptions{}.resend_ns;
  bench.Send(TickEvent{});
  ASSERT_NE(bench.Asked<ProvisionDevice>(), nullptr);
  EXPECT_EQ(bench.Asked<ProvisionDevice>()->ticket, ticket);
  bench.Answer<ProvisionDevice>();
  bench.Send(AnswerEvent{ticket, kBroken});  // doubled and late
  EXPECT_EQ(bench.machine.Last()->state, ResizeState::kPreparing);
  bench.AnswerAll();
  bench.ExpectEnded(ResizeState::kDone, {0, 1, 2});
}

TEST(Resize, WhenAllDevicesAreReplacedTheOldOnesServeUntilTheNewOnesDo) {
  Bench bench;
  bench.Send(CommandEvent{{"replace", 0, {}, Devices({2, 3})}, bench.facts});
  bench.Answer<ProvisionDevice>();
  bench.Answer<ProvisionDevice>();
  EXPECT_EQ(bench.Asked<MoveSequences>(), nullptr);
  bench.Answer<PrepareStage>();
  bench.Answer<CommitStage>();
  EXPECT_EQ(bench.Asked<MoveSequences>()->leaving, Devices({0, 1}));
  bench.AnswerAll();
  bench.ExpectEnded(ResizeState::kDone, {2, 3});
}

TEST(Resize, OnlyTheLastReportsAreKept) {
  Bench bench;
  for (int i = 0; i < 100; ++i) {
    bench.Command(fmt::format("op{}", i), 2 + i % 2);
    bench.AnswerAll();
  }
  EXPECT_EQ(bench.machine.Find("op0"), nullptr);
  ASSERT_NE(bench.machine.Find("op99"), nullptr);
  EXPECT_EQ(bench.machine.Last()->operation, "op99");
}

}  // namespace
}  // namespace elasticmoe::core
