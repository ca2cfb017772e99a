// The scheduler's side of a resize: devices come and go, sequences are handed over.
#include <algorithm>

#include "core/schedule/scheduler_impl.h"

namespace elasticmoe::core {

void Scheduler::SetDevices(std::span<const SchedulerDevice> devices) {
  std::map<DeviceId, Impl::DeviceState> next;
  for (const SchedulerDevice& device : devices) {
    impl_->pools.try_emplace(device.domain, impl_->options.block_tokens);
    const auto before = impl_->devices.find(device.device);
    next[device.device].config = device;
    if (before != impl_->devices.end()) next[device.device].sequences = before->second.sequences;
  }
  for (const auto& [id, device] : impl_->devices)
    EM_CHECK(next.count(id) > 0 || device.sequences == 0, "device={} leaves with {} sequences", id,
             device.sequences);
  impl_->devices = std::move(next);
}

void Scheduler::HoldIntake(bool hold) {
  impl_->hold_intake = hold;
}

bool Scheduler::Started() const {
  return !impl_->running.empty() ||
         std::any_of(impl_->waiting.begin(), impl_->waiting.end(),
                     [](const auto& entry) { return entry.second->queue_ns >= 0; });
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
    if (pool.ReferencedAtOrAbove(blocks)) impl_->DropTailsFrom(domain);
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
  impl_->DropTailsFrom(domain);
  if (const auto pool = impl_->pools.find(domain); pool != impl_->pools.end()) pool->second.ForgetCache();
}

// Tails that have not run yet lose their source: their sequences run again from their tokens.
void Scheduler::Impl::DropTailsFrom(DomainId domain) {
  std::vector<RequestId> lost;
  for (const Tail& tail : tails)
    if (tail.from_domain == domain) lost.push_back(tail.request);
  for (const RequestId request : lost) Preempt(Find(request));
}

bool Scheduler::Impl::HasTail(RequestId request) const {
  return std::any_of(tails.begin(), tails.end(), [&](const Tail& tail) { return tail.request == request; });
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

// Each accepting device's share by weight, rounded down; the rest goes to those who have most above theirs
// (they then give away least). `counts` are the present ones.
std::map<DeviceId, int> Scheduler::Impl::TargetCounts(const std::map<DeviceId, int>& counts) const {
  double weights = 0;
  for (const auto& [id, device] : devices)
    if (device.config.accepts) weights += device.config.weight;
  std::map<DeviceId, int> target;
  if (weights <= 0) return target;
  const auto total = static_cast<int>(running.size());
  int given = 0;
  std::vector<std::pair<double, DeviceId>> rest;
  for (const auto& [id, device] : devices) {
    if (!device.config.accepts) continue;
    const double share = total * device.config.weight / weights;
    const int whole = static_cast<int>(share);
    target[id] = whole;
    given += whole;
    rest.emplace_back(-(share - whole) - (counts.at(id) > whole ? 1.0 : 0.0), id);
  }
  std::sort(rest.begin(), rest.end());
  for (std::size_t i = 0; given < total; i = (i + 1) % rest.size(), ++given) ++target[rest[i].second];
  return target;
}

// Full blocks are copied while it goes on. Inside a domain only those that have to go.
Scheduler::Move Scheduler::Impl::StartMove(Sequence& sequence, DeviceState& to) {
  Move move{sequence.request.id, sequence.device, to.config.device, {}};
  const int full = sequence.computed / options.block_tokens;
  BlockPool& pool = Pool(to.config.domain);
  const bool inside = to.config.domain == sequence.domain;
  MoveState state{to.config.device, to.config.domain, {}, false};
  for (int i = 0; i < full; ++i) {
    const BlockId block = sequence.blocks[i];
    if (inside && static_cast<std::uint32_t>(block.value) < pool.Usable()) {
      pool.AddReference(block);
      state.blocks.push_back(block);
      continue;
    }
    state.blocks.push_back(*pool.Allocate());
    move.copies.push_back({sequence.domain, block, to.config.domain, state.blocks.back()});
  }
  state.copied = move.copies.empty();
  ++to.sequences;
  sequence.move = std::move(state);
  return move;
}

std::vector<Scheduler::Move> Scheduler::Rebalance() {
  Impl& s = *impl_;
  EM_CHECK(!s.in_flight);
  std::map<DeviceId, int> counts;  // once the moves under way have ended
  for (const auto& [id, device] : s.devices) counts[id] = 0;
  for (const auto& [rank, sequence] : s.running)
    ++counts[sequence->move ? sequence->move->to : sequence->device];
  std::map<DeviceId, int> target = s.TargetCounts(counts);
  std::vector<Move> moves;
  if (target.empty()) return moves;
  // Room for the tail and some growth, so that the switch does not fail at once.
  const auto has_room = [&](const Impl::DeviceState& device, const Sequence& sequence) {
    return s.Pool(device.config.domain).Available() > sequence.blocks.size();
  };

  // Inside domains first, since that costs nothing. Youngest first: they have least KV.
  for (const bool inside : {true, false}) {
    for (auto at = s.running.rbegin(); at != s.running.rend(); ++at) {
      Sequence& sequence = *at->second;
      const bool must = !s.devices.at(sequence.device).config.accepts;
      if (sequence.move || (!must && counts[sequence.device] <= target[sequence.device])) continue;
      if (!inside && (s.orphans.count(sequence.request.id) > 0 || s.HasTail(sequence.request.id))) continue;
      Impl::DeviceState* to = nullptr;
      for (auto& [id, device] : s.devices) {
        if (!device.config.accepts || id == sequence.device ||
            (device.config.domain == sequence.domain) != inside)
          continue;
        if (!inside && !has_room(device, sequence)) continue;
        const bool below = counts[id] < target[id];
        if (!below && (inside || !must)) continue;
        // One that is below its target before any other that has room; then the less loaded.
        if (to == nullptr || (below && counts[to->config.device] >= target[to->config.device]) ||
            (!below && counts[to->config.device] >= target[to->config.device] &&
             device.LoadWithOneMore() < to->LoadWithOneMore()))
          to = &device;
      }
      if (to == nullptr) continue;
      --counts[sequence.device];
      ++counts[to->config.device];
      if (inside) {
        moves.push_back({sequence.request.id, sequence.device, to->config.device, {}});
        --s.devices.at(sequence.device).sequences;
        ++to->sequences;
        sequence.device = to->config.device;
      } else {
        moves.push_back(s.StartMove(sequence, *to));
      }
    }
  }
  return moves;
}

std::vector<Scheduler::Move> Scheduler::VacateBlocks(DomainId domain, std::uint32_t blocks) {
  Impl& s = *impl_;
  EM_CHECK(!s.in_flight);
  BlockPool& pool = s.Pool(domain);
  if (pool.Usable() != std::min(blocks, pool.Size())) pool.Limit(blocks);
  const auto above = [&](BlockId block) { return static_cast<std::uint32_t>(block.value) >= blocks; };
  std::vector<Move> moves;
  for (auto& [rank, running] : s.running) {
    Sequence& sequence = *running;
    // Copies under way to ids that go: they begin again, to others.
    if (sequence.move && sequence.move->to_domain == domain &&
        std::any_of(sequence.move->blocks.begin(), sequence.move->blocks.end(), above))
      s.CancelMove(sequence);
    const auto high = std::count_if(sequence.blocks.begin(), sequence.blocks.end(), above);
    if (sequence.domain != domain || high == 0 || sequence.move || s.orphans.count(sequence.request.id) > 0 ||
        s.HasTail(sequence.request.id))
      continue;
    // Its tail moves, too, whatever its ids.
    if (pool.Available() <= static_cast<std::size_t>(high) + 1) continue;
    moves.push_back(s.StartMove(sequence, s.devices.at(sequence.device)));
  }
  return moves;
}

bool Scheduler::Vacated(DomainId domain, std::uint32_t blocks) const {
  return !impl_->Pool(domain).ReferencedAtOrAbove(blocks);
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
void Scheduler::Impl::SwitchMovedSequences() {
  for (auto& [rank, sequence] : running) {
    if (!sequence->move || !sequence->move->copied) continue;
    BlockPool& pool = Pool(sequence->move->to_domain);
    std::vector<BlockId>& blocks = sequence->move->blocks;
    const std::size_t copied = blocks.size();
    const auto wanted = static_cast<std::size_t>(BlocksFor(sequence->computed));
    if (pool.Available() <
        wanted - copied) {  // it filled up meanwhile: the sequence stays, Rebalance may try again
      CancelMove(*sequence);
      continue;
    }
    Tail tail{sequence->request.id, {}, sequence->domain, {}};
    while (blocks.size() < wanted) {
      const std::size_t index = blocks.size();
      blocks.push_back(*pool.Allocate());
      tail.copies.push_back(
          {sequence->domain, sequence->blocks[index], sequence->move->to_domain, blocks[index]});
    }
    tail.release = std::move(sequence->blocks);
    if (tail.copies.empty()) {
      for (const BlockId block : tail.release) Pool(tail.from_domain).Release(block);
    } else {
      tails.push_back(std::move(tail));
    }
    --devices.at(sequence->device).sequences;  // the target has counted it since the move began
    sequence->device = sequence->move->to;
    sequence->domain = sequence->move->to_domain;
    sequence->blocks = std::move(blocks);
    sequence->move.reset();
    sequence->published = 0;  // findable again once a step has completed with the tail in place
    sequence->published_content = 0;
    sequence->rewrite_table = true;
  }
}

}  // namespace elasticmoe::core
