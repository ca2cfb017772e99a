#include "core/schedule/scheduler.h"

#include <algorithm>
#include <cmath>

#include "core/schedule/scheduler_impl.h"

namespace elasticmoe::core {

Scheduler::Scheduler(SchedulerOptions options) : impl_(std::make_unique<Impl>(std::move(options))) {}
Scheduler::~Scheduler() = default;

Sequence& Scheduler::Impl::Find(RequestId request) {
  const auto at = sequences.find(request);
  EM_CHECK(at != sequences.end(), "request={}", request);
  return at->second;
}

const Sequence& Scheduler::Impl::Find(RequestId request) const {
  return const_cast<Impl*>(this)->Find(request);
}

// ---------------------------------------------------------------- requests

Status Scheduler::Add(GenerationRequest request, TimeNs) {
  const SchedulerOptions& options = impl_->options;
  if (request.prompt.empty()) return Fail(ErrorCode::kInvalidArgument, "prompt: it is empty");
  for (const TokenId token : request.prompt)
    if (token < 0 || token >= options.vocab)
      return Fail(ErrorCode::kInvalidArgument, "prompt: token id {} is not in the vocabulary (limit={})",
                  token, options.vocab);
  const int prompt = static_cast<int>(request.prompt.size());
  if (prompt + (request.max_tokens > 0 ? 1 : 0) > options.max_model_len)
    return Fail(ErrorCode::kInvalidArgument, "prompt: {} tokens leave no room in the context (limit={})",
                prompt, options.max_model_len);
  if (request.max_tokens < 0)
    return Fail(ErrorCode::kInvalidArgument, "max_tokens: {} is negative", request.max_tokens);
  if (impl_->sequences.count(request.id) > 0)
    return Fail(ErrorCode::kAlreadyExists, "request {} is running already", request.id);
  if (static_cast<int>(impl_->waiting.size()) >= options.max_waiting)
    return Fail(ErrorCode::kResourceExhausted, "the queue is full: waiting={} (limit={})",
                impl_->waiting.size(), options.max_waiting);
  std::uint32_t largest = 0;
  for (const auto& [domain, pool] : impl_->pools) largest = std::max(largest, pool.Size());
  if (largest > 0 && impl_->BlocksFor(prompt + 1) > static_cast<int>(largest))
    return Fail(ErrorCode::kInvalidArgument,
                "prompt: {} tokens need {} KV blocks (limit={}); raise --kv-memory", prompt,
                impl_->BlocksFor(prompt + 1), largest);
  request.max_tokens = std::min(request.max_tokens, options.max_model_len - prompt);
  Sequence sequence;
  sequence.rank = {request.priority, impl_->next_arrival++};
  sequence.tokens = request.prompt;
  const RequestId id = request.id;
  sequence.request = std::move(request);
  Sequence& kept = impl_->sequences.emplace(id, std::move(sequence)).first->second;
  impl_->waiting.emplace(kept.rank, &kept);
  return {};
}

TokenEvent Scheduler::Impl::EventFor(Sequence& sequence) {
  TokenEvent event;
  event.request = sequence.request.id;
  event.cached_prompt_tokens = sequence.cached_prompt_tokens;
  if (!sequence.first_event_sent) {
    event.prompt_logprobs = std::move(sequence.prompt_scores);
    sequence.first_event_sent = true;
  }
  return event;
}

void Scheduler::Impl::Finish(Sequence& sequence, TokenEvent event, FinishReason reason,
                             std::vector<TokenEvent>& events) {
  event.finish = reason;
  events.push_back(std::move(event));
  if (sequence.running) {
    ReleaseKv(sequence);
    running.erase(sequence.rank);
  } else {
    waiting.erase(sequence.rank);
  }
  sequences.erase(sequence.request.id);
}

void Scheduler::Cancel(RequestId request, std::vector<TokenEvent>& events) {
  const auto at = impl_->sequences.find(request);
  if (at == impl_->sequences.end()) return;
  TokenEvent event;
  event.request = request;
  impl_->Finish(at->second, std::move(event), FinishReason::kAbort, events);
}

void Scheduler::FailAll(const std::string& error, std::vector<TokenEvent>& events) {
  impl_->in_flight = false;
  impl_->planned.clear();
  while (!impl_->sequences.empty()) {
    Sequence& sequence = impl_->sequences.begin()->second;
    TokenEvent event;
    event.request = sequence.request.id;
    event.error = error;
    impl_->Finish(sequence, std::move(event), FinishReason::kError, events);
  }
}

// ---------------------------------------------------------------- KV of a sequence

bool Scheduler::Impl::Grow(Sequence& sequence, int tokens, StepPlan& plan) {
  BlockPool& pool = Pool(sequence.domain);
  while (static_cast<int>(sequence.blocks.size()) < BlocksFor(tokens)) {
    const auto block = pool.Allocate();
    if (!block) return false;
    plan.table_writes.push_back({sequence.table_slot, static_cast<int>(sequence.blocks.size()), *block});
    sequence.blocks.push_back(*block);
  }
  return true;
}

void Scheduler::Impl::ReleaseKv(Sequence& sequence) {
  CancelMove(sequence);
  BlockPool& pool = Pool(sequence.domain);
  for (Tail& tail : tails)  // nobody may write into its blocks any more
    std::erase_if(tail.copies, [&](const KvCopy& copy) {
      return copy.to_domain == sequence.domain &&
             std::find(sequence.blocks.begin(), sequence.blocks.end(), copy.to) != sequence.blocks.end();
    });
  // The end of the sequence first: the start of a prompt is what others may share.
  for (auto block = sequence.blocks.rbegin(); block != sequence.blocks.rend(); ++block) pool.Release(*block);
  sequence.blocks.clear();
  sequence.published = 0;
  sequence.computed = 0;
  sequence.planned_rows = 0;
  free_slots.insert(sequence.table_slot);
  sequence.table_slot = -1;
  --devices.at(sequence.device).sequences;
}

void Scheduler::Impl::Preempt(Sequence& sequence) {
  ReleaseKv(sequence);
  if (!sequence.Scored()) sequence.prompt_scores.clear();
  sequence.running = false;
  running.erase(sequence.rank);
  waiting.emplace(sequence.rank, &sequence);
  ++preemptions;
}

// The last in rank of the sequence's domain, if it is behind the sequence.
Sequence* Scheduler::Impl::VictimFor(const Sequence& sequence) {
  for (auto at = running.rbegin(); at != running.rend() && at->first > sequence.rank; ++at)
    if (at->second->domain == sequence.domain) return at->second;
  return nullptr;
}

void Scheduler::Impl::PublishBlocks(Sequence& sequence) {
  if (!options.prefix_cache) return;
  BlockPool& pool = Pool(sequence.domain);
  const int full = sequence.computed / options.block_tokens;
  for (; sequence.published < full; ++sequence.published) {
    const int index = sequence.published;
    const std::optional<BlockId> previous =
        index == 0 ? std::nullopt : std::optional(sequence.blocks[index - 1]);
    pool.Publish(
        sequence.blocks[index], previous,
        std::span(sequence.tokens).subspan(std::size_t(index) * options.block_tokens, options.block_tokens));
  }
}

// ---------------------------------------------------------------- planning

Scheduler::Impl::DeviceState* Scheduler::Impl::LeastLoaded(const std::map<DeviceId, int>& budget,
                                                           int blocks) {
  DeviceState* best = nullptr;
  for (auto& [id, device] : devices) {
    if (!device.config.accepts || budget.at(id) <= 0 ||
        static_cast<int>(Pool(device.config.domain).Size()) < blocks)
      continue;
    if (best == nullptr ||
        (device.sequences + 1) / device.config.weight < (best->sequences + 1) / best->config.weight)
      best = &device;
  }
  return best;
}

bool Scheduler::Impl::Admit(Sequence& sequence, std::map<DeviceId, int>& budget, StepPlan& plan) {
  if (free_slots.empty()) return false;
  DeviceState* device = LeastLoaded(budget, BlocksFor(static_cast<int>(sequence.tokens.size())));
  if (device == nullptr) return false;
  BlockPool& pool = Pool(device->config.domain);
  std::vector<BlockId> prefix;
  const int total = static_cast<int>(sequence.tokens.size());
  const bool look_up = options.prefix_cache && sequence.Scored();
  if (look_up)
    prefix = pool.TakePrefix(std::span(sequence.tokens).first(total - 1));  // one row must be computed
  // Room for one more token avoids a preemption at once; whoever is alone may try without.
  const int needed = BlocksFor(running.empty() ? total : total + 1) - static_cast<int>(prefix.size());
  if (needed > static_cast<int>(pool.Available())) {
    for (auto block = prefix.rbegin(); block != prefix.rend(); ++block) pool.Release(*block);
    return false;
  }
  sequence.table_slot = *free_slots.begin();
  free_slots.erase(free_slots.begin());
  sequence.device = device->config.device;
  sequence.domain = device->config.domain;
  ++device->sequences;
  sequence.blocks = std::move(prefix);
  sequence.published = static_cast<int>(sequence.blocks.size());
  sequence.computed = sequence.published * options.block_tokens;
  for (std::size_t i = 0; i < sequence.blocks.size(); ++i)
    plan.table_writes.push_back({sequence.table_slot, static_cast<int>(i), sequence.blocks[i]});
  if (look_up && sequence.Generated() == 0) {
    sequence.cached_prompt_tokens = sequence.computed;
    prefix_queries += static_cast<std::uint64_t>(total);
    prefix_hits += static_cast<std::uint64_t>(sequence.computed);
  }
  sequence.running = true;
  running.emplace(sequence.rank, &sequence);
  return true;
}

void Scheduler::Impl::PlanRows(Sequence& sequence, int rows, std::map<DeviceId, DevicePlan>& plans,
                               std::map<DeviceId, int>& budget) {
  DevicePlan& plan = plans[sequence.device];
  plan.device = sequence.device;
  SequenceStep step;
  step.request = sequence.request.id;
  step.table_slot = sequence.table_slot;
  step.start_position = sequence.computed;
  step.rows = rows;
  step.sample = rows == sequence.Remaining() && sequence.request.max_tokens > 0;
  step.score_prompt = !sequence.Scored();
  plan.sequences.push_back(step);
  sequence.planned_rows = rows;
  sequence.planned_sample = step.sample;
  planned.push_back(sequence.request.id);
  budget[sequence.device] -= rows;
}

StepPlan Scheduler::Plan(TimeNs) {
  Impl& s = *impl_;
  EM_CHECK(!s.in_flight);
  StepPlan plan;
  s.planned.clear();
  s.SwitchMovedSequences(plan);
  for (const Impl::Tail& tail : s.tails)
    plan.copies_before.insert(plan.copies_before.end(), tail.copies.begin(), tail.copies.end());
  for (auto& [rank, sequence] : s.running) {
    if (!sequence->rewrite_table) continue;
    for (std::size_t i = 0; i < sequence->blocks.size(); ++i)
      plan.table_writes.push_back({sequence->table_slot, static_cast<int>(i), sequence->blocks[i]});
    sequence->rewrite_table = false;
  }

  std::map<DeviceId, int> budget;
  for (const auto& [id, device] : s.devices) budget[id] = s.options.max_step_rows;
  std::map<DeviceId, DevicePlan> plans;

  // Decode rows, then prefill rows, of running sequences in rank order. Where blocks are out, those behind
  // make room.
  for (const bool decode : {true, false}) {
    for (auto at = s.running.begin(); at != s.running.end();) {
      Sequence& sequence = *at->second;
      ++at;
      if ((sequence.Remaining() == 1) != decode || budget[sequence.device] <= 0) continue;
      int rows = std::min({sequence.Remaining(), s.options.max_chunk_rows, budget[sequence.device]});
      bool room = s.Grow(sequence, sequence.computed + rows, plan);
      while (!room) {
        const int fit = static_cast<int>(sequence.blocks.size()) * s.options.block_tokens - sequence.computed;
        if (!decode && fit > 0) {
          rows = fit;
          break;
        }
        Sequence* victim = s.VictimFor(sequence);
        if (victim == nullptr) break;
        if (at != s.running.end() && at->second == victim) ++at;
        if (victim->planned_rows > 0) {  // planned before it lost its blocks: its rows are taken back
          auto& steps = plans[victim->device].sequences;
          std::erase_if(steps, [&](const SequenceStep& step) { return step.request == victim->request.id; });
          budget[victim->device] += victim->planned_rows;
          std::erase(s.planned, victim->request.id);
        }
        s.Preempt(*victim);
        room = s.Grow(sequence, sequence.computed + rows, plan);
      }
      const int fit = static_cast<int>(sequence.blocks.size()) * s.options.block_tokens - sequence.computed;
      rows = std::min(rows, fit);
      if (rows > 0) {
        s.PlanRows(sequence, rows, plans, budget);
      } else if (s.BlocksFor(sequence.computed + 1) > static_cast<int>(s.Pool(sequence.domain).Size())) {
        s.Preempt(sequence);  // it has outgrown what its domain has left: another one may hold it
      }
    }
  }

  // Admission: nobody overtakes the head of the queue.
  while (!s.waiting.empty()) {
    Sequence& head = *s.waiting.begin()->second;
    std::uint32_t largest = 0;
    for (const auto& [id, device] : s.devices)
      if (device.config.accepts) largest = std::max(largest, s.Pool(device.config.domain).Size());
    if (s.BlocksFor(static_cast<int>(head.tokens.size())) > static_cast<int>(largest) && largest > 0) {
      TokenEvent event;
      event.request = head.request.id;
      event.error = fmt::format("its {} tokens need more than all {} KV blocks; raise --kv-memory",
                                head.tokens.size(), largest);
      s.Finish(head, std::move(event), FinishReason::kError, plan.failed);
      continue;
    }
    if (!s.Admit(head, budget, plan)) break;
    s.waiting.erase(s.waiting.begin());
    const int rows = std::min({head.Remaining(), s.options.max_chunk_rows, budget[head.device]});
    EM_CHECK(s.Grow(head, head.computed + rows, plan));
    s.PlanRows(head, rows, plans, budget);
  }

  for (auto& [id, device_plan] : plans)
    if (!device_plan.sequences.empty()) plan.devices.push_back(std::move(device_plan));
  if (plan.Empty()) {
    // What was written to tables or is to be copied goes with the next plan that runs.
    for (auto& [rank, sequence] : s.running) sequence->rewrite_table = true;
    return plan;
  }
  plan.step = StepId(s.next_step++);
  s.step_in_flight = plan.step;
  s.in_flight = true;
  return plan;
}

void Scheduler::Complete(const StepResult& result, TimeNs, std::vector<TokenEvent>& events) {
  Impl& s = *impl_;
  EM_CHECK(s.in_flight && result.step == s.step_in_flight, "step={} in flight={}", result.step,
           s.step_in_flight);
  s.in_flight = false;
  s.planned.clear();
  for (const Impl::Tail& tail : s.tails)
    for (const BlockId block : tail.release) s.Pool(tail.from_domain).Release(block);
  s.tails.clear();
  for (const SequenceResult& one : result.sequences) {
    const auto at = s.sequences.find(one.request);
    if (at == s.sequences.end() || at->second.planned_rows == 0) continue;  // cancelled meanwhile
    Sequence& sequence = at->second;
    sequence.computed += sequence.planned_rows;
    sequence.planned_rows = 0;
    s.PublishBlocks(sequence);
    if (!sequence.Scored())
      sequence.prompt_scores.insert(sequence.prompt_scores.end(), one.prompt_logprobs.begin(),
                                    one.prompt_logprobs.end());
    if (sequence.request.max_tokens == 0 && sequence.Remaining() == 0) {
      s.Finish(sequence, s.EventFor(sequence), FinishReason::kLength, events);
      continue;
    }
    if (!sequence.planned_sample) continue;

    TokenEvent event = s.EventFor(sequence);
    const TokenId token = one.sampled.token;
    if (std::isnan(one.sampled.logprob)) {
      event.error = "the model gave no number for any token (NaN logits); the checkpoint may be damaged";
      s.Finish(sequence, std::move(event), FinishReason::kError, events);
      continue;
    }
    sequence.tokens.push_back(token);
    event.tokens.push_back(token);
    if (sequence.request.sampling.logprobs >= 0) event.logprobs.push_back(one.sampled);
    const GenerationRequest& request = sequence.request;
    const bool may_stop = sequence.Generated() >= request.min_tokens;
    const auto contains = [&](const std::vector<TokenId>& ids) {
      return std::find(ids.begin(), ids.end(), token) != ids.end();
    };
    if (may_stop &&
        (contains(request.stop_token_ids) || (!request.ignore_eos && contains(s.options.eos_ids)))) {
      event.stop_token = token;
      s.Finish(sequence, std::move(event), FinishReason::kStop, events);
    } else if (sequence.Generated() >= request.max_tokens) {
      s.Finish(sequence, std::move(event), FinishReason::kLength, events);
    } else if (s.running.size() == 1 && s.BlocksFor(static_cast<int>(sequence.tokens.size())) >
                                            static_cast<int>(s.Pool(sequence.domain).Size())) {
      event.error = fmt::format("its {} tokens fill all {} KV blocks; raise --kv-memory",
                                sequence.tokens.size(), s.Pool(sequence.domain).Size());
      s.Finish(sequence, std::move(event), FinishReason::kError, events);
    } else {
      events.push_back(std::move(event));
    }
  }
}

void Scheduler::AbandonStep() {
  if (!impl_->in_flight) return;
  impl_->in_flight = false;
  impl_->planned.clear();
  for (auto& [rank, sequence] : impl_->running) {
    sequence->planned_rows = 0;
    sequence->rewrite_table = true;
  }
}

// ---------------------------------------------------------------- views

std::span<const TokenId> Scheduler::Tokens(RequestId request) const {
  return impl_->Find(request).tokens;
}
const GenerationRequest& Scheduler::Request(RequestId request) const {
  return impl_->Find(request).request;
}
int Scheduler::GeneratedCount(RequestId request) const {
  return impl_->Find(request).Generated();
}
std::span<const BlockId> Scheduler::BlockTable(RequestId request) const {
  return impl_->Find(request).blocks;
}
bool Scheduler::Knows(RequestId request) const {
  return impl_->sequences.count(request) > 0;
}
bool Scheduler::Idle() const {
  return impl_->sequences.empty();
}

SchedulerStats Scheduler::Stats() const {
  SchedulerStats stats;
  stats.running = static_cast<int>(impl_->running.size());
  stats.waiting = static_cast<int>(impl_->waiting.size());
  stats.preemptions = impl_->preemptions;
  stats.prefix_queries = impl_->prefix_queries;
  stats.prefix_hits = impl_->prefix_hits;
  for (const auto& [domain, pool] : impl_->pools) {
    stats.blocks_total += pool.Size();
    stats.blocks_used += pool.Referenced();
  }
  return stats;
}

void Scheduler::CheckIntegrity() const {
  const Impl& s = *impl_;
  std::map<std::pair<DomainId, BlockId>, int> held;
  std::map<DeviceId, int> on_device;
  std::set<int> slots;
  for (const auto& [id, sequence] : s.sequences) {
    EM_CHECK(sequence.running == (s.running.count(sequence.rank) > 0) &&
             sequence.running != (s.waiting.count(sequence.rank) > 0));
    EM_CHECK(sequence.Remaining() >= (sequence.request.max_tokens > 0 ? 1 : 0));
    if (!sequence.running) {
      EM_CHECK(sequence.blocks.empty() && sequence.table_slot < 0 && sequence.computed == 0 &&
               !sequence.move);
      continue;
    }
    EM_CHECK(static_cast<int>(sequence.blocks.size()) >= s.BlocksFor(sequence.computed));
    EM_CHECK(slots.insert(sequence.table_slot).second && s.free_slots.count(sequence.table_slot) == 0);
    EM_CHECK(s.devices.at(sequence.device).config.domain == sequence.domain);
    ++on_device[sequence.device];
    for (const BlockId block : sequence.blocks) ++held[{sequence.domain, block}];
    if (sequence.move) {
      ++on_device[sequence.move->to];
      for (const BlockId block : sequence.move->blocks) ++held[{sequence.move->to_domain, block}];
    }
  }
  for (const Impl::Tail& tail : s.tails)
    for (const BlockId block : tail.release) ++held[{tail.from_domain, block}];
  for (const auto& [request, orphan] : s.orphans)
    for (const BlockId block : orphan.blocks) ++held[{orphan.domain, block}];
  EM_CHECK(slots.size() + s.free_slots.size() == static_cast<std::size_t>(s.options.max_running));
  for (const auto& [id, device] : s.devices) EM_CHECK(device.sequences == on_device[id], "device={}", id);
  for (const auto& [domain, pool] : s.pools) {
    pool.CheckIntegrity();
    std::uint32_t referenced = 0;
    for (const auto& [key, count] : held) referenced += key.first == domain;
    EM_CHECK(pool.Referenced() == referenced, "domain={} referenced={} held={}", domain, pool.Referenced(),
             referenced);
  }
}

}  // namespace elasticmoe::core
