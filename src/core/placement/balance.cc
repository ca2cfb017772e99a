#include "core/placement/balance.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>

#include "base/check.h"

namespace elasticmoe::core {
namespace {

constexpr double kEpsilon =
    1e-9;  // shares are sums of few products: far above their rounding, far below 1/experts

// An exchange of two experts must lower the busiest member's load in the layer by this: counts are noisy.
constexpr double kLeastGain = 0.01;

// Rounds real shares to counts, layer by layer.
struct Rounding {
  std::vector<double> share;  // of a layer
  std::vector<int> floor;
  std::vector<int> credits;     // layers in which the member may still be rounded up
  std::vector<double> surplus;  // counts given so far minus shares
};

// have[layer][member]
std::vector<std::vector<int>> CountPresent(const PlanInput& input, const std::vector<DeviceId>& members) {
  std::vector<std::vector<int>> have(input.facts.layers, std::vector<int>(members.size()));
  if (!input.present) return have;
  std::map<DeviceId, int> index;
  for (std::size_t i = 0; i < members.size(); ++i) index[members[i]] = static_cast<int>(i);
  for (int layer = 0; layer < input.facts.layers; ++layer)
    for (int expert = 0; expert < input.facts.experts; ++expert)
      for (const DeviceId owner : input.present->Owners(layer, expert))
        if (const auto at = index.find(owner); at != index.end()) ++have[layer][at->second];
  return have;
}

// Experts of all layers for each member, real numbers: by weight, but none above what it can hold.
Expected<std::vector<double>> TotalShares(const PlanFacts& facts, const std::vector<DeviceId>& members,
                                          const std::vector<std::int64_t>& limits) {
  const double needed = static_cast<double>(facts.layers) * (facts.experts + facts.redundancy);
  double possible = 0;
  for (const std::int64_t limit : limits) possible += static_cast<double>(limit);
  if (possible < needed)
    return Fail(ErrorCode::kResourceExhausted,
                "planning the resize: {} experts of {} bytes need {:.0f} slots, the {} members have room for "
                "{:.0f}; raise "
                "--device-memory, keep more devices or lower the redundancy (now {})",
                facts.layers * facts.experts, facts.expert_bytes, needed, members.size(), possible,
                facts.redundancy);
  std::vector<double> shares(members.size(), -1);
  double left = needed;
  for (bool changed = true; changed;) {
    changed = false;
    double weights = 0;
    for (std::size_t i = 0; i < members.size(); ++i)
      if (shares[i] < 0) weights += FindDevice(facts, members[i])->weight;
    const double per_weight = weights > 0 ? left / weights : 0;
    for (std::size_t i = 0; i < members.size(); ++i) {
      if (shares[i] >= 0 ||
          per_weight * FindDevice(facts, members[i])->weight <= static_cast<double>(limits[i]))
        continue;
      shares[i] = static_cast<double>(limits[i]);
      left -= shares[i];
      changed = true;
    }
    if (!changed)
      for (std::size_t i = 0; i < members.size(); ++i)
        if (shares[i] < 0) shares[i] = per_weight * FindDevice(facts, members[i])->weight;
  }
  return shares;
}

// One layer: who is rounded up. Those who have more already (it saves a move), then those who got least so
// far. Members whose credits reach through all layers left must not be passed over more often than there is
// slack, or a later layer finds too few to round up.
std::vector<int> RoundLayer(Rounding& r, const std::vector<int>& have, int total, int layers_left) {
  std::vector<int> counts = r.floor;
  const int up = total - std::accumulate(r.floor.begin(), r.floor.end(), 0);
  std::vector<int> order;
  int slack = -up * layers_left, big = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    if (r.credits[i] <= 0) continue;
    order.push_back(static_cast<int>(i));
    slack += std::min(r.credits[i], layers_left);
    big += r.credits[i] >= layers_left;
  }
  EM_CHECK(slack >= 0 && up <= static_cast<int>(order.size()), "slack={} up={} of {}", slack, up,
           order.size());
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    const bool keeps_a = have[a] > r.floor[a], keeps_b = have[b] > r.floor[b];
    if (keeps_a != keeps_b) return keeps_a;
    const double lag_a = r.share[a] - r.surplus[a], lag_b = r.share[b] - r.surplus[b];
    return lag_a - r.floor[a] > lag_b - r.floor[b] + kEpsilon;
  });
  int must = std::max(0, big - slack), left = up;
  std::vector<bool> taken(counts.size());
  for (const int i : order)
    if (must > 0 && left > 0 && r.credits[i] >= layers_left) taken[i] = true, --must, --left;
  for (const int i : order)
    if (left > 0 && !taken[i]) taken[i] = true, --left;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    counts[i] += taken[i];
    r.credits[i] -= taken[i];
    r.surplus[i] += counts[i] - r.share[i];
  }
  return counts;
}

// Where the choices above favoured somebody over all layers, one rounding a layer may change hands: that is
// the one move a layer that we allow ourselves above the lower bound.
void EvenOut(Rounding& r, std::vector<std::vector<int>>& counts) {
  for (auto& layer : counts) {
    int most = -1, least = -1;
    for (int i = 0; i < static_cast<int>(layer.size()); ++i) {
      if (layer[i] > r.floor[i] && (most < 0 || r.surplus[i] > r.surplus[most] + kEpsilon)) most = i;
      if (layer[i] == r.floor[i] && r.credits[i] > 0 &&
          (least < 0 || r.surplus[i] < r.surplus[least] - kEpsilon))
        least = i;
    }
    if (most < 0 || least < 0 || r.surplus[most] - r.surplus[least] <= 1 + kEpsilon) continue;
    --layer[most], ++layer[least];
    r.surplus[most] -= 1, r.surplus[least] += 1;
    ++r.credits[most], --r.credits[least];
  }
}

int LayerLowerBound(const Rounding& r, const std::vector<int>& have, int total) {
  int moves = 0, up = total, keep = 0;
  for (std::size_t i = 0; i < have.size(); ++i) {
    moves += std::max(0, r.floor[i] - have[i]);
    up -= r.floor[i];
    keep += r.share[i] > r.floor[i] + kEpsilon && have[i] > r.floor[i];
  }
  return moves + std::max(0, up - keep);
}

// The experts of one layer while they find their owners.
class LayerAssignment {
 public:
  LayerAssignment(const PlanInput& input, const std::vector<DeviceId>& members, int layer,
                  const std::vector<int>& quota)
      : facts_(input.facts),
        members_(members),
        quota_(quota),
        holders_(facts_.experts),
        held_(members.size()),
        near_(facts_.experts),
        load_(members.size()),
        fair_(members.size()),
        per_copy_(facts_.experts, 1.0) {
    if (!facts_.load.empty())
      for (int e = 0; e < facts_.experts; ++e)
        per_copy_[e] = facts_.load[static_cast<std::size_t>(layer) * facts_.experts + e];
    const double total = std::accumulate(per_copy_.begin(), per_copy_.end(), 0.0);
    const int slots = std::accumulate(quota.begin(), quota.end(), 0);
    for (std::size_t i = 0; i < members.size(); ++i) {
      fair_[i] = slots > 0 ? total * quota[i] / slots : 0;
      domain_.push_back(FindDevice(facts_, members[i])->domain);
      weight_.push_back(FindDevice(facts_, members[i])->weight);
    }
    ChooseCopies(slots - facts_.experts);
    if (!input.present) return;
    for (int e = 0; e < facts_.experts; ++e)
      for (const DeviceId owner : input.present->Owners(layer, e)) {
        const auto at = std::find(members.begin(), members.end(), owner);
        if (at != members.end()) Give(e, static_cast<int>(at - members.begin()));
        near_[e].push_back(at != members.end() ? domain_[at - members.begin()]
                                               : FindDevice(facts_, owner)->domain);
      }
  }

  void Run() {
    DropSpareCopies();
    std::vector<int> unplaced;  // an entry a copy
    for (int e = 0; e < facts_.experts; ++e)
      for (int n = static_cast<int>(holders_[e].size()); n < copies_[e]; ++n) unplaced.push_back(e);
    std::stable_sort(unplaced.begin(), unplaced.end(),
                     [&](int a, int b) { return per_copy_[a] > per_copy_[b]; });
    // What can stay in its domain goes first: there a move costs no bytes.
    std::vector<int> far;
    for (const int e : unplaced)
      if (const int to = Receiver(e, true); to >= 0)
        Give(e, to);
      else
        far.push_back(e);
    for (const int e : far) Place(e);
    for (const bool near : {true, false})
      for (int from = MostAbove(near); from >= 0; from = MostAbove(near)) MoveOneFrom(from, near);
    if (facts_.even_load && !facts_.load.empty())
      for (int swaps = 0; swaps < facts_.experts && Exchange(); ++swaps) {
      }
  }

  const std::vector<int>& Holders(int expert) const { return holders_[expert]; }

 private:
  int Count(int i) const { return static_cast<int>(held_[i].size()); }
  bool Holds(int i, int e) const { return std::find(held_[i].begin(), held_[i].end(), e) != held_[i].end(); }
  void Give(int e, int i) {
    holders_[e].push_back(i);
    held_[i].push_back(e);
    load_[i] += per_copy_[e];
  }
  void Take(int e, int i) {
    std::erase(holders_[e], i);
    std::erase(held_[i], e);
    load_[i] -= per_copy_[e];
  }

  // Extra copies go to whoever has the most load a copy.
  void ChooseCopies(int extra) {
    copies_.assign(facts_.experts, 1);
    const int most =
        static_cast<int>(std::count_if(quota_.begin(), quota_.end(), [](int q) { return q > 0; }));
    const std::vector<double> whole = per_copy_;
    for (; extra > 0; --extra) {
      int best = -1;
      for (int e = 0; e < facts_.experts; ++e)
        if (copies_[e] < most && (best < 0 || per_copy_[e] > per_copy_[best])) best = e;
      if (best < 0) return;
      ++copies_[best];
      per_copy_[best] = whole[best] / copies_[best];
    }
  }

  void DropSpareCopies() {
    for (int e = 0; e < facts_.experts; ++e)
      while (static_cast<int>(holders_[e].size()) > copies_[e]) {
        int worst = holders_[e].front();
        for (const int i : holders_[e])
          if (Count(i) - quota_[i] > Count(worst) - quota_[worst]) worst = i;
        Take(e, worst);
      }
  }

  bool Lacks(int i, int other) const {
    return other < 0 || fair_[i] - load_[i] > fair_[other] - load_[other] + kEpsilon;
  }

  // The member that lacks most load among those with room for `e` (and, if `near`, in a domain that has it);
  // -1 if there is none.
  int Receiver(int e, bool near) const {
    int best = -1;
    for (int i = 0; i < static_cast<int>(members_.size()); ++i)
      if (Count(i) < quota_[i] && Lacks(i, best) && !Holds(i, e) &&
          (!near || std::find(near_[e].begin(), near_[e].end(), domain_[i]) != near_[e].end()))
        best = i;
    return best;
  }

  // The member that lacks most load among those with room (and, if `near`, in the domain of `from`); -1 if
  // there is none.
  int ReceiverFrom(int from, bool near) const {
    int best = -1;
    for (int i = 0; i < static_cast<int>(members_.size()); ++i)
      if (Count(i) < quota_[i] && (!near || domain_[i] == domain_[from]) && Lacks(i, best)) best = i;
    return best;
  }

  void Place(int e) {
    if (const int to = Receiver(e, false); to >= 0) return Give(e, to);
    // Everybody with room has this expert already: somebody else takes it, and gives one of his for it.
    for (int i = 0; i < static_cast<int>(members_.size()); ++i) {
      if (quota_[i] == 0 || Holds(i, e)) continue;
      for (const int other : std::vector<int>(held_[i]))
        if (const int to = Receiver(other, false); to >= 0) {
          Take(other, i);
          Give(other, to);
          return Give(e, i);
        }
    }
    EM_CHECK(!holders_[e].empty(), "expert={} finds no place",
             e);  // a further copy may stay away, a first one may not
  }

  // One expert of the busiest member (by what it can do) for a colder one of another, so that the busier of
  // both has the least; false where that brings little.
  bool Exchange() {
    const auto time = [&](int i, double load) { return load / weight_[i]; };
    int hot = 0;
    for (int i = 1; i < static_cast<int>(members_.size()); ++i)
      if (time(i, load_[i]) > time(hot, load_[hot]) + kEpsilon) hot = i;
    const double before = time(hot, load_[hot]);
    double best = before * (1 - kLeastGain);
    int give = -1, take = -1, with = -1;
    for (int i = 0; i < static_cast<int>(members_.size()); ++i)
      for (const int e : held_[hot])
        for (const int f : held_[i]) {
          const double less = per_copy_[e] - per_copy_[f];
          if (i == hot || less <= 0 || Holds(i, e) || Holds(hot, f)) continue;
          const double after = std::max(time(hot, load_[hot] - less), time(i, load_[i] + less));
          if (after < best - kEpsilon) best = after, give = e, take = f, with = i;
        }
    if (give < 0) return false;
    Take(give, hot), Take(take, with);
    Give(give, with), Give(take, hot);
    return true;
  }

  // The member with most load above its share among those that must give (and, if `near`, can inside their
  // domain).
  int MostAbove(bool near) const {
    int best = -1;
    for (int i = 0; i < static_cast<int>(members_.size()); ++i)
      if (Count(i) > quota_[i] && (best < 0 || load_[i] - fair_[i] > load_[best] - fair_[best] + kEpsilon) &&
          (!near || NearChoice(i)))
        best = i;
    return best;
  }
  bool NearChoice(int from) const {
    const int to = ReceiverFrom(from, true);
    return to >= 0 &&
           std::any_of(held_[from].begin(), held_[from].end(), [&](int e) { return !Holds(to, e); });
  }

  // Moves the hottest expert that leaves room, in the giver's surplus and in the receiver's share, for the
  // others that must move too; the coldest if all are too hot.
  void MoveOneFrom(int from, bool near) {
    const int to = ReceiverFrom(from, near);
    int chosen = -1, coldest = -1;
    if (to >= 0) {
      double cold = std::numeric_limits<double>::max();
      for (const int e : held_[from]) cold = std::min(cold, per_copy_[e]);
      const double limit = std::min(load_[from] - fair_[from] - (Count(from) - quota_[from] - 1) * cold,
                                    fair_[to] - load_[to] - (quota_[to] - Count(to) - 1) * cold);
      for (const int e : held_[from]) {
        if (Holds(to, e)) continue;
        if (coldest < 0 || per_copy_[e] < per_copy_[coldest]) coldest = e;
        if (per_copy_[e] <= limit + kEpsilon && (chosen < 0 || per_copy_[e] >= per_copy_[chosen])) chosen = e;
      }
      if (chosen < 0) chosen = coldest;
    }
    if (chosen >= 0) {
      Take(chosen, from);
      Give(chosen, to);
      return;
    }
    // All that it has are copies of what the receivers have: one copy is given up.
    const auto spare =
        std::find_if(held_[from].begin(), held_[from].end(), [&](int e) { return holders_[e].size() > 1; });
    EM_CHECK(spare != held_[from].end());
    Take(*spare, from);
  }

  const PlanFacts& facts_;
  const std::vector<DeviceId>& members_;
  const std::vector<int>& quota_;
  std::vector<DomainId> domain_;  // [member]
  std::vector<double> weight_;    // [member]
  std::vector<int> copies_;
  std::vector<std::vector<int>> holders_;    // [expert] members
  std::vector<std::vector<int>> held_;       // [member] experts
  std::vector<std::vector<DomainId>> near_;  // [expert] domains that have it before the resize
  std::vector<double> load_, fair_;          // [member]
  std::vector<double> per_copy_;             // [expert] load
};

}  // namespace

const PlanDevice* FindDevice(const PlanFacts& facts, DeviceId device) {
  const auto at = std::find_if(facts.devices.begin(), facts.devices.end(),
                               [&](const PlanDevice& d) { return d.device == device; });
  return at == facts.devices.end() ? nullptr : &*at;
}

std::int64_t BudgetExperts(const PlanFacts& facts, const PlanDevice& device) {
  const std::int64_t all = static_cast<std::int64_t>(facts.layers) * facts.experts;
  if (device.expert_budget_bytes == 0 || facts.expert_bytes == 0) return all;
  return static_cast<std::int64_t>(std::min<std::uint64_t>(device.expert_budget_bytes / facts.expert_bytes,
                                                           static_cast<std::uint64_t>(all)));
}

Expected<Quotas> ChooseQuotas(const PlanInput& input, const std::vector<DeviceId>& members) {
  const PlanFacts& facts = input.facts;
  std::vector<std::int64_t> limits;
  for (const DeviceId member : members) limits.push_back(BudgetExperts(facts, *FindDevice(facts, member)));
  EM_ASSIGN_OR_RETURN(const std::vector<double> totals, TotalShares(facts, members, limits));
  Rounding r;
  for (std::size_t i = 0; i < members.size(); ++i) {
    const double share = facts.layers == 0 ? 0 : totals[i] / facts.layers;
    const int floor = static_cast<int>(std::floor(share + kEpsilon));
    const std::int64_t credits =
        share > floor + kEpsilon
            ? std::min<std::int64_t>(limits[i] - std::int64_t(facts.layers) * floor, facts.layers)
            : 0;
    r.share.push_back(share);
    r.floor.push_back(floor);
    r.credits.push_back(static_cast<int>(credits));
    r.surplus.push_back(0);
  }
  const auto have = CountPresent(input, members);
  const int total = facts.experts + facts.redundancy;
  Quotas quotas;
  for (int layer = 0; layer < facts.layers; ++layer) {
    quotas.lower_bound += LayerLowerBound(r, have[layer], total);
    quotas.counts.push_back(RoundLayer(r, have[layer], total, facts.layers - layer));
  }
  EvenOut(r, quotas.counts);
  return quotas;
}

void AssignExperts(const PlanInput& input, const Quotas& quotas, Placement& final) {
  std::vector<DeviceId> owners;
  for (int layer = 0; layer < input.facts.layers; ++layer) {
    LayerAssignment assignment(input, final.members(), layer, quotas.counts[layer]);
    assignment.Run();
    for (int expert = 0; expert < input.facts.experts; ++expert) {
      owners.clear();
      for (const int holder : assignment.Holders(expert)) owners.push_back(final.members()[holder]);
      final.SetOwners(layer, expert, owners);
    }
  }
}

}  // namespace elasticmoe::core
