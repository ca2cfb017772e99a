#include "core/schedule/scheduler.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <set>

#include "base/hash.h"
#include "base/rng.h"

namespace elasticmoe::core {
namespace {

constexpr int kVocab = 1000;
constexpr int kBlock = 4;

// The toy model: the next token is a hash of all tokens before it.
TokenId NextToken(std::span<const TokenId> tokens) {
  std::uint64_t hash = 7;
  for (const TokenId token : tokens) hash = HashCombine(hash, static_cast<std::uint64_t>(token));
  return static_cast<TokenId>(hash % kVocab);
}

// KV memory as the kernels would see it: what was written where. Computing a row reads every position before
// it through the block table, so a wrong table, a lost copy or a reused block shows at once.
class ToyDevices {
 public:
  StepResult Run(const Scheduler& scheduler, const StepPlan& plan) {
    Prepare(plan);
    StepResult result;
    result.step = plan.step;
    for (const DevicePlan& device : plan.devices) {
      int rows = 0;
      for (const SequenceStep& step : device.sequences) {
        rows += step.rows;
        const auto tokens = scheduler.Tokens(step.request);
        const auto& table = tables_[step.table_slot];
        const DomainId domain = domain_of[device.device];
        for (int p = step.start_position; p < step.start_position + step.rows; ++p)
          memory_[{domain, table.at(p / kBlock), p % kBlock}] = HashOf(tokens.first(p + 1));
        for (int p = 0; p < step.start_position + step.rows; ++p)
          EXPECT_EQ((memory_[{domain, table.at(p / kBlock), p % kBlock}]), HashOf(tokens.first(p + 1)))
              << "request " << step.request.value << " position " << p;
        SequenceResult one;
        one.request = step.request;
        if (step.sample) {
          EXPECT_EQ(step.start_position + step.rows, static_cast<int>(tokens.size()));
          one.sampled.token = NextToken(tokens);
        }
        if (step.score_prompt) {
          const auto prompt = static_cast<int>(scheduler.Request(step.request).prompt.size());
          for (int r = 0; r < step.rows && step.start_position + r + 1 < prompt; ++r)
            one.prompt_logprobs.push_back({tokens[step.start_position + r + 1], 0.0F, {}});
        }
        result.sequences.push_back(one);
      }
      EXPECT_LE(rows, max_rows);
    }
    return result;
  }

  // Half a step: tables and copies happened, some rows were written, then a device died.
  void RunHalf(const Scheduler& scheduler, const StepPlan& plan) {
    Prepare(plan);
    for (const DevicePlan& device : plan.devices) {
      const SequenceStep& step = device.sequences.front();
      memory_[{domain_of[device.device], tables_[step.table_slot].at(step.start_position / kBlock),
               step.start_position % kBlock}] =
          HashOf(scheduler.Tokens(step.request).first(step.start_position + 1));
    }
  }

  void Copy(const std::vector<KvCopy>& copies) {
    for (const KvCopy& copy : copies)
      for (int slot = 0; slot < kBlock; ++slot)
        memory_[{copy.to_domain, copy.to, slot}] = memory_[{copy.from_domain, copy.from, slot}];
  }

  void Lose(DomainId domain) {
    std::erase_if(memory_, [&](const auto& entry) { return std::get<0>(entry.first) == domain; });
  }

  std::map<DeviceId, DomainId> domain_of;
  int max_rows = 0;

 private:
  static std::uint64_t HashOf(std::span<const TokenId> tokens) {
    std::uint64_t hash = tokens.size();
    for (const TokenId token : tokens) hash = HashCombine(hash, static_cast<std::uint64_t>(token));
    return hash;
  }
  void Prepare(const StepPlan& plan) {
    for (const TableWrite& write : plan.table_writes) tables_[write.table_slot][write.index] = write.block;
    Copy(plan.copies_before);
  }
  std::map<int, std::map<int, BlockId>> tables_;
  std::map<std::tuple<DomainId, BlockId, int>, std::uint64_t> memory_;
};

SchedulerOptions SmallOptions() {
  SchedulerOptions options;
  options.vocab = kVocab;
  options.max_model_len = 60;
  options.block_tokens = kBlock;
  options.max_running = 6;
  options.max_waiting = 100;
  options.max_step_rows = 12;
  options.max_chunk_rows = 5;
  return options;
}

GenerationRequest Request(std::uint64_t id, std::vector<TokenId> prompt, int max_tokens) {
  GenerationRequest request;
  request.id = RequestId(id);
  request.prompt = std::move(prompt);
  request.max_tokens = max_tokens;
  return request;
}

class SchedulerTest : public ::testing::Test {
 protected:
  void SetUp() override { Reset(SmallOptions(), 1, 40); }

  void Reset(SchedulerOptions options, int devices, std::uint32_t blocks) {
    scheduler = std::make_unique<Scheduler>(options);
    std::vector<SchedulerDevice> list;
    toy.max_rows = options.max_step_rows;
    for (int i = 0; i < devices; ++i) {
      list.push_back({DeviceId(i), DomainId(0)});
      toy.domain_of[DeviceId(i)] = DomainId(0);
    }
    scheduler->SetDevices(list);
    scheduler->SetBlocks(DomainId(0), blocks);
  }

  // One step; false if there is nothing to run.
  bool Step() {
    const StepPlan plan = scheduler->Plan(0);
    events.insert(events.end(), plan.failed.begin(), plan.failed.end());
    if (plan.Empty()) return false;
    last_plan = plan;
    scheduler->Complete(toy.Run(*scheduler, plan), 0, events);
    scheduler->CheckIntegrity();
    return true;
  }
  void RunAll() {
    for (int i = 0; i < 10'000 && Step(); ++i) {
    }
    EXPECT_TRUE(scheduler->Idle());
  }
  std::vector<TokenId> TokensOf(std::uint64_t id) const {
    std::vector<TokenId> tokens;
    for (const TokenEvent& event : events)
      if (event.request == RequestId(id))
        tokens.insert(tokens.end(), event.tokens.begin(), event.tokens.end());
    return tokens;
  }
  int FinishesOf(std::uint64_t id) const {
    int count = 0;
    for (const TokenEvent& event : events)
      count += event.request == RequestId(id) && event.finish.has_value();
    return count;
  }
  static std::vector<TokenId> Expected(std::vector<TokenId> tokens, int count) {
    std::vector<TokenId> generated;
    for (int i = 0; i < count; ++i) {
      generated.push_back(NextToken(tokens));
      tokens.push_back(generated.back());
    }
    return generated;
  }

  std::unique_ptr<Scheduler> scheduler;
  ToyDevices toy;
  StepPlan last_plan;
  std::vector<TokenEvent> events;
};

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

TEST_F(SchedulerTest, HandsSequencesOverInsideADomainAtOnce) {
  Reset(SmallOptions(), 2, 40);
  for (std::uint64_t id = 1; id <= 4; ++id)
    ASSERT_TRUE(scheduler->Add(Request(id, {1, 2, static_cast<TokenId>(id)}, 10), 0));
  Step();
  EXPECT_EQ(scheduler->SequencesOn(DeviceId(0)), 2);
  const SchedulerDevice leaving[] = {{DeviceId(0), DomainId(0)}, {DeviceId(1), DomainId(0), 1.0, false}};
  scheduler->SetDevices(leaving);
  for (const auto& move : scheduler->Rebalance()) EXPECT_TRUE(move.copies.empty());
  EXPECT_EQ(scheduler->SequencesOn(DeviceId(1)), 0);
  scheduler->SetDevices(std::span(leaving).first(1));
  RunAll();
  for (std::uint64_t id = 1; id <= 4; ++id)
    EXPECT_EQ(TokensOf(id), Expected({1, 2, static_cast<TokenId>(id)}, 10));
}

// Everything at once, by seed: requests, cancels, dying steps, resizes of devices and pools, lost memory.
std::uint64_t RandomRun(std::uint64_t seed) {
  Rng rng(seed);
  SchedulerOptions options = SmallOptions();
  options.max_running = 2 + static_cast<int>(rng.Below(6));
  options.prefix_cache = rng.Below(4) != 0;
  const bool domains = rng.Below(2) == 0;
  Scheduler scheduler(options);
  ToyDevices toy;
  toy.max_rows = options.max_step_rows;
  std::vector<SchedulerDevice> devices;
  const auto add_device = [&](int id) {
    const DeviceId device(id);
    const DomainId domain(domains ? id : 0);
    toy.domain_of[device] = domain;
    devices.push_back({device, domain, 1.0 + static_cast<double>(rng.Below(2))});
  };
  add_device(0);
  scheduler.SetDevices(devices);
  scheduler.SetBlocks(DomainId(0), 20);
  std::map<RequestId, std::vector<TokenId>> generated;
  std::map<RequestId, std::pair<std::vector<TokenId>, int>> wanted;
  std::map<RequestId, int> finishes;
  std::vector<Scheduler::Move> copying;
  std::vector<TokenEvent> events;
  std::uint64_t trace = seed;
  int next_device = 1;
  std::uint64_t next_request = 1;
  const auto take_events = [&] {
    for (const TokenEvent& event : events) {
      trace = HashCombine(trace, event.request.value);
      for (const TokenId token : event.tokens) {
        generated[event.request].push_back(token);
        trace = HashCombine(trace, static_cast<std::uint64_t>(token));
      }
      if (!event.finish) continue;
      EXPECT_EQ(++finishes[event.request], 1);
      const auto& [prompt, count] = wanted[event.request];
      std::vector<TokenId> tokens = prompt;
      for (const TokenId token : generated[event.request]) {
        EXPECT_EQ(token, NextToken(tokens));
        tokens.push_back(token);
      }
      if (*event.finish == FinishReason::kLength) {
        EXPECT_EQ(static_cast<int>(generated[event.request].size()), count);
      }
    }
    events.clear();
  };
  const auto step = [&](bool may_die) {
    StepPlan plan = scheduler.Plan(0);
    events = std::move(plan.failed);
    take_events();
    if (plan.Empty()) return false;
    if (may_die && rng.Below(6) == 0) {
      if (rng.Below(2) == 0) toy.RunHalf(scheduler, plan);
      scheduler.AbandonStep();
    } else {
      StepResult result = toy.Run(scheduler, plan);
      if (rng.Below(10) == 0 && !result.sequences.empty())
        scheduler.Cancel(result.sequences[0].request, events);
      scheduler.Complete(result, 0, events);
      take_events();
    }
    return true;
  };
  const auto finish_moves = [&](bool all) {
    for (auto at = copying.begin(); at != copying.end();) {
      if (!all && rng.Below(3) != 0) {
        ++at;
        continue;
      }
      if (!all && rng.Below(5) == 0) {
        scheduler.MoveFailed(at->request);
      } else {
        toy.Copy(at->copies);
        scheduler.MoveCopied(at->request);
      }
      at = copying.erase(at);
    }
  };
  const auto rebalance = [&] {
    if (!copying.empty()) return;  // a move ends before the next begins
    for (auto& move : scheduler.Rebalance())
      if (!move.copies.empty()) copying.push_back(move);
  };
  for (int i = 0; i < 120; ++i) {
    switch (rng.Below(12)) {
      case 0:
      case 1:
      case 2: {
        std::vector<TokenId> prompt{static_cast<TokenId>(rng.Below(2))};
        for (std::uint64_t n = rng.Below(20); n > 0; --n)
          prompt.push_back(static_cast<TokenId>(rng.Below(3)));
        const int count = 1 + static_cast<int>(rng.Below(20));
        GenerationRequest request = Request(next_request, prompt, count);
        request.priority = static_cast<int>(rng.Below(2));
        request.prompt_logprobs = rng.Below(5) == 0 ? 0 : -1;
        if (scheduler.Add(request, 0))
          wanted[request.id] = {prompt, std::min(count, options.max_model_len - int(prompt.size()))};
        ++next_request;
        break;
      }
      case 3:
        if (next_request > 1) scheduler.Cancel(RequestId(1 + rng.Below(next_request - 1)), events);
        take_events();
        break;
      case 4:
        if (devices.size() < 4) {
          add_device(next_device++);
          scheduler.SetDevices(devices);
          if (domains)
            scheduler.SetBlocks(devices.back().domain, 12 + static_cast<std::uint32_t>(rng.Below(10)));
          rebalance();
        }
        break;
      case 5:  // a device leaves: it stops accepting, its sequences move, then it is gone
        if (devices.size() > 1 && copying.empty()) {
          const std::size_t index = rng.Below(devices.size());
          devices[index].accepts = false;
          scheduler.SetDevices(devices);
          for (int tries = 0; tries < 50 && scheduler.SequencesOn(devices[index].device) > 0; ++tries) {
            rebalance();
            finish_moves(true);
            step(false);
            scheduler.CheckIntegrity();
          }
          if (scheduler.SequencesOn(devices[index].device) == 0 && copying.empty()) {
            devices.erase(devices.begin() + static_cast<long>(index));
          } else {
            devices[index].accepts = true;
          }
          scheduler.SetDevices(devices);
        }
        break;
      case 6:
        scheduler.SetBlocks(devices[rng.Below(devices.size())].domain,
                            8 + static_cast<std::uint32_t>(rng.Below(20)));
        break;
      case 7:
        if (rng.Below(3) == 0) {
          const DomainId domain = devices[rng.Below(devices.size())].domain;
          toy.Lose(domain);
          scheduler.ForgetKv(domain);
          std::erase_if(copying, [&](const auto& move) {
            scheduler.MoveFailed(move.request);
            return true;
          });
        }
        break;
      case 8:
        rebalance();
        break;
      default:
        step(true);
        break;
    }
    finish_moves(false);
    scheduler.CheckIntegrity();
  }
  finish_moves(true);
  for (int i = 0; i < 5000 && step(false); ++i) scheduler.CheckIntegrity();
  EXPECT_TRUE(scheduler.Idle());
  for (const auto& [id, want] : wanted) EXPECT_EQ(finishes[id], 1) << "request " << id.value;
  return trace;
}

TEST(SchedulerProperty, TokensNeverDependOnWhatHappenedMeanwhile) {
  std::uint64_t first = 1, last = 400;
  if (const char* seed = std::getenv("ELASTICMOE_SEED")) first = last = std::strtoull(seed, nullptr, 10);
  for (std::uint64_t seed = first; seed <= last; ++seed) {
    const std::uint64_t trace = RandomRun(seed);
    EXPECT_EQ(trace, RandomRun(seed)) << "two runs of one seed differ";
    ASSERT_FALSE(::testing::Test::HasFailure()) << "ELASTICMOE_SEED=" << seed;
  }
}

}  // namespace
}  // namespace elasticmoe::core
