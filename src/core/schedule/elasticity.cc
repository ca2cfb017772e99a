// The scheduler's side of a resize: devices come and go, sequences are handed over.
#include <algorithm>

#include "core/schedule/scheduler_impl.h"

namespace elasticmoe::core {

void Scheduler::SetDevices(std::span<const SchedulerDevice> devices) {
  std::map<DeviceId, Impl::DeviceState> next;
  for (const SchedulerDevice& device : devices) {
    impl_->pools.try_emplace(device.domain, impl_->options.block_tokens);
    const auto before = impl_->devices.find(device.device);
    next[device.device] = {device, before == impl_->devices.end() ? 0 : before->second.sequences};
  }
  for (const auto& [id, device] : impl_->devices)
    EM_CHECK(next.count(id) > 0 || device.sequences == 0, "device={} leaves with {} sequences", id,
             device.sequences);
  impl_->devices = std::move(next);
}

void Scheduler::SetBlocks(DomainId domain, std::uint32_t blocks) {
  EM_CHECK(!impl_->in_flight);
  BlockPool& pool = impl_->pools.try_emplace(domain, impl_->options.block_tokens).first->second;
  while (pool.ReferencedAtOrAbove(blocks)) {
    const auto above = [&](const std::vector<BlockId>& ids) {
      return std::any_of(ids.begin(), ids.end(),
                         [&](BlockId id) { return static_cast<std::uint32_t>(id.value) >= blocks; });
    };
    Sequence* holder = nullptr;
    for (auto& [rank, sequence] : impl_->running) {
      if (sequence->move && sequence->move->to_domain == domain && above(sequence->move->blocks))
        impl_->CancelMove(*sequence);
      if (sequence->domain == domain && above(sequence->blocks)) holder = sequence;
    }
    if (holder != nullptr) {
      impl_->Preempt(*holder);
      continue;
    }
    // Targets of cancelled moves: ids that end cannot be given to others.
    for (auto& [request, orphan] : impl_->orphans)
      if (orphan.domain == domain)
        std::erase_if(orphan.blocks, [&](BlockId block) {
          if (static_cast<std::uint32_t>(block.value) < blocks) return false;
          pool.Release(block);
          return true;
        });
    // Sources of tails that have not run yet: their sequences lose what was to come.
    if (pool.ReferencedAtOrAbove(blocks)) impl_->DropTails(domain, false);
  }
  pool.Resize(blocks);
}

void Scheduler::ForgetKv(DomainId domain) {
  EM_CHECK(!impl_->in_flight);
  std::vector<Sequence*> lost;
  for (auto& [rank, sequence] : impl_->running) {
    if (sequence->domain == domain)
      lost.push_back(sequence);
    else if (sequence->move && sequence->move->to_domain == domain)
      impl_->CancelMove(*sequence);
  }
  for (Sequence* sequence : lost) impl_->Preempt(*sequence);
  impl_->DropTails(domain, true);
  if (const auto pool = impl_->pools.find(domain); pool != impl_->pools.end()) pool->second.ForgetCache();
}

// Tails out of a domain (and into it) do not run any more: sequences that waited for one are preempted.
void Scheduler::Impl::DropTails(DomainId domain, bool into) {
  std::vector<Sequence*> lost;
  std::vector<Tail> kept, dropped;
  for (Tail& tail : tails) {
    const bool from = tail.from_domain == domain;
    const bool to = into && !tail.copies.empty() && tail.copies.front().to_domain == domain;
    if (!from && !to) {
      kept.push_back(std::move(tail));
      continue;
    }
    for (auto& [rank, sequence] : running)
      for (const KvCopy& copy : tail.copies)
        if (sequence->domain == copy.to_domain &&
            std::find(sequence->blocks.begin(), sequence->blocks.end(), copy.to) != sequence->blocks.end() &&
            std::find(lost.begin(), lost.end(), sequence) == lost.end())
          lost.push_back(sequence);
    dropped.push_back(std::move(tail));
  }
  tails = std::move(kept);
  for (const Tail& tail : dropped)
    for (const BlockId block : tail.release) Pool(tail.from_domain).Release(block);
  for (Sequence* sequence : lost) Preempt(*sequence);
}

int Scheduler::SequencesOn(DeviceId device) const {
  const auto at = impl_->devices.find(device);
  return at == impl_->devices.end() ? 0 : at->second.sequences;
}

void Scheduler::Impl::CancelMove(Sequence& sequence) {
  if (!sequence.move) return;
  // A copy that runs writes to its target blocks whatever becomes of the sequence: nobody else may have them
  // before it ends.
  if (!sequence.move->copied)
    orphans[sequence.request.id] = {sequence.move->to_domain, std::move(sequence.move->blocks)};
  else
    for (const BlockId block : sequence.move->blocks) Pool(sequence.move->to_domain).Release(block);
  --devices.at(sequence.move->to).sequences;
  sequence.move.reset();
}

// The copies of a move have ended, well or not. True if the move had been cancelled before.
bool Scheduler::Impl::EndOrphan(RequestId request) {
  const auto at = orphans.find(request);
  if (at == orphans.end()) return false;
  for (const BlockId block : at->second.blocks) Pool(at->second.domain).Release(block);
  orphans.erase(at);
  return true;
}

void Scheduler::Impl::PlaceOn(Sequence& sequence, DeviceId device) {
  --devices.at(sequence.device).sequences;
  ++devices.at(device).sequences;
  sequence.device = device;
}

std::vector<Scheduler::Move> Scheduler::Rebalance() {
  Impl& s = *impl_;
  EM_CHECK(!s.in_flight);
  double weights = 0;
  for (const auto& [id, device] : s.devices)
    if (device.config.accepts) weights += device.config.weight;
  std::vector<Move> moves;
  if (weights <= 0) return moves;

  // Target counts: the weights' shares rounded down, the rest to those who have most above (they then move
  // fewest).
  const auto total = static_cast<int>(s.running.size());
  std::map<DeviceId, int> target;
  int given = 0;
  std::vector<std::pair<double, DeviceId>> rest;
  for (const auto& [id, device] : s.devices) {
    if (!device.config.accepts) continue;
    const double share = total * device.config.weight / weights;
    target[id] = static_cast<int>(share);
    given += target[id];
    rest.emplace_back(-(device.sequences > target[id] ? 1.0 + share - target[id] : share - target[id]), id);
  }
  std::sort(rest.begin(), rest.end());
  for (std::size_t i = 0; given < total; i = (i + 1) % rest.size(), ++given) ++target[rest[i].second];

  // Youngest first: they have least KV.
  for (auto at = s.running.rbegin(); at != s.running.rend(); ++at) {
    Sequence& sequence = *at->second;
    const Impl::DeviceState& from = s.devices.at(sequence.device);
    const bool must = !from.config.accepts;
    if (sequence.move || s.orphans.count(sequence.request.id) > 0 ||
        (!must && from.sequences <= target[sequence.device]))
      continue;
    Impl::DeviceState* to = nullptr;
    for (auto& [id, device] : s.devices) {
      if (!device.config.accepts || id == sequence.device || device.sequences >= target[id]) continue;
      // The same domain first: it costs nothing.
      if (to == nullptr || (device.config.domain == sequence.domain && to->config.domain != sequence.domain))
        to = &device;
    }
    if (to == nullptr && must)  // all are full by count: the least loaded takes it
      for (auto& [id, device] : s.devices)
        if (device.config.accepts && (to == nullptr || device.sequences < to->sequences)) to = &device;
    if (to == nullptr) continue;
    Move move{sequence.request.id, sequence.device, to->config.device, {}};
    if (to->config.domain == sequence.domain) {
      s.PlaceOn(sequence, to->config.device);
      moves.push_back(std::move(move));
      continue;
    }
    BlockPool& pool = s.Pool(to->config.domain);
    const int full = sequence.computed / s.options.block_tokens;
    // Room for the tail and some growth, so that the switch does not fail at once.
    if (static_cast<int>(pool.Available()) < static_cast<int>(sequence.blocks.size()) + 1) continue;
    MoveState state{to->config.device, to->config.domain, {}, full == 0};
    for (int i = 0; i < full; ++i) {
      state.blocks.push_back(*pool.Allocate());
      move.copies.push_back({sequence.domain, sequence.blocks[i], to->config.domain, state.blocks.back()});
    }
    ++to->sequences;
    sequence.move = std::move(state);
    moves.push_back(std::move(move));
  }
  return moves;
}

void Scheduler::MoveCopied(RequestId request) {
  if (impl_->EndOrphan(request)) return;
  const auto at = impl_->sequences.find(request);
  if (at != impl_->sequences.end() && at->second.move) at->second.move->copied = true;
}

void Scheduler::MoveFailed(RequestId request) {
  if (impl_->EndOrphan(request)) return;
  const auto at = impl_->sequences.find(request);
  if (at == impl_->sequences.end() || !at->second.move) return;
  at->second.move->copied = true;  // nothing writes to its blocks any more
  impl_->CancelMove(at->second);
}

// Sequences whose copies are done change domain at this boundary; what was written since goes along as their
// tail.
void Scheduler::Impl::SwitchMovedSequences(StepPlan&) {
  for (auto& [rank, sequence] : running) {
    if (!sequence->move || !sequence->move->copied) continue;
    BlockPool& pool = Pool(sequence->move->to_domain);
    std::vector<BlockId>& blocks = sequence->move->blocks;
    const std::size_t copied = blocks.size();
    bool room = true;
    while (blocks.size() < sequence->blocks.size() && room) {
      if (const auto block = pool.Allocate())
        blocks.push_back(*block);
      else
        room = false;
    }
    if (!room) {  // the target filled up meanwhile: the sequence stays, Rebalance may try again
      CancelMove(*sequence);
      continue;
    }
    Tail tail;
    tail.from_domain = sequence->domain;
    for (std::size_t i = copied; i < blocks.size(); ++i)
      tail.copies.push_back({sequence->domain, sequence->blocks[i], sequence->move->to_domain, blocks[i]});
    tail.release = std::move(sequence->blocks);
    tails.push_back(std::move(tail));
    --devices.at(sequence->device).sequences;  // the target has counted it since the move began
    sequence->device = sequence->move->to;
    sequence->domain = sequence->move->to_domain;
    sequence->blocks = std::move(blocks);
    sequence->move.reset();
    sequence->published = 0;  // findable again once a step has completed with the tail in place
    sequence->rewrite_table = true;
  }
}

}  // namespace elasticmoe::core
