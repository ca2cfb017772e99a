// For tests of the scheduler: a toy model and devices whose KV memory shows every wrong table, lost copy or
// reused block.
#pragma once

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "base/hash.h"
#include "core/schedule/scheduler.h"

namespace elasticmoe::core {

inline constexpr int kVocab = 1000;
inline constexpr int kBlock = 4;

// The toy model: the next token is a hash of all tokens before it.
inline TokenId NextToken(std::span<const TokenId> tokens) {
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

inline SchedulerOptions SmallOptions() {
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

inline GenerationRequest Request(std::uint64_t id, std::vector<TokenId> prompt, int max_tokens) {
  GenerationRequest request;
  request.id = RequestId(id);
  request.prompt = std::move(prompt);
  request.max_tokens = max_tokens;
  return request;
}

class SchedulerTest : public ::testing::Test {
 protected:
  void SetUp() override { Reset(SmallOptions(), 1, 40); }

  // Devices of domain 0, or each of its own domain with `blocks` KV blocks.
  void Reset(SchedulerOptions options, int count, std::uint32_t blocks, bool domain_per_device = false) {
    scheduler = std::make_unique<Scheduler>(options);
    events.clear();
    devices.clear();
    toy = {};
    toy.max_rows = options.max_step_rows;
    for (int i = 0; i < count; ++i) AddDevice(DomainId(domain_per_device ? i : 0), blocks);
  }
  void AddDevice(DomainId domain, std::uint32_t blocks) {
    const DeviceId device(static_cast<int>(devices.size()));
    devices.push_back({device, domain});
    toy.domain_of[device] = domain;
    scheduler->SetDevices(devices);
    scheduler->SetBlocks(domain, blocks);
  }
  void Leave(int device) {
    devices[device].accepts = false;
    scheduler->SetDevices(devices);
  }

  void Add(std::uint64_t id, std::vector<TokenId> prompt, int max_tokens, int priority = 0) {
    GenerationRequest request = Request(id, std::move(prompt), max_tokens);
    request.priority = priority;
    ASSERT_TRUE(scheduler->Add(std::move(request), 0));
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
    int steps = 0;
    while (steps < 10'000 && Step()) ++steps;
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
  const TokenEvent* FinishOf(std::uint64_t id) const {
    for (const TokenEvent& event : events)
      if (event.request == RequestId(id) && event.finish) return &event;
    return nullptr;
  }
  // Ids in the order in which the last plan names them.
  std::vector<std::uint64_t> Planned() const {
    std::vector<std::uint64_t> ids;
    for (const DevicePlan& device : last_plan.devices)
      for (const SequenceStep& step : device.sequences) ids.push_back(step.request.value);
    return ids;
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
  std::vector<SchedulerDevice> devices;
  ToyDevices toy;
  StepPlan last_plan;
  std::vector<TokenEvent> events;
};

}  // namespace elasticmoe::core
