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

Status Scheduler::Add(GenerationRequest request, TimeNs now) {
  const SchedulerOptions& options = impl_->options;
  EM_RETURN_IF_ERROR(CheckRequest(request, {.vocab = options.vocab, .max_model_len = options.max_model_len}));
  const int prompt = static_cast<int>(request.prompt.size());
  if (impl_->sequences.count(request.id) > 0)
    return Fail(ErrorCode::kAlreadyExists, "request {} is running already", request.id);
  if (static_cast<int>(impl_->waiting.size()) >= options.max_waiting)
    return Fail(ErrorCode::kResourceExhausted, "the queue is full: waiting={} (limit={})",
                impl_->waiting.size(), options.max_waiting);
  // The last token of an answer is never computed on.
  const int blocks = impl_->BlocksFor(prompt + (request.max_tokens > 1 ? 1 : 0));
  if (const int largest = impl_->LargestPool(); largest > 0 && blocks > largest)
    return Fail(ErrorCode::kInvalidArgument,
                "prompt: {} tokens need {} KV blocks (limit={}); raise --kv-memory", prompt, blocks, largest);
  request.max_tokens = std::min(request.max_tokens, options.max_model_len - prompt);
  Sequence sequence;
  sequence.rank = {request.priority, impl_->next_arrival++};
  sequence.tokens = request.prompt;
  sequence.added_ns = now;
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
    event.queue_ns = sequence.queue_ns;
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
  while (!impl_->sequences.empty()) {
    Sequence& sequence = impl_->sequences.begin()->second;
    TokenEvent event;
    event.request = sequence.request.id;
    event.error = error;
    impl_->Finish(sequence, std::move(event), FinishReason::kError, events);
  }
}

// ---------------------------------------------------------------- KV of a sequence

void Scheduler::Impl::ReleaseKv(Sequence& sequence) {
  CancelMove(sequence);
  BlockPool& pool = Pool(sequence.domain);
  std::erase_if(tails, [&](const Tail& tail) {  // nobody may write into its blocks any more
    if (tail.request != sequence.request.id) return false;
    for (const BlockId block : tail.release) Pool(tail.from_domain).Release(block);
    return true;
  });
  // The end of the sequence first: the start of a prompt is what others may share.
  for (auto block = sequence.blocks.rbegin(); block != sequence.blocks.rend(); ++block) pool.Release(*block);
  sequence.blocks.clear();
  sequence.published = 0;
  sequence.published_content = 0;
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

void Scheduler::Impl::PublishBlocks(Sequence& sequence) {
  if (!options.prefix_cache) return;
  BlockPool& pool = Pool(sequence.domain);
  const int full = sequence.computed / options.block_tokens;
  for (; sequence.published < full; ++sequence.published) {
    const auto begin = static_cast<std::size_t>(sequence.published * options.block_tokens);
    sequence.published_content =
        pool.Publish(sequence.blocks[sequence.published], sequence.published_content,
                     std::span(sequence.tokens).subspan(begin, options.block_tokens));
  }
}

// ---------------------------------------------------------------- results

void Scheduler::Complete(const StepResult& result, TimeNs, std::vector<TokenEvent>& events) {
  Impl& s = *impl_;
  EM_CHECK(s.in_flight && result.step == s.step_in_flight, "step={} in flight={}", result.step,
           s.step_in_flight);
  s.in_flight = false;
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
    if (sequence.planned_sample)
      s.AddSampled(sequence, one.sampled, events);
    else if (sequence.request.max_tokens == 0 && sequence.Remaining() == 0)
      s.Finish(sequence, s.EventFor(sequence), FinishReason::kLength, events);
  }
}

void Scheduler::Impl::AddSampled(Sequence& sequence, const TokenLogprob& sampled,
                                 std::vector<TokenEvent>& events) {
  TokenEvent event = EventFor(sequence);
  if (std::isnan(sampled.logprob)) {
    event.error = "the model gave no number for any token (NaN logits); the checkpoint may be damaged";
    return Finish(sequence, std::move(event), FinishReason::kError, events);
  }
  const TokenId token = sampled.token;
  const GenerationRequest& request = sequence.request;
  sequence.tokens.push_back(token);
  event.tokens.push_back(token);
  if (request.sampling.logprobs >= 0) event.logprobs.push_back(sampled);
  const auto contains = [&](const std::vector<TokenId>& ids) {
    return std::find(ids.begin(), ids.end(), token) != ids.end();
  };
  const bool stop = contains(request.stop_token_ids) || (!request.ignore_eos && contains(options.eos_ids));
  if (stop && sequence.Generated() > request.min_tokens) {  // before that it was banned
    event.stop_token = token;
    Finish(sequence, std::move(event), FinishReason::kStop, events);
  } else if (sequence.Generated() >= request.max_tokens) {
    Finish(sequence, std::move(event), FinishReason::kLength, events);
  } else {
    events.push_back(std::move(event));
  }
}

void Scheduler::AbandonStep() {
  if (!impl_->in_flight) return;
  impl_->in_flight = false;
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
    const auto blocks = static_cast<int>(sequence.blocks.size());
    EM_CHECK(blocks >= s.BlocksFor(sequence.computed) && blocks <= s.BlocksFor(sequence.Length()),
             "request={} blocks={} computed={} of {}", id, blocks, sequence.computed, sequence.Length());
    EM_CHECK(sequence.published <= blocks && s.in_flight >= (sequence.planned_rows > 0));
    EM_CHECK(slots.insert(sequence.table_slot).second && s.free_slots.count(sequence.table_slot) == 0);
    EM_CHECK(s.devices.at(sequence.device).config.domain == sequence.domain);
    ++on_device[sequence.device];
    for (const BlockId block : sequence.blocks) ++held[{sequence.domain, block}];
    if (sequence.move) {
      ++on_device[sequence.move->to];
      for (const BlockId block : sequence.move->blocks) ++held[{sequence.move->to_domain, block}];
    }
  }
  for (const Impl::Tail& tail : s.tails) {
    EM_CHECK(s.Find(tail.request).running && !tail.copies.empty());
    for (const BlockId block : tail.release) ++held[{tail.from_domain, block}];
  }
  for (const auto& [request, orphan] : s.orphans)
    for (const BlockId block : orphan.blocks) ++held[{orphan.domain, block}];
  EM_CHECK(slots.size() + s.free_slots.size() == static_cast<std::size_t>(s.options.max_running));
  for (const auto& [id, device] : s.devices) EM_CHECK(device.sequences == on_device[id], "device={}", id);
  for (const auto& [domain, pool] : s.pools) {
    pool.CheckIntegrity();
    std::uint32_t referenced = 0;
    for (const auto& [key, count] : held) {
      if (key.first != domain) continue;
      ++referenced;
      EM_CHECK(pool.References(key.second) == count, "domain={} block={} references={} held={}", domain,
               key.second, pool.References(key.second), count);
    }
    EM_CHECK(pool.Referenced() == referenced, "domain={} referenced={} held={}", domain, pool.Referenced(),
             referenced);
  }
}

}  // namespace elasticmoe::core
