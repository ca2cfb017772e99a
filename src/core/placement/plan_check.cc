#include "core/placement/plan_check.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <tuple>

namespace elasticmoe::core {
namespace {

using Copy = std::tuple<int, int, DeviceId>;  // layer, expert, owner

template <class... Args>
tl::unexpected<Error> Broken(fmt::format_string<Args...> format, Args&&... args) {
  return Fail(ErrorCode::kInternal, "checking the resize plan: {}",
              fmt::format(format, std::forward<Args>(args)...));
}

class Checker {
 public:
  Checker(const PlanFacts& facts, const ResizePlan& plan) : facts_(facts), plan_(plan) {
    for (const PlanDevice& device : facts.devices) devices_[device.device] = &device;
  }

  // The road: every stage by itself and after the one before it.
  Status Stages(const std::vector<DeviceId>& target) {
    const Placement* before = &plan_.base;
    if (before->layers() != facts_.layers || before->experts() != facts_.experts)
      return Broken("the base has another shape than the model");
    if (!before->members().empty()) EM_RETURN_IF_ERROR(Served(*before, -1));
    CountHeld(*before);
    for (int k = 0; k < static_cast<int>(plan_.stages.size()); ++k) {
      const PlanStage& stage = plan_.stages[k];
      if (stage.placement.layers() != facts_.layers || stage.placement.experts() != facts_.experts)
        return Broken("stage={} has another shape than the model", k);
      if (stage.placement.epoch().value != before->epoch().value + 1)
        return Broken("stage={} has epoch={} after {}", k, stage.placement.epoch(), before->epoch());
      EM_RETURN_IF_ERROR(Members(*before, k, target));
      EM_RETURN_IF_ERROR(Served(stage.placement, k));
      EM_RETURN_IF_ERROR(Difference(*before, stage, k));
      EM_RETURN_IF_ERROR(Sources(*before, stage, k));
      EM_RETURN_IF_ERROR(Budgets(stage, k));
      before = &stage.placement;
    }
    const std::set<DeviceId> wanted(target.begin(), target.end()),
        reached(before->members().begin(), before->members().end());
    if (wanted != reached)
      return Broken("the last stage has {} members, wanted are {}", reached.size(), wanted.size());
    return Sums();
  }

  Status Balance() const {
    const Placement& final = plan_.Final();
    const std::vector<DeviceId>& members = final.members();
    const std::size_t n = members.size();
    int replicas = 0;
    std::vector<std::int64_t> totals(n);
    std::vector<std::vector<int>> counts(facts_.layers, std::vector<int>(n));
    for (int layer = 0; layer < facts_.layers; ++layer)
      for (int expert = 0; expert < facts_.experts; ++expert) {
        replicas += static_cast<int>(final.Owners(layer, expert).size()) - 1;
        for (const DeviceId owner : final.Owners(layer, expert)) {
          const int rank = final.RankOf(owner);
          ++counts[layer][rank], ++totals[rank];
        }
      }
    if (replicas != plan_.replicas)
      return Broken("replicas={} are stated, {} are there", plan_.replicas, replicas);
    if (replicas > facts_.layers * facts_.redundancy)
      return Broken("replicas={} (limit={})", replicas, facts_.layers * facts_.redundancy);
    if (replicas < facts_.layers * facts_.redundancy)
      return {};  // copies that found no place leave the counts uneven
    std::vector<double> weight(n);
    std::vector<bool> roomy(n);  // one more in every layer would fit
    for (std::size_t i = 0; i < n; ++i) {
      weight[i] = devices_.at(members[i])->weight;
      roomy[i] = totals[i] + facts_.layers <= Limit(members[i]);
    }
    // Largest remainder in words without remainders: nobody has so much and somebody with room so little that
    // one expert less here would still be more, by weight, than one more there.
    for (int layer = 0; layer < facts_.layers; ++layer)
      for (std::size_t a = 0; a < n; ++a)
        for (std::size_t b = 0; b < n; ++b) {
          if (counts[layer][b] == facts_.experts || !roomy[b]) continue;
          if ((counts[layer][a] - 1) / weight[a] >= (counts[layer][b] + 1) / weight[b] + 1e-9)
            return Broken(
                "layer={}: device={} has {} experts (weight={}) beside device={} with {} (weight={})", layer,
                members[a], counts[layer][a], weight[a], members[b], counts[layer][b], weight[b]);
        }
    return {};
  }

  // Where loads are to be made even, no layer's busiest member gets busier. (Which copies are kept decides
  // more than loads can tell: with any, nothing is promised.)
  Status EvenLoad() const {
    const Placement& base = plan_.base;
    const Placement& final = plan_.Final();
    if (!facts_.even_load || facts_.load.empty() || facts_.redundancy > 0) return {};
    if (std::set(base.members().begin(), base.members().end()) !=
        std::set(final.members().begin(), final.members().end()))
      return {};
    for (int layer = 0; layer < facts_.layers; ++layer) {
      double most[2] = {0, 0};
      const Placement* placements[2] = {&base, &final};
      for (int side = 0; side < 2; ++side)
        for (const DeviceId member : placements[side]->members()) {
          double load = 0;
          for (int expert = 0; expert < facts_.experts; ++expert) {
            if (placements[side]->Owners(layer, expert).size() != 1) return {};
            if (placements[side]->Owns(member, layer, expert))
              load += facts_.load[static_cast<std::size_t>(layer) * facts_.experts + expert];
          }
          most[side] = std::max(most[side], load / devices_.at(member)->weight);
        }
      // Counts that the weights or budgets of now make others than before come first.
      bool counts = true;
      for (const DeviceId member : base.members())
        counts = counts && base.ExpertsOn(member, layer) == final.ExpertsOn(member, layer);
      if (counts && most[1] > most[0] * (1 + 1e-9))
        return Broken("layer={}: the busiest member's load grows from {} to {}", layer, most[0], most[1]);
    }
    return {};
  }

  // The fewest moves, where neither copies nor budgets interfere (then shares are those of the weights
  // alone).
  Status FewMoves() const {
    const Placement& final = plan_.Final();
    if (facts_.redundancy > 0 || facts_.layers == 0 || facts_.even_load) return {};
    double weights = 0;
    for (const DeviceId member : final.members()) weights += devices_.at(member)->weight;
    for (const DeviceId member : final.members()) {
      const double share = facts_.experts * devices_.at(member)->weight / weights;
      if (std::ceil(share - 1e-9) * facts_.layers > static_cast<double>(Limit(member))) return {};
    }
    int bound = 0;
    std::vector<int> moved(facts_.layers);
    for (const PlanStage& stage : plan_.stages)
      for (const ExpertMove& move : stage.moves) ++moved[move.layer];
    for (int layer = 0; layer < facts_.layers; ++layer) {
      int copies = 0;  // copies there before: which of them are kept decides more than counts can tell
      for (int expert = 0; expert < facts_.experts && !plan_.base.members().empty(); ++expert)
        copies += static_cast<int>(plan_.base.Owners(layer, expert).size()) - 1;
      if (copies > 0) return {};
      int needed = 0, up = facts_.experts, up_without_move = 0;
      for (const DeviceId member : final.members()) {
        const double share = facts_.experts * devices_.at(member)->weight / weights;
        const int down = static_cast<int>(std::floor(share + 1e-9));
        const int have = plan_.base.members().empty() ? 0 : plan_.base.ExpertsOn(member, layer);
        needed += std::max(0, down - have);
        up -= down;
        up_without_move += have > down && share > down + 1e-9;
      }
      needed += std::max(0, up - up_without_move);
      bound += needed;
      if (moved[layer] > needed + 1)
        return Broken("layer={}: {} experts move, {} would do", layer, moved[layer], needed);
    }
    if (bound != plan_.lower_bound)
      return Broken("lower bound={} is stated, it is {}", plan_.lower_bound, bound);
    return {};
  }

 private:
  std::int64_t Limit(DeviceId device) const {
    const std::uint64_t budget = devices_.at(device)->expert_budget_bytes;
    return budget == 0 || facts_.expert_bytes == 0 ? std::int64_t{1} << 40
                                                   : static_cast<std::int64_t>(budget / facts_.expert_bytes);
  }

  // Little is copied and there is one commit: members come and go with their experts.
  bool AtOnce() const {
    return facts_.at_once_bytes && plan_.stages.size() == 1 && plan_.bytes_copied <= *facts_.at_once_bytes;
  }

  void CountHeld(const Placement& base) {
    for (const DeviceId member : base.members()) held_[member] = 0, in_domain_[devices_.at(member)->domain];
    if (!base.members().empty())
      for (int layer = 0; layer < facts_.layers; ++layer)
        for (int expert = 0; expert < facts_.experts; ++expert)
          for (const DeviceId owner : base.Owners(layer, expert)) {
            ++held_[owner];
            ++in_domain_[devices_.at(owner)->domain][layer * facts_.experts + expert];
          }
    NotePeaks();
  }

  void NotePeaks() {
    for (const auto& [device, count] : held_)
      device_peak_[device] = std::max(device_peak_[device], count * facts_.expert_bytes);
    for (const auto& [domain, experts] : in_domain_)
      domain_peak_[domain] =
          std::max(domain_peak_[domain], facts_.shared_bytes + experts.size() * facts_.expert_bytes);
  }

  Status Members(const Placement& before, int k, const std::vector<DeviceId>& target) const {
    const std::vector<DeviceId>& members = plan_.stages[k].placement.members();
    const bool last = k + 1 == static_cast<int>(plan_.stages.size());
    std::set<DeviceId> seen;
    for (const DeviceId member : members) {
      if (!seen.insert(member).second) return Broken("stage={}: device={} is a member twice", k, member);
      if (devices_.count(member) == 0) return Broken("stage={}: device={} is unknown", k, member);
      const bool wanted = std::find(target.begin(), target.end(), member) != target.end();
      if (before.RankOf(member) >= 0) {
        if (last && !wanted) return Broken("stage={}: device={} should have left", k, member);
        continue;
      }
      if (!wanted) return Broken("stage={}: device={} joins but is not wanted", k, member);
      if (k > 0) return Broken("stage={}: device={} joins after the first stage", k, member);
      if (!before.members().empty() && !AtOnce() && plan_.stages[k].placement.ExpertsOn(member) > 0)
        return Broken("stage={}: device={} joins with experts", k, member);
    }
    for (const DeviceId member : before.members())
      if (seen.count(member) == 0) {
        if (!last) return Broken("stage={}: device={} leaves before the last stage", k, member);
        if (std::find(target.begin(), target.end(), member) != target.end())
          return Broken("stage={}: device={} leaves but is wanted", k, member);
        if (before.ExpertsOn(member) > 0 && !AtOnce())
          return Broken("stage={}: device={} leaves with experts", k, member);
      }
    return {};
  }

  Status Served(const Placement& placement, int k) const {
    for (int layer = 0; layer < facts_.layers; ++layer)
      for (int expert = 0; expert < facts_.experts; ++expert) {
        const auto owners = placement.Owners(layer, expert);
        if (owners.empty())
          return Broken("stage={}: layer={} expert={} is served by nobody", k, layer, expert);
        for (std::size_t i = 0; i < owners.size(); ++i) {
          if (placement.RankOf(owners[i]) < 0)
            return Broken("stage={}: layer={} expert={} is on device={}, no member", k, layer, expert,
                          owners[i]);
          if (std::find(owners.begin(), owners.begin() + static_cast<std::ptrdiff_t>(i), owners[i]) !=
              owners.begin() + static_cast<std::ptrdiff_t>(i))
            return Broken("stage={}: layer={} expert={} is on device={} twice", k, layer, expert, owners[i]);
        }
      }
    return {};
  }

  Status Difference(const Placement& before, const PlanStage& stage, int k) {
    std::set<Copy> added, dropped;
    for (const ExpertMove& move : stage.moves)
      if (!InShape(move.layer, move.expert) || !added.insert({move.layer, move.expert, move.to}).second)
        return Broken("stage={}: layer={} expert={} moves to device={} twice or is not in the model", k,
                      move.layer, move.expert, move.to);
    for (const ExpertDrop& drop : stage.drops)
      if (!InShape(drop.layer, drop.expert) || !dropped.insert({drop.layer, drop.expert, drop.device}).second)
        return Broken("stage={}: layer={} expert={} leaves device={} twice or is not in the model", k,
                      drop.layer, drop.expert, drop.device);
    std::size_t additions = 0, removals = 0;
    for (int layer = 0; layer < facts_.layers; ++layer)
      for (int expert = 0; expert < facts_.experts; ++expert) {
        const auto old_owners = before.Owners(layer, expert),
                   new_owners = stage.placement.Owners(layer, expert);
        if (std::ranges::equal(old_owners, new_owners)) continue;
        if (!changed_.insert({layer, expert}).second)
          return Broken("stage={}: layer={} expert={} changes its owners again", k, layer, expert);
        for (const DeviceId owner : new_owners)
          if (!before.Owns(owner, layer, expert)) {
            ++additions;
            if (added.count({layer, expert, owner}) == 0)
              return Broken("stage={}: layer={} expert={} appears on device={} without a move", k, layer,
                            expert, owner);
          }
        for (const DeviceId owner : old_owners)
          if (!stage.placement.Owns(owner, layer, expert)) {
            ++removals;
            if (dropped.count({layer, expert, owner}) == 0)
              return Broken("stage={}: layer={} expert={} vanishes from device={}", k, layer, expert, owner);
          }
      }
    if (additions != added.size())
      return Broken("stage={}: {} moves for {} new owners", k, added.size(), additions);
    if (removals != dropped.size())
      return Broken("stage={}: {} drops for {} owners that end", k, dropped.size(), removals);
    return {};
  }

  Status Sources(const Placement& before, const PlanStage& stage, int k) const {
    std::map<std::pair<int, int>, std::set<DeviceId>> got;  // by earlier moves of this stage
    std::map<std::pair<int, int>, std::set<DomainId>> read;
    for (const ExpertMove& move : stage.moves) {
      const auto expert = std::pair(move.layer, move.expert);
      std::set<DeviceId> holders = got[expert];
      if (!before.members().empty())
        for (const DeviceId owner : before.Owners(move.layer, move.expert)) holders.insert(owner);
      const DomainId domain = devices_.at(move.to)->domain;
      const bool near = std::any_of(holders.begin(), holders.end(),
                                    [&](DeviceId d) { return devices_.at(d)->domain == domain; });
      const MoveKind kind = holders.empty() ? MoveKind::kLoad : near ? MoveKind::kRemap : MoveKind::kCopy;
      if (move.kind != kind)
        return Broken("stage={}: layer={} expert={} to device={} is kind={}, should be {}", k, move.layer,
                      move.expert, move.to, static_cast<int>(move.kind), static_cast<int>(kind));
      if (kind != MoveKind::kLoad && holders.count(move.from) == 0)
        return Broken("stage={}: layer={} expert={} comes from device={} that has it not (yet)", k,
                      move.layer, move.expert, move.from);
      if (kind == MoveKind::kRemap && devices_.at(move.from)->domain != domain)
        return Broken("stage={}: layer={} expert={} is remapped from another domain (device={})", k,
                      move.layer, move.expert, move.from);
      if (kind == MoveKind::kCopy && !read[expert].insert(devices_.at(move.from)->domain).second)
        return Broken("stage={}: layer={} expert={} is read from the domain of device={} twice", k,
                      move.layer, move.expert, move.from);
      if (move.bytes != (kind == MoveKind::kRemap ? 0 : facts_.expert_bytes))
        return Broken("stage={}: layer={} expert={} moves with bytes={}", k, move.layer, move.expert,
                      move.bytes);
      got[expert].insert(move.to);
    }
    return {};
  }

  Status Budgets(const PlanStage& stage, int k) {
    for (const DeviceId member : stage.placement.members())
      held_[member], in_domain_[devices_.at(member)->domain];
    for (const ExpertMove& move : stage.moves) {
      if (static_cast<std::int64_t>(++held_[move.to]) > Limit(move.to))
        return Broken("stage={}: device={} holds {} experts before the commit (limit={})", k, move.to,
                      held_[move.to], Limit(move.to));
      ++in_domain_[devices_.at(move.to)->domain][move.layer * facts_.experts + move.expert];
    }
    NotePeaks();
    for (const ExpertDrop& drop : stage.drops) {
      --held_[drop.device];
      auto& experts = in_domain_[devices_.at(drop.device)->domain];
      const auto at = experts.find(drop.layer * facts_.experts + drop.expert);
      if (--at->second == 0) experts.erase(at);
    }
    return {};
  }

  Status Sums() const {
    std::uint64_t remapped = 0, copied = 0, loaded = 0;
    int moves = 0;
    for (const PlanStage& stage : plan_.stages)
      for (const ExpertMove& move : stage.moves) {
        ++moves;
        (move.kind == MoveKind::kRemap  ? remapped
         : move.kind == MoveKind::kCopy ? copied
                                        : loaded) += facts_.expert_bytes;
      }
    if (moves != plan_.moves || remapped != plan_.bytes_remapped || copied != plan_.bytes_copied ||
        loaded != plan_.bytes_loaded)
      return Broken("moves={} remapped={} copied={} loaded={} bytes are stated, they are {}, {}, {}, {}",
                    plan_.moves, plan_.bytes_remapped, plan_.bytes_copied, plan_.bytes_loaded, moves,
                    remapped, copied, loaded);
    if (plan_.device_peaks.size() != device_peak_.size() || plan_.domain_peaks.size() != domain_peak_.size())
      return Broken("{} device peaks and {} domain peaks are stated, there are {} and {}",
                    plan_.device_peaks.size(), plan_.domain_peaks.size(), device_peak_.size(),
                    domain_peak_.size());
    for (const DevicePeak& peak : plan_.device_peaks)
      if (const auto at = device_peak_.find(peak.device);
          at == device_peak_.end() || at->second != peak.expert_bytes)
        return Broken("device={} has its peak at another value than {} bytes", peak.device,
                      peak.expert_bytes);
    for (const DomainPeak& peak : plan_.domain_peaks)
      if (const auto at = domain_peak_.find(peak.domain);
          at == domain_peak_.end() || at->second != peak.bytes)
        return Broken("domain={} has its peak at another value than {} bytes", peak.domain, peak.bytes);
    return {};
  }

  bool InShape(int layer, int expert) const {
    return layer >= 0 && layer < facts_.layers && expert >= 0 && expert < facts_.experts;
  }

  const PlanFacts& facts_;
  const ResizePlan& plan_;
  std::map<DeviceId, const PlanDevice*> devices_;
  std::set<std::pair<int, int>> changed_;
  std::map<DeviceId, std::uint64_t> held_, device_peak_;
  std::map<DomainId, std::map<int, int>> in_domain_;  // expert -> owners in the domain
  std::map<DomainId, std::uint64_t> domain_peak_;
};

}  // namespace

Status CheckPlan(const PlanInput& input, const ResizePlan& plan) {
  if (input.present ? plan.base != *input.present : !plan.base.members().empty())
    return Broken("it does not start from the present placement");
  Checker checker(input.facts, plan);
  EM_RETURN_IF_ERROR(checker.Stages(input.target));
  EM_RETURN_IF_ERROR(checker.Balance());
  EM_RETURN_IF_ERROR(checker.EvenLoad());
  return checker.FewMoves();
}

Status CheckReversePlan(const PlanFacts& facts, const ResizePlan& there, int committed,
                        const ResizePlan& back) {
  if (back.base != (committed == 0 ? there.base : there.stages[committed - 1].placement))
    return Broken("the way back does not start from the last commit");
  Checker checker(facts, back);
  EM_RETURN_IF_ERROR(checker.Stages(there.base.members()));
  if (back.Final() != there.base.With(back.Final().epoch(), there.base.members()))
    return Broken("the way back leads elsewhere");
  return {};
}

}  // namespace elasticmoe::core
