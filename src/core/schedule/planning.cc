// What runs in the next step: rows for those who run, then admission of those who wait.
#include <algorithm>

#include "core/schedule/scheduler_impl.h"

namespace elasticmoe::core {

int Scheduler::Impl::LargestPool() {
  int largest = 0;
  for (const auto& [id, device] : devices)
    if (device.config.accepts) largest = std::max(largest, PoolSize(device.config.domain));
  return largest;
}

bool Scheduler::Impl::Grow(Sequence& sequence, int tokens, StepPlan& plan) {
  const int wanted = BlocksFor(tokens);
  if (static_cast<int>(sequence.blocks.size()) >= wanted) return true;
  BlockPool& pool = Pool(sequence.domain);
  while (static_cast<int>(sequence.blocks.size()) < wanted) {
    const auto block = pool.Allocate();
    if (!block) return false;
    plan.table_writes.push_back({sequence.table_slot, static_cast<int>(sequence.blocks.size()), *block});
    sequence.blocks.push_back(*block);
  }
  return true;
}

// Preempts the last in rank of the sequence's domain, if it is behind the sequence. `next` is kept off the
// victim.
bool Scheduler::Impl::MakeRoom(const Sequence& sequence, std::map<Rank, Sequence*>::iterator& next) {
  for (auto at = running.rbegin(); at != running.rend() && at->first > sequence.rank; ++at) {
    Sequence& victim = *at->second;
    if (victim.domain != sequence.domain) continue;
    if (next != running.end() && next->second == &victim) ++next;
    if (victim.planned_rows > 0) {  // planned before it loses its blocks: its rows are taken back
      DeviceState& device = devices.at(victim.device);
      std::erase_if(device.steps,
                    [&](const SequenceStep& step) { return step.request == victim.request.id; });
      device.rows_left += victim.planned_rows;
    }
    Preempt(victim);
    return true;
  }
  return false;
}

void Scheduler::Impl::PlanRows(Sequence& sequence, int rows, TimeNs now) {
  DeviceState& device = devices.at(sequence.device);
  SequenceStep step;
  step.request = sequence.request.id;
  step.table_slot = sequence.table_slot;
  step.start_position = sequence.computed;
  step.rows = rows;
  step.sample = rows == sequence.Remaining() && sequence.request.max_tokens > 0;
  step.score_prompt = !sequence.Scored();
  device.steps.push_back(step);
  device.rows_left -= rows;
  sequence.planned_rows = rows;
  sequence.planned_sample = step.sample;
  if (sequence.queue_ns < 0) sequence.queue_ns = std::max<TimeNs>(now - sequence.added_ns, 0);
}

// In rank order; where blocks are out, those behind make room.
void Scheduler::Impl::PlanRunning(bool decode, StepPlan& plan, TimeNs now) {
  for (auto at = running.begin(); at != running.end();) {
    Sequence& sequence = *at->second;
    ++at;
    if ((sequence.Remaining() == 1) != decode) continue;
    if (BlocksFor(sequence.Length()) > PoolSize(sequence.domain)) {
      Preempt(sequence);  // it has outgrown what its domain has left: another one may hold it
      continue;
    }
    const int rows_left = devices.at(sequence.device).rows_left;
    if (rows_left <= 0) continue;
    const int wanted = std::min({sequence.Remaining(), options.max_chunk_rows, rows_left});
    int fit = 0;  // a prefill takes what fits before anybody is preempted for it
    do {
      Grow(sequence, sequence.computed + wanted, plan);
      fit = static_cast<int>(sequence.blocks.size()) * options.block_tokens - sequence.computed;
    } while (fit <= 0 && MakeRoom(sequence, at));
    if (fit > 0) PlanRows(sequence, std::min(wanted, fit), now);
  }
}

// Nobody overtakes the head of the queue.
void Scheduler::Impl::PlanWaiting(StepPlan& plan, TimeNs now) {
  if (waiting.empty()) return;
  // Blocks that admitted prompts will still take: promised, though not taken yet.
  std::map<DomainId, int> reserved;
  for (const auto& [rank, sequence] : running)
    reserved[sequence->domain] +=
        std::max(BlocksFor(sequence->Length()) - static_cast<int>(sequence->blocks.size()), 0);
  const int largest = LargestPool();
  while (!waiting.empty()) {
    Sequence& head = *waiting.begin()->second;
    if (hold_intake && head.queue_ns < 0) break;
    if (largest > 0 && BlocksFor(head.Length()) > largest) {
      TokenEvent event;
      event.request = head.request.id;
      event.error = fmt::format(
          "its {} tokens need {} KV blocks, more than all {} KV blocks of a domain; raise --kv-memory",
          head.Length(), BlocksFor(head.Length()), largest);
      Finish(head, std::move(event), FinishReason::kError, plan.failed);
      continue;
    }
    if (!Admit(head, reserved, plan)) break;
    const int rows = std::min({head.Remaining(), options.max_chunk_rows, devices.at(head.device).rows_left});
    EM_CHECK(Grow(head, head.computed + rows, plan));
    reserved[head.domain] += BlocksFor(head.Length()) - static_cast<int>(head.blocks.size());
    PlanRows(head, rows, now);
  }
}

// On the least loaded device that has room for all its tokens.
bool Scheduler::Impl::Admit(Sequence& sequence, std::map<DomainId, int>& reserved, StepPlan& plan) {
  if (free_slots.empty()) return false;
  std::vector<std::pair<double, DeviceState*>> candidates;
  for (auto& [id, device] : devices)
    if (device.config.accepts && device.rows_left > 0)
      candidates.emplace_back(device.LoadWithOneMore(), &device);
  std::stable_sort(candidates.begin(), candidates.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<DomainId> full;
  for (const auto& [load, device] : candidates) {
    if (std::find(full.begin(), full.end(), device->config.domain) != full.end()) continue;
    if (AdmitOn(*device, sequence, reserved, plan)) return true;
    full.push_back(device->config.domain);
  }
  return false;
}

bool Scheduler::Impl::AdmitOn(DeviceState& device, Sequence& sequence, std::map<DomainId, int>& reserved,
                              StepPlan& plan) {
  BlockPool& pool = Pool(device.config.domain);
  const int total = sequence.Length();
  // Room for one more token avoids a preemption at once; whoever is alone may try without.
  const int needed = BlocksFor(pool.Referenced() == 0 ? total : total + 1);
  if (needed > PoolSize(device.config.domain)) return false;
  BlockPool::Prefix prefix;
  const bool look_up = options.prefix_cache && sequence.Scored();
  if (look_up)
    prefix = pool.TakePrefix(std::span(sequence.tokens).first(total - 1));  // one row must be computed
  if (needed - static_cast<int>(prefix.blocks.size()) + reserved[device.config.domain] >
      static_cast<int>(pool.Available())) {
    for (auto block = prefix.blocks.rbegin(); block != prefix.blocks.rend(); ++block) pool.Release(*block);
    return false;
  }
  sequence.table_slot = *free_slots.begin();
  free_slots.erase(free_slots.begin());
  sequence.device = device.config.device;
  sequence.domain = device.config.domain;
  ++device.sequences;
  sequence.blocks = std::move(prefix.blocks);
  sequence.published = static_cast<int>(sequence.blocks.size());
  sequence.published_content = prefix.content;
  sequence.computed = sequence.published * options.block_tokens;
  for (std::size_t i = 0; i < sequence.blocks.size(); ++i)
    plan.table_writes.push_back({sequence.table_slot, static_cast<int>(i), sequence.blocks[i]});
  if (look_up && sequence.Generated() == 0) {
    sequence.cached_prompt_tokens = sequence.computed;
    prefix_queries += static_cast<std::uint64_t>(total);
    prefix_hits += static_cast<std::uint64_t>(sequence.computed);
  }
  sequence.running = true;
  waiting.erase(sequence.rank);
  running.emplace(sequence.rank, &sequence);
  return true;
}

StepPlan Scheduler::Plan(TimeNs now) {
  Impl& s = *impl_;
  EM_CHECK(!s.in_flight);
  StepPlan plan;
  s.SwitchMovedSequences();
  for (auto& [id, device] : s.devices) {
    device.rows_left = s.options.max_step_rows;
    device.steps.reserve(static_cast<std::size_t>(device.sequences));
  }
  for (auto& [rank, sequence] : s.running) {
    if (!sequence->rewrite_table) continue;
    for (std::size_t i = 0; i < sequence->blocks.size(); ++i)
      plan.table_writes.push_back({sequence->table_slot, static_cast<int>(i), sequence->blocks[i]});
    sequence->rewrite_table = false;
  }
  s.PlanRunning(true, plan, now);
  s.PlanRunning(false, plan, now);
  s.PlanWaiting(plan, now);

  for (auto& [id, device] : s.devices) {
    if (device.steps.empty()) continue;
    plan.devices.push_back({id, std::move(device.steps)});
    device.steps.clear();
  }
  if (plan.Empty()) {
    // What was to be written to tables goes with the next plan that runs.
    plan.table_writes.clear();
    for (auto& [rank, sequence] : s.running) sequence->rewrite_table = true;
    return plan;
  }
  for (const Impl::Tail& tail : s.tails)
    plan.copies_before.insert(plan.copies_before.end(), tail.copies.begin(), tail.copies.end());
  plan.step = StepId(s.next_step++);
  s.step_in_flight = plan.step;
  s.in_flight = true;
  return plan;
}

}  // namespace elasticmoe::core
