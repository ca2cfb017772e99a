#include "core/placement/stages.h"

#include <algorithm>
#include <map>
#include <set>

#include "core/placement/balance.h"

namespace elasticmoe::core {
namespace {

constexpr int kDefaultStages =
    8;  // enough that each commit is small, few enough that their fixed cost is not seen

// An expert whose owners change; it changes them whole, in one stage.
struct Change {
  int layer = 0;
  int expert = 0;
  double load = 1.0;
  int additions = 0;
  bool unblocks = false;  // it leaves a device that other experts wait to enter
};

bool Contains(std::span<const DeviceId> devices, DeviceId device) {
  return std::find(devices.begin(), devices.end(), device) != devices.end();
}

std::vector<Change> Changes(const PlanFacts& facts, const Placement& base, const Placement& final) {
  std::vector<Change> changes;
  std::set<DeviceId> entered;
  for (int layer = 0; layer < facts.layers; ++layer)
    for (int expert = 0; expert < facts.experts; ++expert) {
      const auto before = base.Owners(layer, expert), after = final.Owners(layer, expert);
      if (std::ranges::equal(before, after)) continue;
      Change change{layer, expert};
      if (!facts.load.empty())
        change.load = facts.load[static_cast<std::size_t>(layer) * facts.experts + expert];
      for (const DeviceId owner : after)
        if (!Contains(before, owner)) ++change.additions, entered.insert(owner);
      changes.push_back(change);
    }
  for (Change& change : changes)
    for (const DeviceId owner : base.Owners(change.layer, change.expert))
      if (!final.Owns(owner, change.layer, change.expert) && entered.count(owner) > 0) change.unblocks = true;
  std::stable_sort(changes.begin(), changes.end(),
                   [](const Change& a, const Change& b) { return a.load > b.load; });
  return changes;
}

// Room in each device's budget, in experts.
class Room {
 public:
  Room(const PlanFacts& facts, const Placement& base) {
    for (const PlanDevice& device : facts.devices) room_[device.device] = BudgetExperts(facts, device);
    for (int layer = 0; layer < base.layers(); ++layer)
      for (int expert = 0; expert < base.experts(); ++expert)
        for (const DeviceId owner : base.Owners(layer, expert)) --room_[owner];
  }
  bool TryEnter(std::span<const DeviceId> before, std::span<const DeviceId> after) {
    for (const DeviceId device : after)
      if (!Contains(before, device) && room_[device] <= 0) {
        full_ = device;
        return false;
      }
    for (const DeviceId device : after)
      if (!Contains(before, device)) --room_[device];
    return true;
  }
  void Leave(std::span<const DeviceId> before, std::span<const DeviceId> after) {
    for (const DeviceId device : before)
      if (!Contains(after, device)) ++room_[device];
  }
  DeviceId full() const { return full_; }

 private:
  std::map<DeviceId, std::int64_t> room_;
  DeviceId full_;
};

// Greedy batches in the order given: what has no room yet waits for a later one. Empty if they block each
// other.
std::vector<std::vector<Change>> Batch(const PlanFacts& facts, const Placement& base, const Placement& final,
                                       std::vector<Change> pending, int batch_size, DeviceId& full) {
  std::vector<std::vector<Change>> batches;
  Room room(facts, base);
  while (!pending.empty()) {
    std::vector<Change> batch, later;
    int size = 0;
    for (const Change& change : pending) {
      const int cost = std::max(1, change.additions);
      const auto before = base.Owners(change.layer, change.expert),
                 after = final.Owners(change.layer, change.expert);
      if ((size > 0 && size + cost > batch_size) || !room.TryEnter(before, after)) {
        later.push_back(change);
        continue;
      }
      size += cost;
      batch.push_back(change);
    }
    if (batch.empty()) {
      full = room.full();
      return {};
    }
    for (const Change& change : batch)
      room.Leave(base.Owners(change.layer, change.expert), final.Owners(change.layer, change.expert));
    batches.push_back(std::move(batch));
    pending = std::move(later);
  }
  return batches;
}

}  // namespace

PlanStage MakeStage(const PlanFacts& facts, const Placement& before, Placement after) {
  PlanStage stage;
  std::map<DeviceId, DomainId> domain;
  for (const PlanDevice& device : facts.devices) domain[device.device] = device.domain;
  std::map<DeviceId, int> reads;  // of this stage: sources take turns
  for (int layer = 0; layer < after.layers(); ++layer)
    for (int expert = 0; expert < after.experts(); ++expert) {
      const bool first = before.members().empty();
      const auto old_owners = first ? std::span<const DeviceId>() : before.Owners(layer, expert);
      const auto new_owners = after.Owners(layer, expert);
      if (std::ranges::equal(old_owners, new_owners)) continue;
      // Who has it by now, and whether its domain was copied from already.
      std::vector<std::pair<DeviceId, bool>> holders;
      for (const DeviceId owner : old_owners) holders.emplace_back(owner, false);
      for (const DeviceId owner : new_owners) {
        if (Contains(old_owners, owner)) continue;
        ExpertMove move{layer, expert, {}, owner, MoveKind::kLoad, facts.expert_bytes};
        std::pair<DeviceId, bool>* source = nullptr;
        for (auto& holder : holders)
          if (domain[holder.first] == domain[owner]) {
            source = &holder;
            move.kind = MoveKind::kRemap;
            move.bytes = 0;
            break;
          }
        if (source == nullptr)
          for (auto& holder : holders)
            if (!holder.second && (source == nullptr || reads[holder.first] < reads[source->first]))
              source = &holder;
        if (source != nullptr) {
          move.from = source->first;
          if (move.kind == MoveKind::kLoad) {
            move.kind = MoveKind::kCopy;
            ++reads[source->first];
            for (auto& holder : holders) holder.second |= domain[holder.first] == domain[move.from];
          }
        }
        stage.moves.push_back(move);
        holders.emplace_back(owner, move.kind == MoveKind::kRemap && source->second);
      }
      for (const DeviceId owner : old_owners)
        if (!Contains(new_owners, owner)) stage.drops.push_back({layer, expert, owner});
    }
  stage.placement = std::move(after);
  return stage;
}

Status BuildStages(const PlanFacts& facts, const Placement& final, ResizePlan& plan) {
  const Placement& base = plan.base;
  if (base.members().empty()) {
    plan.stages.push_back(MakeStage(facts, base, final.With(Epoch(base.epoch().value + 1), final.members())));
    return {};
  }
  std::vector<DeviceId> members = base.members();
  for (const DeviceId member : final.members())
    if (base.RankOf(member) < 0) members.push_back(member);
  std::vector<Change> changes = Changes(facts, base, final);

  if (facts.at_once_bytes && (members == base.members() || members.size() == final.members().size())) {
    PlanStage whole = MakeStage(facts, base, final.With(Epoch(base.epoch().value + 1), final.members()));
    Room room(facts, base);
    const bool fits = std::all_of(changes.begin(), changes.end(), [&](const Change& change) {
      return room.TryEnter(base.Owners(change.layer, change.expert),
                           final.Owners(change.layer, change.expert));
    });
    std::uint64_t copied = 0;
    for (const ExpertMove& move : whole.moves) copied += move.kind == MoveKind::kCopy ? move.bytes : 0;
    if (fits && copied <= *facts.at_once_bytes) {
      if (whole.placement.members() != base.members() || !changes.empty())
        plan.stages.push_back(std::move(whole));
      return {};
    }
  }

  Placement current = base;
  const auto commit = [&](Placement next) {
    PlanStage stage = MakeStage(facts, current, std::move(next));
    current = stage.placement;
    plan.stages.push_back(std::move(stage));
  };
  if (members != base.members()) commit(current.With(Epoch(current.epoch().value + 1), members));
  if (!changes.empty()) {
    int size = 0;
    for (const Change& change : changes) size += std::max(1, change.additions);
    const int batch_size =
        facts.stage_experts > 0 ? facts.stage_experts : (size + kDefaultStages - 1) / kDefaultStages;
    DeviceId full;
    auto batches = Batch(facts, base, final, changes, batch_size, full);
    if (batches.empty()) {
      std::stable_sort(changes.begin(), changes.end(),
                       [](const Change& a, const Change& b) { return a.unblocks > b.unblocks; });
      batches = Batch(facts, base, final, changes, 1, full);
    }
    if (batches.empty())
      return Fail(
          ErrorCode::kResourceExhausted,
          "planning the resize: device={} is full with {} experts of {} bytes and needs one free slot, since "
          "an expert is "
          "given up only after the commit (limit={} bytes); raise --device-memory or keep more devices",
          full, BudgetExperts(facts, *FindDevice(facts, full)), facts.expert_bytes,
          FindDevice(facts, full)->expert_budget_bytes);
    for (const auto& batch : batches) {
      Placement next = current.With(Epoch(current.epoch().value + 1), members);
      for (const Change& change : batch)
        next.SetOwners(change.layer, change.expert, final.Owners(change.layer, change.expert));
      commit(std::move(next));
    }
  }
  if (members != final.members()) commit(current.With(Epoch(current.epoch().value + 1), final.members()));
  return {};
}

void Summarize(const PlanFacts& facts, ResizePlan& plan) {
  std::map<DeviceId, std::int64_t> held, device_peak;
  std::map<DeviceId, DomainId> domain;
  for (const PlanDevice& device : facts.devices) domain[device.device] = device.domain;
  const Placement& base = plan.base;
  std::map<DomainId, std::int64_t> distinct, domain_peak;
  // Owners of each expert in each domain; what a stage adds and drops changes it.
  std::map<std::pair<int, DomainId>, int> copies;
  const auto key = [&](int layer, int expert, DeviceId device) {
    return std::pair(layer * facts.experts + expert, domain[device]);
  };
  const auto add = [&](int layer, int expert, DeviceId device) {
    ++held[device];
    distinct[domain[device]] += copies[key(layer, expert, device)]++ == 0;
  };
  const auto note_peaks = [&] {
    for (const auto& [device, count] : held) device_peak[device] = std::max(device_peak[device], count);
    for (const auto& [id, count] : distinct) domain_peak[id] = std::max(domain_peak[id], count);
  };
  for (const DeviceId member : base.members()) held[member], distinct[domain[member]];
  if (!base.members().empty())
    for (int layer = 0; layer < facts.layers; ++layer)
      for (int expert = 0; expert < facts.experts; ++expert)
        for (const DeviceId owner : base.Owners(layer, expert)) add(layer, expert, owner);
  note_peaks();
  for (const PlanStage& stage : plan.stages) {
    for (const DeviceId member : stage.placement.members()) held[member], distinct[domain[member]];
    for (const ExpertMove& move : stage.moves) {
      add(move.layer, move.expert, move.to);
      ++plan.moves;
      if (move.kind == MoveKind::kRemap) plan.bytes_remapped += facts.expert_bytes;
      if (move.kind == MoveKind::kCopy) plan.bytes_copied += move.bytes;
      if (move.kind == MoveKind::kLoad) plan.bytes_loaded += move.bytes;
    }
    note_peaks();
    for (const ExpertDrop& drop : stage.drops) {
      --held[drop.device];
      distinct[domain[drop.device]] -= --copies[key(drop.layer, drop.expert, drop.device)] == 0;
    }
  }
  for (const auto& [device, count] : device_peak)
    plan.device_peaks.push_back({device, static_cast<std::uint64_t>(count) * facts.expert_bytes});
  for (const auto& [id, count] : domain_peak)
    plan.domain_peaks.push_back(
        {id, facts.shared_bytes + static_cast<std::uint64_t>(count) * facts.expert_bytes});
  const Placement& final = plan.Final();
  for (int layer = 0; layer < final.layers(); ++layer)
    for (int expert = 0; expert < final.experts(); ++expert)
      plan.replicas += static_cast<int>(final.Owners(layer, expert).size()) - 1;
}

}  // namespace elasticmoe::core
