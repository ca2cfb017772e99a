#include "core/schedule/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>

#include "base/check.h"
#include "base/rng.h"
#include "core/schedule/toy_devices.h"

namespace elasticmoe::core {
namespace {

// Everything at once, by seed: requests, cancels, dying steps, resizes of devices and pools, lost memory.
std::uint64_t RandomRun(std::uint64_t seed) {
  const CheckNote note("ELASTICMOE_SEED=" + std::to_string(seed));
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
  std::map<RequestId, GenerationRequest> wanted;
  std::map<RequestId, int> finishes;
  std::map<RequestId, std::vector<TokenId>> scores;
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
      for (const TokenLogprob& score : event.prompt_logprobs) scores[event.request].push_back(score.token);
      if (!event.finish) continue;
      EXPECT_EQ(++finishes[event.request], 1);
      trace = HashCombine(trace, static_cast<std::uint64_t>(*event.finish));
      const GenerationRequest& request = wanted[event.request];
      std::vector<TokenId> tokens = request.prompt;
      bool stopped = false;
      for (const TokenId token : generated[event.request]) {
        EXPECT_FALSE(stopped);
        EXPECT_EQ(token, NextToken(tokens));
        tokens.push_back(token);
        const auto count = static_cast<int>(tokens.size() - request.prompt.size());
        stopped = count > request.min_tokens &&
                  std::count(request.stop_token_ids.begin(), request.stop_token_ids.end(), token) > 0;
      }
      EXPECT_EQ(stopped, *event.finish == FinishReason::kStop);
      if (*event.finish == FinishReason::kLength) {
        EXPECT_EQ(
            static_cast<int>(generated[event.request].size()),
            std::min(request.max_tokens, options.max_model_len - static_cast<int>(request.prompt.size())));
      }
      if (request.prompt_logprobs >= 0 && (stopped || *event.finish == FinishReason::kLength)) {
        EXPECT_EQ(scores[event.request],
                  std::vector<TokenId>(request.prompt.begin() + 1, request.prompt.end()));
      }
    }
    events.clear();
  };
  const auto step = [&](bool may_die) {
    StepPlan plan = scheduler.Plan(0);
    events = std::move(plan.failed);
    take_events();
    if (plan.Empty()) return false;
    for (const TableWrite& write : plan.table_writes)
      trace = HashCombine(trace, static_cast<std::uint64_t>(write.block.value));
    for (const DevicePlan& device : plan.devices)
      for (const SequenceStep& one : device.sequences)
        trace = HashCombine(
            trace, HashCombine(one.request.value, static_cast<std::uint64_t>(one.start_position + one.rows)));
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
    switch (rng.Below(13)) {
      case 0:
      case 1:
      case 2: {
        std::vector<TokenId> prompt{static_cast<TokenId>(rng.Below(2))};
        for (std::uint64_t n = rng.Below(20); n > 0; --n)
          prompt.push_back(static_cast<TokenId>(rng.Below(3)));
        GenerationRequest request = Request(
            next_request, prompt, static_cast<int>(rng.Below(8) == 0 ? rng.Below(60) : rng.Below(20)));
        request.priority = static_cast<int>(rng.Below(2));
        request.prompt_logprobs = rng.Below(5) == 0 ? 0 : -1;
        request.min_tokens = static_cast<int>(rng.Below(3));
        if (rng.Below(2) == 0)
          for (TokenId token = 0; token < kVocab; token += 40)
            request.stop_token_ids.push_back(token + static_cast<TokenId>(rng.Below(40)));
        if (scheduler.Add(request, 0)) wanted[request.id] = request;
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
      case 9: {
        const DomainId domain = devices[rng.Below(devices.size())].domain;
        const std::uint32_t blocks = 8 + static_cast<std::uint32_t>(rng.Below(12));
        for (auto& move : scheduler.VacateBlocks(domain, blocks))
          if (!move.copies.empty()) copying.push_back(move);
        if (scheduler.Vacated(domain, blocks) && rng.Below(2) == 0) {
          const std::uint64_t preemptions = scheduler.Stats().preemptions;
          scheduler.SetBlocks(domain, blocks);
          EXPECT_EQ(scheduler.Stats().preemptions, preemptions);
        }
        break;
      }
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
  EXPECT_EQ(scheduler.Stats().blocks_used, 0u);
  for (const auto& [id, want] : wanted) EXPECT_EQ(finishes[id], 1) << "request " << id.value;
  return trace;
}

TEST(SchedulerProperty, TokensNeverDependOnWhatHappenedMeanwhile) {
  std::uint64_t first = 1, last = 400;
  if (const char* count = std::getenv("ELASTICMOE_SEEDS")) last = std::strtoull(count, nullptr, 10);
  if (const char* seed = std::getenv("ELASTICMOE_SEED")) first = last = std::strtoull(seed, nullptr, 10);
  for (std::uint64_t seed = first; seed <= last; ++seed) {
    const std::uint64_t trace = RandomRun(seed);
    EXPECT_EQ(trace, RandomRun(seed)) << "two runs of one seed differ";
    ASSERT_FALSE(::testing::Test::HasFailure()) << "ELASTICMOE_SEED=" << seed;
  }
}

}  // namespace
}  // namespace elasticmoe::core
