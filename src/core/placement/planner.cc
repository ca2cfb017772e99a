#include "core/placement/planner.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "base/check.h"
#include "core/placement/balance.h"
#include "core/placement/stages.h"

namespace elasticmoe::core {
namespace {

bool Contains(std::span<const DeviceId> devices, DeviceId device) {
  return std::find(devices.begin(), devices.end(), device) != devices.end();
}

Status CheckFacts(const PlanFacts& facts) {
  if (facts.layers < 0 || (facts.layers > 0 && facts.experts < 1))
    return Fail(ErrorCode::kInvalidArgument, "planning the resize: layers={} experts={}", facts.layers,
                facts.experts);
  std::set<DeviceId> known;
  for (const PlanDevice& device : facts.devices) {
    if (!known.insert(device.device).second)
      return Fail(ErrorCode::kInvalidArgument, "planning the resize: device={} is described twice",
                  device.device);
    if (!std::isfinite(device.weight) || device.weight <= 0)
      return Fail(ErrorCode::kInvalidArgument,
                  "planning the resize: device={} has weight={}; it must be above 0", device.device,
                  device.weight);
  }
  if (!facts.load.empty() && facts.load.size() != static_cast<std::size_t>(facts.layers) * facts.experts)
    return Fail(ErrorCode::kInvalidArgument,
                "planning the resize: load has {} entries for {} layers of {} experts", facts.load.size(),
                facts.layers, facts.experts);
  for (const double load : facts.load)
    if (!std::isfinite(load) || load < 0)
      return Fail(ErrorCode::kInvalidArgument, "planning the resize: a load is {}", load);
  if (facts.stage_experts < 0)
    return Fail(ErrorCode::kInvalidArgument, "planning the resize: stage_experts={}", facts.stage_experts);
  return {};
}

Status CheckTarget(const PlanInput& input) {
  const PlanFacts& facts = input.facts;
  if (input.target.empty())
    return Fail(ErrorCode::kInvalidArgument, "planning the resize: target=0 devices; at least one must stay");
  std::set<DeviceId> wanted;
  for (const DeviceId device : input.target) {
    if (!wanted.insert(device).second)
      return Fail(ErrorCode::kInvalidArgument, "planning the resize: device={} is wanted twice", device);
    if (FindDevice(facts, device) == nullptr)
      return Fail(ErrorCode::kInvalidArgument, "planning the resize: device={} is unknown (known={})", device,
                  facts.devices.size());
  }
  const std::int64_t most =
      static_cast<std::int64_t>(facts.experts) * (static_cast<std::int64_t>(input.target.size()) - 1);
  if (facts.redundancy < 0 || (facts.layers > 0 && facts.redundancy > most))
    return Fail(ErrorCode::kInvalidArgument,
                "planning the resize: redundancy={} (limit={}: each of {} experts on each of {} devices)",
                facts.redundancy, most, facts.experts, input.target.size());
  if (!input.present) return {};
  const Placement& present = *input.present;
  if (present.layers() != facts.layers || present.experts() != facts.experts)
    return Fail(ErrorCode::kInvalidArgument,
                "planning the resize: the placement has {} layers of {} experts, the model {} of {}",
                present.layers(), present.experts(), facts.layers, facts.experts);
  for (const DeviceId member : present.members())
    if (FindDevice(facts, member) == nullptr)
      return Fail(ErrorCode::kInvalidArgument, "planning the resize: member device={} is not described",
                  member);
  for (int layer = 0; layer < facts.layers; ++layer)
    for (int expert = 0; expert < facts.experts; ++expert) {
      if (present.Owners(layer, expert).empty())
        return Fail(ErrorCode::kInvalidArgument, "planning the resize: layer={} expert={} is nowhere", layer,
                    expert);
      for (const DeviceId owner : present.Owners(layer, expert))
        if (present.RankOf(owner) < 0)
          return Fail(ErrorCode::kInvalidArgument,
                      "planning the resize: layer={} expert={} is on device={}, no member", layer, expert,
                      owner);
    }
  return {};
}

}  // namespace

Expected<ResizePlan> PlanResize(const PlanInput& input) {
  EM_RETURN_IF_ERROR(CheckFacts(input.facts));
  EM_RETURN_IF_ERROR(CheckTarget(input));
  ResizePlan plan;
  plan.base = input.present.value_or(Placement(Epoch(0), {}, input.facts.layers, input.facts.experts));
  std::vector<DeviceId> members;  // survivors keep their order, those who come are appended
  for (const DeviceId member : plan.base.members())
    if (Contains(input.target, member)) members.push_back(member);
  for (const DeviceId device : input.target)
    if (!Contains(members, device)) members.push_back(device);

  EM_ASSIGN_OR_RETURN(const Quotas quotas, ChooseQuotas(input, members));
  plan.lower_bound = quotas.lower_bound;
  Placement final(plan.base.epoch(), members, input.facts.layers, input.facts.experts);
  AssignExperts(input, quotas, final);
  EM_RETURN_IF_ERROR(BuildStages(input.facts, final, plan));
  Summarize(input.facts, plan);
  return plan;
}

ResizePlan ReversePlan(const PlanFacts& facts, const ResizePlan& plan, int committed) {
  EM_CHECK(committed >= 0 && committed <= static_cast<int>(plan.stages.size()) &&
           !plan.base.members().empty());
  ResizePlan back;
  back.base = committed == 0 ? plan.base : plan.stages[committed - 1].placement;
  const Placement* current = &back.base;
  back.stages.reserve(committed);
  for (int k = committed - 1; k >= 0; --k) {
    const Placement& to = k == 0 ? plan.base : plan.stages[k - 1].placement;
    back.stages.push_back(
        MakeStage(facts, *current, to.With(Epoch(current->epoch().value + 1), to.members())));
    current = &back.stages.back().placement;
  }
  Summarize(facts, back);
  back.lower_bound = back.moves;
  return back;
}

Expected<std::vector<DeviceId>> ChooseMembers(std::span<const DeviceId> present,
                                              std::span<const DeviceId> available, int count,
                                              std::span<const DeviceId> victims) {
  if (count < 1)
    return Fail(ErrorCode::kInvalidArgument, "choosing members: target={} (limit=1 or more)", count);
  std::vector<DeviceId> members, spare;
  for (const DeviceId victim : victims)
    if (!Contains(present, victim))
      return Fail(ErrorCode::kInvalidArgument,
                  "choosing members: device={} is to be removed but is no member; see `elasticmoe status`",
                  victim);
  for (const DeviceId device : present)
    if (!Contains(victims, device)) members.push_back(device);
  for (const DeviceId device : available)
    if (!Contains(present, device) && !Contains(spare, device)) spare.push_back(device);
  std::sort(spare.begin(), spare.end());
  if (static_cast<int>(members.size()) > count) members.resize(count);
  for (const DeviceId device : spare)
    if (static_cast<int>(members.size()) < count) members.push_back(device);
  if (static_cast<int>(members.size()) < count)
    return Fail(ErrorCode::kInvalidArgument,
                "choosing members: target={} (limit={} devices); lower it or raise --max-devices", count,
                members.size());
  return members;
}

}  // namespace elasticmoe::core
