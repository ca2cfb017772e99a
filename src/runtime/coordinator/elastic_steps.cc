// The engine's thread: one step after the other, and what is told about them.
#include <algorithm>
#include <limits>
#include <utility>

#include "base/clock.h"
#include "base/log.h"
#include "core/policy/forecast.h"
#include "runtime/coordinator/elastic_engine.h"

namespace elasticmoe::runtime {

void ElasticEngine::Loop() {
  for (;;) {
    TakeInbox();
    TakeMoved();
    RunTasks(true);
    UpdateKvBlocks();
    if (rebalance_) Rebalance();
    RecoverFromDeaths();
    if (HmmDown()) FollowNextHmm();
    if (death_) continue;  // a worker has not followed
    core::StepPlan plan = asleep_ ? core::StepPlan{} : scheduler_->Plan(Now());
    std::move(plan.failed.begin(), plan.failed.end(), std::back_inserter(events_));
    if (!leaving_.empty()) PublishSettled();  // sequences change their device when a step is planned
    if (!plan.Empty()) {
      if (const TimeNs now = Now(); last_step_end_ != 0 && now - last_step_end_ > longest_gap_)
        longest_gap_ = now - last_step_end_;
      RunStep(plan);
      last_step_end_ = Now();
      const std::scoped_lock lock(mutex_);
      if (stopping_) break;
      continue;
    }
    PublishStats();
    Deliver();
    last_step_end_ = 0;
    devices_ended_ = 0;
    std::unique_lock lock(mutex_);
    busy_ = !scheduler_->Idle() || !submitted_.empty();
    if (stopping_) break;
    const auto anything = [&] {
      return stopping_ || death_ || other_death_ || kv_changed_ || !submitted_.empty() ||
             !cancelled_.empty() || !tasks_.empty() || mover_->AnythingDone();
    };
    if (hmm_down_)
      work_.wait_for(lock, kHmmPoll, anything);
    else
      work_.wait(lock, anything);
    if (stopping_) break;
  }
  RunTasks(false);
  TakeInbox();
  std::vector<RequestId> left;
  for (const auto& [id, sink] : sinks_) left.push_back(id);
  for (const RequestId id : left) scheduler_->Cancel(id, events_);
  Deliver();
}

void ElasticEngine::WriteView(const core::Placement& placement, StepView& view) const {
  view.epoch = placement.epoch().value;
  view.placement_index = static_cast<std::int32_t>(view.epoch % kPlacementRing);
  view.member_count = static_cast<std::int32_t>(placement.members().size());
  for (int rank = 0; rank < view.member_count; ++rank) view.members[rank] = placement.members()[rank].value;
}

void ElasticEngine::BeginDevice(DeviceId id, std::uint32_t step) const {
  DeviceHeader& device = exchange_->device(id.value);
  device.entry_count = 0;
  device.row_count = 0;
  // Nobody may take the words of an earlier life of this device for this step's.
  const std::uint32_t before = LayerTag(step, moe_layers_, -1);
  device.dispatched.value.store(before, std::memory_order_relaxed);
  device.returned.value.store(before, std::memory_order_relaxed);
}

void ElasticEngine::WriteStep(const core::StepPlan& plan, std::uint32_t step) {
  ExchangeHeader& header = exchange_->header();
  header.step = step;
  WriteView(placement_, header.views[0]);
  UpdateSpin();
  exchange_->BeginProgress();
  for (const DeviceId member : placement_.members()) BeginDevice(member, step);
  for (const core::TableWrite& write : plan.table_writes)
    exchange_->BlockTable(write.table_slot)[write.index] = static_cast<std::uint32_t>(write.block.value);
  for (const core::DevicePlan& device_plan : plan.devices) {
    DeviceHeader& device = exchange_->device(device_plan.device.value);
    for (const core::SequenceStep& sequence : device_plan.sequences) {
      SlotState& slot = slots_[sequence.table_slot];
      const std::span<const TokenId> tokens = scheduler_->Tokens(sequence.request);
      std::int32_t* history = exchange_->TokenHistory(sequence.table_slot);
      if (slot.request != sequence.request || slot.written == 0) {
        WriteSampling(scheduler_->Request(sequence.request), checkpoint_.spec.eos_ids,
                      exchange_->Sampling(sequence.table_slot));
        slot = {sequence.request, 0};
      }
      std::copy(tokens.begin() + slot.written, tokens.end(), history + slot.written);
      slot.written = static_cast<int>(tokens.size());
      PlanEntry& entry = exchange_->Plan(device_plan.device.value)[device.entry_count++];
      entry = {sequence.request.value, sequence.table_slot, sequence.start_position,
               sequence.rows,          sequence.sample,     sequence.score_prompt};
      device.row_count += sequence.rows;
    }
  }
}

bool ElasticEngine::AwaitStep(std::uint32_t step) {
  ExchangeHeader& header = exchange_->header();
  const TimeNs deadline = Now() + TimeNs{options_.step_timeout_seconds} * 1'000'000'000;
  std::vector<std::int32_t> participants = exchange_->Participants();
  const auto finished = [&] {
    return std::ranges::all_of(participants, [&](std::int32_t device) {
      return exchange_->device(device).finished_step.load(std::memory_order_acquire) == step;
    });
  };
  while (!WaitFor(
      header.finish, {0}, [&](std::uint32_t) { return finished(); },
      [&] { return death_.load() || early_task_.load() || Now() > deadline; })) {
    if (finished()) return true;
    if (early_task_.exchange(false) && !death_) {
      RunEarlyTask();
      participants = exchange_->Participants();
      continue;
    }
    // Given up: every waiter is woken until all are out of the step.
    header.abort_step.store(step, std::memory_order_seq_cst);
    if (Now() > deadline) {
      const std::scoped_lock lock(instances_mutex_);
      for (const std::int32_t device : participants) {
        if (exchange_->device(device).finished_step.load() == step) continue;
        LogWarn("device {} did not finish step {} within {} s: its worker is killed", device, step,
                options_.step_timeout_seconds);
        instances_->Kill(DeviceId(device));
      }
      death_ = true;
    }
    for (const std::int32_t device : participants) {
      exchange_->device(device).dispatched.WakeAll();
      exchange_->device(device).returned.WakeAll();
    }
    return false;
  }
  return true;
}

void ElasticEngine::ReadStep(const core::StepPlan& plan) {
  result_.step = plan.step;
  result_.sequences.clear();
  for (const core::DevicePlan& device : plan.devices) {
    const LogprobRecord* sampled = exchange_->Sampled(device.device.value);
    const LogprobRecord* scores = exchange_->PromptScores(device.device.value);
    int row = 0;
    for (std::size_t i = 0; i < device.sequences.size(); ++i) {
      const core::SequenceStep& sequence = device.sequences[i];
      core::SequenceResult one;
      one.request = sequence.request;
      if (sequence.sample) one.sampled = ReadLogprob(sampled[i]);
      if (sequence.score_prompt && scheduler_->Knows(sequence.request)) {
        const auto prompt = static_cast<int>(scheduler_->Request(sequence.request).prompt.size());
        for (int r = 0; r < sequence.rows && sequence.start_position + r + 1 < prompt; ++r)
          one.prompt_logprobs.push_back(ReadLogprob(scores[row + r]));
      }
      row += sequence.rows;
      result_.sequences.push_back(std::move(one));
    }
  }
}

void ElasticEngine::RunStep(const core::StepPlan& plan) {
  if (!CopyTails(plan)) return;
  const TimeNs begin = last_step_end_ != 0 ? last_step_end_ : Now();
  ExchangeHeader& header = exchange_->header();
  const std::uint32_t step = header.step + 1;
  WriteStep(plan, step);
  for (const DeviceId member : placement_.members()) exchange_->device(member.value).go.Set(step);
  // While the devices compute: nobody waits for what clients are told of the step before. Counted first: who
  // has been told of a token finds its step in the metrics.
  PublishStats();
  Deliver();
  const bool ended = AwaitStep(step);
  steps_ended_.store(step, std::memory_order_release);
  if (!ended) {
    scheduler_->AbandonStep();
    step_given_up_ = true;
    if (++failed_attempts_ >= options_.step_attempts)
      GiveUp({ErrorCode::kInternal,
              fmt::format("a step failed {} times; the requests in it are given up", failed_attempts_)});
    return;
  }
  failed_attempts_ = 0;
  ++steps_;
  CountStepTime();
  if (!fresh_.empty())
    for (const core::DevicePlan& device : plan.devices)
      if (fresh_.erase(device.device) > 0) Observe(core::FirstTokenEvent{device.device});
  NoteStep(plan, static_cast<double>(Now() - begin) * 1e-9);
  ReadStep(plan);
  scheduler_->Complete(result_, Now(), events_);
}

void ElasticEngine::CountStepTime() {
  TimeNs begin = std::numeric_limits<TimeNs>::max(), end = 0;
  for (const std::int32_t participant : exchange_->Participants()) {
    const DeviceHeader& device = exchange_->device(participant);
    begin = std::min(begin, device.begin_ns);
    end = std::max(end, device.end_ns);
  }
  step_ns_ += end - begin;
  if (devices_ended_ != 0) between_steps_ns_ += std::max<TimeNs>(begin - devices_ended_, 0);
  devices_ended_ = end;
}

void ElasticEngine::NoteStep(const core::StepPlan& plan, double seconds) {
  int all_rows = 0;
  for (const core::DevicePlan& device : plan.devices)
    for (const core::SequenceStep& sequence : device.sequences) all_rows += sequence.rows;
  const auto bucket = std::ranges::lower_bound(kStepRowBounds, all_rows);
  ++steps_by_rows_[static_cast<std::size_t>(bucket - kStepRowBounds.begin())];
  step_rows_ += static_cast<std::uint64_t>(all_rows);
  if (!step_observer_) return;
  const auto& moe = checkpoint_.spec.moe;
  const core::ServingShape shape{.moe_layers = moe_layers_,
                                 .experts = moe.experts,
                                 .top_k = moe.top_k,
                                 .kv_token_bytes = KvTokenBytes()};
  step_observer_(core::ShapeOf(plan, shape, static_cast<int>(placement_.members().size())), seconds);
}

void ElasticEngine::SetStepObserver(StepObserver observer) {
  (void)BetweenSteps([&]() -> Status {
    step_observer_ = std::move(observer);
    return {};
  });
}

void ElasticEngine::PublishStats() {
  const core::SchedulerStats schedule = scheduler_->Stats();
  EngineStats stats;
  stats.running = schedule.running;
  stats.waiting = schedule.waiting;
  stats.kv_blocks = schedule.blocks_total;
  stats.kv_usage = schedule.blocks_total == 0 ? 0
                                              : static_cast<double>(schedule.blocks_used) /
                                                    static_cast<double>(schedule.blocks_total);
  stats.steps = steps_;
  stats.step_ns = step_ns_;
  stats.between_steps_ns = between_steps_ns_;
  stats.steps_by_rows = steps_by_rows_;
  stats.step_rows = step_rows_;
  stats.preemptions = schedule.preemptions;
  stats.prefix_queries = schedule.prefix_queries;
  stats.prefix_hits = schedule.prefix_hits;
  stats.epoch = placement_.epoch().value;
  stats.recoveries = recoveries_;
  for (const DeviceId member : placement_.members()) {
    if (asleep_) break;
    DeviceStats device;
    device.device = member;
    device.pid = pids_[member];
    device.sequences = scheduler_->SequencesOn(member);
    device.rows = exchange_->device(member.value).expert_rows.load(std::memory_order_relaxed);
    device.experts = static_cast<std::uint64_t>(placement_.ExpertsOn(member));
    stats.devices.push_back(device);
  }
  const std::scoped_lock lock(mutex_);
  stats_ = std::move(stats);
  if (published_placement_.epoch() != placement_.epoch() || published_placement_.members().empty())
    published_placement_ = placement_;
  queued_ = static_cast<std::size_t>(schedule.waiting);
}

}  // namespace elasticmoe::runtime
