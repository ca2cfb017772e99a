#include "core/schedule/scheduler.h"

#include <gtest/gtest.h>

#include "core/schedule/toy_devices.h"

namespace elasticmoe::core {
namespace {

class ElasticityTest : public SchedulerTest {
 protected:
  // Starts what Rebalance asks for; the copies lie in `copying` until EndCopies.
  std::vector<Scheduler::Move> Rebalance() {
    std::vector<Scheduler::Move> moves = scheduler->Rebalance();
    for (const auto& move : moves)
      if (!move.copies.empty()) copying.push_back(move);
    scheduler->CheckIntegrity();
    return moves;
  }
  void EndCopies() {
    for (const auto& move : copying) {
      toy.Copy(move.copies);
      scheduler->MoveCopied(move.request);
    }
    copying.clear();
    scheduler->CheckIntegrity();
  }
  void ExpectAll(std::uint64_t last, const std::vector<std::vector<TokenId>>& prompts, int count) {
    RunAll();
    for (std::uint64_t id = 1; id <= last; ++id) {
      EXPECT_EQ(TokensOf(id), Expected(prompts[id - 1], count)) << "request " << id;
      EXPECT_EQ(FinishesOf(id), 1);
    }
    EXPECT_EQ(scheduler->Stats().blocks_used, 0u);
  }
  // `count` requests of different prompts, prefilled.
  std::vector<std::vector<TokenId>> Start(std::uint64_t count, int max_tokens) {
    std::vector<std::vector<TokenId>> prompts;
    for (std::uint64_t id = 1; id <= count; ++id) {
      prompts.push_back({1, 2, static_cast<TokenId>(id), 4, 5, 6});
      Add(id, prompts.back(), max_tokens);
    }
    while (scheduler->Stats().waiting > 0 || last_plan.devices.empty() ||
           !last_plan.devices[0].sequences.back().sample)
      Step();
    return prompts;
  }
  std::vector<Scheduler::Move> copying;
};

TEST_F(ElasticityTest, HandsSequencesOverInsideADomainAtOnce) {
  Reset(SmallOptions(), 2, 40);
  const auto prompts = Start(4, 10);
  EXPECT_EQ(scheduler->SequencesOn(DeviceId(0)), 2);
  const std::vector<BlockId> table(scheduler->BlockTable(RequestId(2)).begin(),
                                   scheduler->BlockTable(RequestId(2)).end());
  Leave(1);
  const auto moves = Rebalance();
  EXPECT_EQ(moves.size(), 2u);
  for (const auto& move : moves) {
    EXPECT_TRUE(move.copies.empty());
    EXPECT_EQ(move.from, DeviceId(1));
    EXPECT_EQ(move.to, DeviceId(0));
  }
  EXPECT_EQ(scheduler->SequencesOn(DeviceId(1)), 0);
  scheduler->SetDevices(std::span(devices).first(1));
  Step();
  EXPECT_TRUE(last_plan.copies_before.empty());
  EXPECT_EQ(std::vector<BlockId>(scheduler->BlockTable(RequestId(2)).begin(),
                                 scheduler->BlockTable(RequestId(2)).end()),
            table);
  ExpectAll(4, prompts, 10);
}

TEST_F(ElasticityTest, GrowthMovesOnlyTheSurplusAndSecondTimeNothing) {
  Reset(SmallOptions(), 2, 60);
  const auto prompts = Start(6, 12);
  AddDevice(DomainId(0), 60);
  EXPECT_EQ(Rebalance().size(), 2u);
  for (int device = 0; device < 3; ++device) EXPECT_EQ(scheduler->SequencesOn(DeviceId(device)), 2);
  EXPECT_TRUE(Rebalance().empty());
  ExpectAll(6, prompts, 12);
}

TEST_F(ElasticityTest, CountsFollowTheWeights) {
  Reset(SmallOptions(), 1, 60);
  const auto prompts = Start(6, 12);
  devices.push_back({DeviceId(1), DomainId(0), 2.0});
  toy.domain_of[DeviceId(1)] = DomainId(0);
  scheduler->SetDevices(devices);
  EXPECT_EQ(Rebalance().size(), 4u);
  EXPECT_EQ(scheduler->SequencesOn(DeviceId(1)), 4);
  ExpectAll(6, prompts, 12);
}

TEST_F(ElasticityTest, BetweenDomainsDecodingGoesOnWhileBlocksAreCopiedAndTheTailFollows) {
  Reset(SmallOptions(), 2, 20, true);
  Leave(1);
  const auto prompts = Start(2, 14);
  EXPECT_EQ(scheduler->SequencesOn(DeviceId(0)), 2);
  devices[1].accepts = true;
  Leave(0);
  const auto moves = Rebalance();
  ASSERT_EQ(moves.size(), 2u);
  for (const auto& move : moves)
    EXPECT_EQ(move.copies.size(), 1u);  // of 6 or more tokens one block of 4 is full
  EXPECT_EQ(scheduler->SequencesOn(DeviceId(0)), 2);
  EXPECT_EQ(scheduler->SequencesOn(DeviceId(1)), 2);
  EXPECT_TRUE(Rebalance().empty());  // not twice
  for (int i = 0; i < 4; ++i) {
    ASSERT_TRUE(Step());
    EXPECT_EQ(last_plan.devices[0].device, DeviceId(0));
    EXPECT_TRUE(last_plan.copies_before.empty());
  }
  EndCopies();
  ASSERT_TRUE(Step());
  EXPECT_EQ(last_plan.devices.size(), 1u);
  EXPECT_EQ(last_plan.devices[0].device, DeviceId(1));
  EXPECT_GE(last_plan.copies_before.size(), 2u);
  EXPECT_EQ(scheduler->SequencesOn(DeviceId(0)), 0);
  scheduler->SetBlocks(DomainId(0), 0);
  EXPECT_EQ(scheduler->Stats().preemptions, 0u);
  ExpectAll(2, prompts, 14);
}

TEST_F(ElasticityTest, ASequenceWithoutAFullBlockMovesWithTheNextPlan) {
  Reset(SmallOptions(), 2, 20, true);
  Leave(1);
  Add(1, {1, 2}, 5);
  Step();
  devices[1].accepts = true;
  Leave(0);
  const auto moves = Rebalance();
  ASSERT_EQ(moves.size(), 1u);
  EXPECT_TRUE(moves[0].copies.empty());
  Step();
  EXPECT_EQ(last_plan.devices[0].device, DeviceId(1));
  EXPECT_EQ(last_plan.copies_before.size(), 1u);
  ExpectAll(1, {{1, 2}}, 5);
}

TEST_F(ElasticityTest, ATailIsCarriedAgainAfterAStepThatDied) {
  Reset(SmallOptions(), 2, 20, true);
  Leave(1);
  const auto prompts = Start(1, 14);
  devices[1].accepts = true;
  Leave(0);
  Rebalance();
  Step();
  EndCopies();
  const StepPlan died = scheduler->Plan(0);
  ASSERT_FALSE(died.copies_before.empty());
  scheduler->AbandonStep();
  scheduler->CheckIntegrity();
  Step();
  EXPECT_EQ(last_plan.copies_before.size(), died.copies_before.size());
  Step();
  EXPECT_TRUE(last_plan.copies_before.empty());
  ExpectAll(1, prompts, 14);
}

TEST_F(ElasticityTest, NoMoveStartsFromBlocksThatATailHasNotFilledYet) {
  Reset(SmallOptions(), 3, 20, true);
  Leave(1);
  Leave(2);
  const auto prompts = Start(1, 20);
  devices[1].accepts = true;
  Leave(0);
  ASSERT_EQ(Rebalance().size(), 1u);
  for (int i = 0; i < 6; ++i) Step();  // the second block fills up meanwhile
  EndCopies();
  scheduler->Plan(0);
  scheduler->AbandonStep();  // it is on device 1 now, the second block on its way
  devices[2].accepts = true;
  Leave(1);
  EXPECT_TRUE(Rebalance().empty());
  Step();
  EXPECT_EQ(Rebalance().size(), 1u);
  EndCopies();
  Step();
  EXPECT_EQ(last_plan.devices[0].device, DeviceId(2));
  ExpectAll(1, prompts, 20);
}

TEST_F(ElasticityTest, AFailedMoveLeavesTheSequenceWhereItIs) {
  Reset(SmallOptions(), 2, 20, true);
  Leave(1);
  const auto prompts = Start(1, 10);
  devices[1].accepts = true;
  Leave(0);
  ASSERT_EQ(Rebalance().size(), 1u);
  scheduler->MoveFailed(RequestId(1));
  copying.clear();
  scheduler->CheckIntegrity();
  EXPECT_EQ(scheduler->SequencesOn(DeviceId(1)), 0);
  Step();
  EXPECT_EQ(last_plan.devices[0].device, DeviceId(0));
  ExpectAll(1, prompts, 10);
}

TEST_F(ElasticityTest, TargetBlocksOfARunningCopyAreNobodysUntilItEnds) {
  Reset(SmallOptions(), 2, 20, true);
  Leave(1);
  Start(1, 10);
  devices[1].accepts = true;
  Leave(0);
  ASSERT_EQ(Rebalance().size(), 1u);
  scheduler->Cancel(RequestId(1), events);
  scheduler->CheckIntegrity();
  EXPECT_EQ(scheduler->Stats().blocks_used, 1u);
  events.clear();
  Add(1, {9, 8, 7, 6, 5}, 4);  // the same id again: the report is the old copy's
  Step();
  toy.Copy(copying[0].copies);
  scheduler->MoveCopied(RequestId(1));
  scheduler->CheckIntegrity();
  ExpectAll(1, {{9, 8, 7, 6, 5}}, 4);
}

TEST_F(ElasticityTest, AFullTargetLeavesTheSequenceUntilThereIsRoom) {
  Reset(SmallOptions(), 2, 20, true);
  scheduler->SetBlocks(DomainId(1), 2);
  Leave(1);
  const auto prompts = Start(1, 16);
  devices[1].accepts = true;
  Leave(0);
  EXPECT_TRUE(Rebalance().empty());
  Step();
  scheduler->SetBlocks(DomainId(1), 12);
  EXPECT_EQ(Rebalance().size(), 1u);
  EndCopies();
  ExpectAll(1, prompts, 16);
  EXPECT_EQ(scheduler->Stats().preemptions, 0u);
}

TEST_F(ElasticityTest, ALeavingDevicesSequencesGoWhereThereIsRoomThoughOthersHaveFewer) {
  Reset(SmallOptions(), 3, 20, true);
  scheduler->SetBlocks(DomainId(1), 2);
  Leave(1);
  Leave(2);
  const auto prompts = Start(2, 16);
  devices[1].accepts = devices[2].accepts = true;
  Leave(0);
  const auto moves = Rebalance();
  ASSERT_EQ(moves.size(), 2u);
  for (const auto& move : moves) EXPECT_EQ(move.to, DeviceId(2));
  EndCopies();
  ExpectAll(2, prompts, 16);
}

TEST_F(ElasticityTest, DevicesThatGiveTheirSurplusAwayKeepTheirShare) {
  Reset(SmallOptions(), 2, 20, true);
  const auto prompts = Start(6, 16);  // three each
  AddDevice(DomainId(2), 20);
  const auto moves = Rebalance();
  ASSERT_EQ(moves.size(), 2u);
  EXPECT_NE(moves[0].from, moves[1].from);
  EndCopies();
  Step();
  for (int device = 0; device < 3; ++device) EXPECT_EQ(scheduler->SequencesOn(DeviceId(device)), 2) << device;
  ExpectAll(6, prompts, 16);
}

TEST_F(ElasticityTest, ForgottenKvIsComputedAgainWithTheSameTokens) {
  Reset(SmallOptions(), 2, 20, true);
  const auto prompts = Start(4, 10);
  toy.Lose(DomainId(0));
  scheduler->ForgetKv(DomainId(0));
  scheduler->CheckIntegrity();
  EXPECT_EQ(scheduler->Stats().preemptions, 2u);
  ExpectAll(4, prompts, 10);
}

TEST_F(ElasticityTest, KvThatIsForgottenWhileATailStillReadsItIsComputedAgain) {
  Reset(SmallOptions(), 2, 20, true);
  Leave(1);
  const auto prompts = Start(1, 14);
  devices[1].accepts = true;
  Leave(0);
  Rebalance();
  EndCopies();
  scheduler->Plan(0);
  scheduler->AbandonStep();
  toy.Lose(DomainId(0));
  scheduler->ForgetKv(DomainId(0));
  scheduler->CheckIntegrity();
  EXPECT_EQ(scheduler->Stats().preemptions, 1u);
  ExpectAll(1, prompts, 14);
}

TEST_F(ElasticityTest, APoolShrinksFromTheTopAndPreemptsWhoIsThere) {
  Reset(SmallOptions(), 1, 20);
  const auto prompts = Start(4, 8);
  scheduler->SetBlocks(DomainId(0), 5);
  scheduler->CheckIntegrity();
  EXPECT_EQ(scheduler->Stats().blocks_total, 5u);
  EXPECT_GT(scheduler->Stats().preemptions, 0u);
  EXPECT_LT(scheduler->Stats().preemptions, 4u);  // those below stay
  ExpectAll(4, prompts, 8);
}

TEST_F(ElasticityTest, RequestsWaitWhileNoDeviceAccepts) {
  Reset(SmallOptions(), 1, 20);
  Leave(0);
  Add(1, {1, 2, 3}, 4);
  EXPECT_FALSE(Step());
  EXPECT_TRUE(scheduler->Rebalance().empty());
  devices[0].accepts = true;
  scheduler->SetDevices(devices);
  ExpectAll(1, {{1, 2, 3}}, 4);
}

TEST_F(SchedulerTest, AShrinkingPoolIsVacatedByCopiesAndPreemptsNobody) {
  Reset(SmallOptions(), 1, 40);
  for (std::uint64_t id = 1; id <= 5; ++id) Add(id, std::vector<TokenId>(12, static_cast<TokenId>(id)), 40);
  for (int i = 0; i < 20; ++i) Step();
  scheduler->Cancel(RequestId(1), events);
  scheduler->Cancel(RequestId(2), events);
  scheduler->Cancel(RequestId(3), events);
  const DomainId domain(0);
  EXPECT_FALSE(scheduler->Vacated(domain, 30));
  for (int tries = 0; tries < 20 && !scheduler->Vacated(domain, 30); ++tries) {
    for (const Scheduler::Move& move : scheduler->VacateBlocks(domain, 30)) {
      EXPECT_EQ(move.from, move.to);
      for (const KvCopy& copy : move.copies) {
        EXPECT_GE(copy.from.value, 30);
        EXPECT_LT(copy.to.value, 30);
      }
      toy.Copy(move.copies);
      if (!move.copies.empty()) scheduler->MoveCopied(move.request);
    }
    Step();
  }
  ASSERT_TRUE(scheduler->Vacated(domain, 30));
  scheduler->SetBlocks(domain, 30);
  RunAll();
  EXPECT_EQ(scheduler->Stats().preemptions, 0u);
  for (std::uint64_t id = 4; id <= 5; ++id)
    EXPECT_EQ(TokensOf(id), Expected(std::vector<TokenId>(12, static_cast<TokenId>(id)), 40));
}

}  // namespace
}  // namespace elasticmoe::core
