#include "core/schedule/scheduler.h"

#include <gtest/gtest.h>

#include <limits>

#include "core/schedule/toy_devices.h"

namespace elasticmoe::core {
namespace {

TEST_F(SchedulerTest, PrefillsInChunksThenDecodes) {
  ASSERT_TRUE(scheduler->Add(Request(1, {1, 2, 3, 4, 5, 6, 7}, 3), 0));
  ASSERT_TRUE(Step());
  EXPECT_EQ(last_plan.devices[0].sequences[0].rows, 5);
  EXPECT_FALSE(last_plan.devices[0].sequences[0].sample);
  ASSERT_TRUE(Step());
  EXPECT_EQ(last_plan.devices[0].sequences[0].rows, 2);
  EXPECT_TRUE(last_plan.devices[0].sequences[0].sample);
  RunAll();
  EXPECT_EQ(TokensOf(1), Expected({1, 2, 3, 4, 5, 6, 7}, 3));
  EXPECT_EQ(events.back().finish, FinishReason::kLength);
}

TEST_F(SchedulerTest, RefusesWhatCannotRunAndNamesTheField) {
  EXPECT_NE(scheduler->Add(Request(1, {}, 3), 0).error().message.find("prompt"), std::string::npos);
  EXPECT_FALSE(scheduler->Add(Request(1, {kVocab}, 3), 0));
  EXPECT_FALSE(scheduler->Add(Request(1, {-1}, 3), 0));
  EXPECT_FALSE(scheduler->Add(Request(1, std::vector<TokenId>(60, 1), 1), 0));
  Reset(SmallOptions(), 1, 4);
  EXPECT_FALSE(scheduler->Add(Request(1, std::vector<TokenId>(30, 1), 1), 0));
  EXPECT_TRUE(scheduler->Idle());
}

TEST_F(SchedulerTest, StopsAtStopIdsAndEndOfSequenceButNotBeforeMinTokens) {
  const TokenId first = NextToken(std::vector<TokenId>{1, 2});
  GenerationRequest request = Request(1, {1, 2}, 10);
  request.stop_token_ids = {first};
  ASSERT_TRUE(scheduler->Add(request, 0));
  RunAll();
  EXPECT_EQ(events.back().finish, FinishReason::kStop);
  EXPECT_EQ(events.back().stop_token, first);
  SchedulerOptions options = SmallOptions();
  options.eos_ids = {first};
  Reset(options, 1, 40);
  events.clear();
  request = Request(2, {1, 2}, 4);
  request.ignore_eos = true;
  ASSERT_TRUE(scheduler->Add(request, 0));
  request = Request(3, {1, 2}, 4);
  request.min_tokens = 2;
  ASSERT_TRUE(scheduler->Add(request, 0));
  RunAll();
  EXPECT_EQ(TokensOf(2).size(), 4u);
  EXPECT_EQ(TokensOf(3).size(), 4u);
}

TEST_F(SchedulerTest, SharesPrefixesWithoutChangingTokens) {
  const std::vector<TokenId> prompt{5, 6, 7, 8, 9, 10, 11, 12, 13};
  ASSERT_TRUE(scheduler->Add(Request(1, prompt, 4), 0));
  RunAll();
  ASSERT_TRUE(scheduler->Add(Request(2, prompt, 4), 0));
  RunAll();
  EXPECT_EQ(events.back().cached_prompt_tokens, 8);
  EXPECT_EQ(scheduler->Stats().prefix_hits, 8u);
  EXPECT_EQ(TokensOf(2), TokensOf(1));
}

TEST_F(SchedulerTest, PreemptsTheYoungestWhenBlocksRunOutAndItsTokensStay) {
  Reset(SmallOptions(), 1, 10);
  for (std::uint64_t id = 1; id <= 3; ++id)
    ASSERT_TRUE(scheduler->Add(Request(id, {static_cast<TokenId>(id), 2, 3, 4, 5, 6, 7}, 20), 0));
  RunAll();
  EXPECT_GT(scheduler->Stats().preemptions, 0u);
  for (std::uint64_t id = 1; id <= 3; ++id) {
    EXPECT_EQ(TokensOf(id), Expected({static_cast<TokenId>(id), 2, 3, 4, 5, 6, 7}, 20));
    EXPECT_EQ(FinishesOf(id), 1);
  }
}

TEST_F(SchedulerTest, EndsARequestThatOutgrowsThePoolWithTheNumbers) {
  Reset(SmallOptions(), 1, 3);
  ASSERT_TRUE(scheduler->Add(Request(1, {1, 2, 3}, 40), 0));
  RunAll();
  EXPECT_EQ(events.back().finish, FinishReason::kError);
  EXPECT_NE(events.back().error.find("3 KV blocks"), std::string::npos) << events.back().error;
}

TEST_F(SchedulerTest, ScoresThePromptWithoutGenerating) {
  GenerationRequest request = Request(1, {1, 2, 3, 4, 5, 6, 7, 8}, 0);
  request.prompt_logprobs = 0;
  ASSERT_TRUE(scheduler->Add(request, 0));
  RunAll();
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0].prompt_logprobs.size(), 7u);
  EXPECT_EQ(events[0].prompt_logprobs[6].token, 8);
}

TEST_F(SchedulerTest, StopIdsBeforeMinTokensAreOrdinaryTokens) {
  const std::vector<TokenId> answer = Expected({1, 2}, 4);
  for (int min_tokens = 0; min_tokens < 4; ++min_tokens) {
    Reset(SmallOptions(), 1, 40);
    GenerationRequest request = Request(1, {1, 2}, 10);
    request.stop_token_ids = answer;
    request.min_tokens = min_tokens;
    ASSERT_TRUE(scheduler->Add(request, 0));
    RunAll();
    EXPECT_EQ(TokensOf(1).size(), static_cast<std::size_t>(min_tokens + 1));
    EXPECT_EQ(events.back().finish, FinishReason::kStop);
  }
}

TEST_F(SchedulerTest, DecodesBeforeItPrefillsWithinTheRowsOfAStep) {
  Add(1, {1, 2, 3}, 20);
  Add(2, {4, 5, 6}, 20);
  Step();
  Add(3, std::vector<TokenId>(20, 7), 2);
  Step();
  ASSERT_EQ(Planned(), (std::vector<std::uint64_t>{1, 2, 3}));
  EXPECT_EQ(last_plan.devices[0].sequences[0].rows, 1);
  EXPECT_EQ(last_plan.devices[0].sequences[1].rows, 1);
  EXPECT_EQ(last_plan.devices[0].sequences[2].rows, 5);
}

TEST_F(SchedulerTest, AdmitsByPriorityThenArrival) {
  SchedulerOptions options = SmallOptions();
  options.max_running = 1;
  Reset(options, 1, 40);
  Add(1, {1, 2}, 2, 1);
  Add(2, {1, 3}, 2, 1);
  Add(3, {1, 4}, 2, 0);
  RunAll();
  std::vector<std::uint64_t> order;
  for (const TokenEvent& event : events)
    if (event.finish) order.push_back(event.request.value);
  EXPECT_EQ(order, (std::vector<std::uint64_t>{3, 1, 2}));
}

TEST_F(SchedulerTest, NobodyOvertakesAHeadOfTheQueueThatDoesNotFit) {
  Reset(SmallOptions(), 1, 10);
  Add(1, std::vector<TokenId>(18, 1), 8);
  Add(2, std::vector<TokenId>(22, 2), 4);
  Add(3, {3}, 1);
  for (int i = 0; i < 6; ++i) {
    Step();
    ASSERT_EQ(Planned(), (std::vector<std::uint64_t>{1})) << "step " << i;
  }
  EXPECT_EQ(scheduler->Stats().waiting, 2);
  RunAll();
  EXPECT_EQ(scheduler->Stats().preemptions, 0u);
  for (std::uint64_t id = 1; id <= 3; ++id) EXPECT_EQ(FinishesOf(id), 1);
}

TEST_F(SchedulerTest, BlocksThatAChunkedPromptWillNeedAreNotGivenToOthers) {
  Reset(SmallOptions(), 1, 12);
  Add(1, std::vector<TokenId>(38, 1), 3);  // 10 blocks, two of them in the first chunk
  Add(2, std::vector<TokenId>(16, 2), 3);
  RunAll();
  EXPECT_EQ(scheduler->Stats().preemptions, 0u);
}

TEST_F(SchedulerTest, AHeadThatTheLeastLoadedDeviceCannotHoldGoesToAnother) {
  Reset(SmallOptions(), 2, 12, true);
  scheduler->SetBlocks(DomainId(0), 4);
  Add(1, {1}, 10);  // device 0
  Add(2, {2}, 10);  // device 1
  Step();
  Add(3, std::vector<TokenId>(14, 3), 5);  // device 0 is first by number, but has no room
  Step();
  EXPECT_EQ(scheduler->SequencesOn(DeviceId(1)), 2);
}

TEST_F(SchedulerTest, SharesSequencesByWeight) {
  SchedulerOptions options = SmallOptions();
  options.max_step_rows = 60;
  Reset(options, 2, 60);
  devices[0].weight = 2.0;
  scheduler->SetDevices(devices);
  for (std::uint64_t id = 1; id <= 6; ++id) Add(id, {static_cast<TokenId>(id)}, 3);
  Step();
  EXPECT_EQ(scheduler->SequencesOn(DeviceId(0)), 4);
  EXPECT_EQ(scheduler->SequencesOn(DeviceId(1)), 2);
}

TEST_F(SchedulerTest, ThePreemptedComesBackBeforeThoseWhoArrivedLater) {
  SchedulerOptions options = SmallOptions();
  options.prefix_cache = false;
  Reset(options, 1, 6);
  Add(1, {1, 2, 3}, 18);
  Add(2, {4, 5, 6}, 18);
  Step();
  Add(3, {7}, 1);
  RunAll();
  EXPECT_GT(scheduler->Stats().preemptions, 0u);
  std::vector<std::uint64_t> order;
  for (const TokenEvent& event : events)
    if (event.finish) order.push_back(event.request.value);
  EXPECT_EQ(order.front(), 3u);  // it fitted at once
  EXPECT_EQ(TokensOf(2), Expected({4, 5, 6}, 18));
  EXPECT_LE(scheduler->Stats().preemptions, 2u);  // no thrashing
}

TEST_F(SchedulerTest, WhoOutgrowsThePoolPreemptsNobodyOnItsWayOut) {
  Reset(SmallOptions(), 1, 8);
  Add(1, {1, 2, 3}, 50);
  Add(2, {4}, 25);
  while (FinishesOf(1) == 0 && Step()) {
  }
  ASSERT_NE(FinishOf(1), nullptr);
  EXPECT_EQ(FinishOf(1)->finish, FinishReason::kError);
  RunAll();
  EXPECT_EQ(TokensOf(2), Expected({4}, 25));
}

TEST_F(SchedulerTest, ARequestThatFillsThePoolExactlyIsTaken) {
  Reset(SmallOptions(), 1, 3);
  Add(1, std::vector<TokenId>(12, 1), 1);
  RunAll();
  EXPECT_EQ(events.back().finish, FinishReason::kLength);
  EXPECT_FALSE(scheduler->Add(Request(2, std::vector<TokenId>(12, 1), 2), 0));
  GenerationRequest score = Request(3, std::vector<TokenId>(12, 2), 0);
  score.prompt_logprobs = 0;
  ASSERT_TRUE(scheduler->Add(score, 0));
  RunAll();
  EXPECT_EQ(events.back().prompt_logprobs.size(), 11u);
}

TEST_F(SchedulerTest, AllBlocksAreFreeAgainWhenNothingRuns) {
  for (std::uint64_t id = 1; id <= 5; ++id) Add(id, {1, 2, 3, 4, 5}, 6);
  RunAll();
  EXPECT_EQ(scheduler->Stats().blocks_used, 0u);
  EXPECT_EQ(scheduler->Stats().blocks_total, 40u);
}

TEST_F(SchedulerTest, CutsMaxTokensToTheContext) {
  Add(1, std::vector<TokenId>(57, 1), 100);
  RunAll();
  EXPECT_EQ(TokensOf(1).size(), 3u);
  EXPECT_EQ(events.back().finish, FinishReason::kLength);
}

TEST_F(SchedulerTest, RefusesWhenTheQueueIsFullOrTheIdIsTaken) {
  SchedulerOptions options = SmallOptions();
  options.max_waiting = 1;
  Reset(options, 1, 40);
  Add(1, {1}, 2);
  EXPECT_EQ(scheduler->Add(Request(2, {1}, 2), 0).error().code, ErrorCode::kResourceExhausted);
  Step();
  EXPECT_EQ(scheduler->Add(Request(1, {1}, 2), 0).error().code, ErrorCode::kAlreadyExists);
  GenerationRequest negative = Request(3, {1}, -1);
  EXPECT_EQ(scheduler->Add(negative, 0).error().code, ErrorCode::kInvalidArgument);
}

TEST_F(SchedulerTest, CancelEndsARequestOfTheStepInFlightAndItsResultIsIgnored) {
  Add(1, {1, 2, 3}, 5);
  Add(2, {4, 5, 6}, 5);
  const StepPlan plan = scheduler->Plan(0);
  const StepResult result = toy.Run(*scheduler, plan);
  scheduler->Cancel(RequestId(1), events);
  EXPECT_EQ(events.back().finish, FinishReason::kAbort);
  scheduler->CheckIntegrity();
  Add(1, {7, 8, 9}, 5);  // the same id again, before the old step has ended
  scheduler->Complete(result, 0, events);
  EXPECT_TRUE(TokensOf(1).empty());
  RunAll();
  EXPECT_EQ(TokensOf(1), Expected({7, 8, 9}, 5));
  EXPECT_EQ(TokensOf(2), Expected({4, 5, 6}, 5));
  scheduler->Cancel(RequestId(1), events);  // it has ended: nothing happens
  EXPECT_EQ(FinishesOf(1), 2);
}

TEST_F(SchedulerTest, CancelTakesAWaitingRequestOutOfTheQueue) {
  Add(1, {1}, 2);
  scheduler->Cancel(RequestId(1), events);
  EXPECT_TRUE(scheduler->Idle());
  EXPECT_FALSE(Step());
  EXPECT_EQ(FinishesOf(1), 1);
}

TEST_F(SchedulerTest, AStepThatDiedIsPlannedAgainWithItsWholeTables) {
  Add(1, {1, 2, 3, 4, 5, 6, 7}, 5);
  Step();
  const StepPlan died = scheduler->Plan(0);
  scheduler->AbandonStep();
  scheduler->CheckIntegrity();
  const StepPlan again = scheduler->Plan(0);
  ASSERT_EQ(again.devices.size(), 1u);
  EXPECT_EQ(again.devices[0].sequences[0].start_position, died.devices[0].sequences[0].start_position);
  EXPECT_EQ(again.devices[0].sequences[0].rows, died.devices[0].sequences[0].rows);
  EXPECT_NE(again.step, died.step);
  EXPECT_EQ(again.table_writes.size(), scheduler->BlockTable(RequestId(1)).size());
  scheduler->Complete(toy.Run(*scheduler, again), 0, events);
  RunAll();
  EXPECT_EQ(TokensOf(1), Expected({1, 2, 3, 4, 5, 6, 7}, 5));
}

TEST_F(SchedulerTest, ReportsLogprobsOnlyWhereAskedFor) {
  GenerationRequest request = Request(1, {1}, 2);
  request.sampling.logprobs = 0;
  ASSERT_TRUE(scheduler->Add(request, 0));
  Add(2, {2}, 2);
  RunAll();
  for (const TokenEvent& event : events)
    EXPECT_EQ(event.logprobs.size(), event.request == RequestId(1) ? 1u : 0u);
}

TEST_F(SchedulerTest, PromptScoresComeOnceAndCompleteThoughItWasPreempted) {
  SchedulerOptions options = SmallOptions();
  Reset(options, 1, 40);
  const std::vector<TokenId> prompt{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
  Add(1, prompt, 2);
  RunAll();  // the prompt is cached now
  for (int steps_before = 1; steps_before <= 5; ++steps_before) {
    events.clear();
    GenerationRequest request = Request(2, prompt, 6);
    request.prompt_logprobs = 0;
    ASSERT_TRUE(scheduler->Add(request, 0));
    for (int i = 0; i < steps_before; ++i) Step();
    scheduler->ForgetKv(DomainId(0));
    RunAll();
    std::vector<TokenId> scored;
    int with_scores = 0;
    for (const TokenEvent& event : events) {
      with_scores += !event.prompt_logprobs.empty();
      for (const TokenLogprob& score : event.prompt_logprobs) scored.push_back(score.token);
    }
    EXPECT_EQ(with_scores, 1);
    EXPECT_EQ(scored, std::vector<TokenId>(prompt.begin() + 1, prompt.end())) << steps_before;
    EXPECT_EQ(events.back().cached_prompt_tokens, 0);
    EXPECT_EQ(TokensOf(2), Expected(prompt, 6));
  }
}

TEST_F(SchedulerTest, WhoHasItsPromptScoresIsNotScoredAgain) {
  GenerationRequest request = Request(1, {1, 2, 3}, 4);
  request.prompt_logprobs = 0;
  ASSERT_TRUE(scheduler->Add(request, 0));
  Step();
  EXPECT_TRUE(last_plan.devices[0].sequences[0].score_prompt);
  while (Step()) EXPECT_FALSE(last_plan.devices[0].sequences[0].score_prompt);
  EXPECT_EQ(FinishesOf(1), 1);
}

TEST_F(SchedulerTest, TellsHowLongARequestWaitedWithItsFirstEvent) {
  SchedulerOptions options = SmallOptions();
  options.max_running = 1;
  Reset(options, 1, 40);
  ASSERT_TRUE(scheduler->Add(Request(1, {1, 2, 3, 4, 5, 6}, 1), 100));
  ASSERT_TRUE(scheduler->Add(Request(2, {1}, 2), 100));
  for (TimeNs now = 130; !scheduler->Idle(); now += 10) {
    const StepPlan plan = scheduler->Plan(now);
    scheduler->Complete(toy.Run(*scheduler, plan), now + 5, events);
  }
  ASSERT_EQ(events.size(), 3u);
  EXPECT_EQ(events[0].queue_ns, 30);  // not the time of its second chunk
  EXPECT_EQ(events[1].queue_ns, 50);
  EXPECT_EQ(events[2].queue_ns, -1);
}

TEST_F(SchedulerTest, ATokenThatIsNoNumberEndsTheRequestWithAnError) {
  Add(1, {1}, 3);
  const StepPlan plan = scheduler->Plan(0);
  StepResult result = toy.Run(*scheduler, plan);
  result.sequences[0].sampled.logprob = std::numeric_limits<float>::quiet_NaN();
  scheduler->Complete(result, 0, events);
  EXPECT_EQ(events.back().finish, FinishReason::kError);
  EXPECT_TRUE(TokensOf(1).empty());
  EXPECT_TRUE(scheduler->Idle());
}

TEST_F(SchedulerTest, FailAllEndsEverythingOnceAndServesOnAfterwards) {
  Add(1, {1}, 3);
  Add(2, {2}, 3);
  scheduler->Plan(0);
  Add(3, {3}, 3);
  scheduler->FailAll("the engine gave up", events);
  EXPECT_TRUE(scheduler->Idle());
  for (std::uint64_t id = 1; id <= 3; ++id) {
    ASSERT_EQ(FinishesOf(id), 1);
    EXPECT_EQ(FinishOf(id)->error, "the engine gave up");
  }
  scheduler->CheckIntegrity();
  EXPECT_EQ(scheduler->Stats().blocks_used, 0u);
  Add(4, {4}, 3);
  RunAll();
  EXPECT_EQ(TokensOf(4), Expected({4}, 3));
}

TEST_F(SchedulerTest, ContinuationsOfPromptsPrefilledAtTheSameTimeAreAllFound) {
  const std::vector<TokenId> prompt{1, 2, 3, 4, 5};
  GenerationRequest second = Request(2, prompt, 8);
  Add(1, prompt, 1);
  ASSERT_TRUE(scheduler->Add(second, 0));
  RunAll();
  std::vector<TokenId> next = prompt;
  const std::vector<TokenId> answer = TokensOf(2);
  next.insert(next.end(), answer.begin(), answer.end());
  Add(3, next, 1);
  RunAll();
  EXPECT_EQ(events.back().cached_prompt_tokens, 12);
}

}  // namespace
}  // namespace elasticmoe::core
