// The planner: from the present placement to one over other members, as a row of small commits. Pure.
//
// What it promises (plan_check.h holds every plan against this, by other code):
//  1. Per layer, each member's experts are its share by weight rounded down or up; the rounding goes to
//     different members in different layers. Budgets lower a share, the others then take more.
//  2. As few experts move as these shares allow; at most one more a layer (spent on evening out the
//     rounding). Where there are copies, or budgets bind, this is aimed at, not promised. Moves inside a
//     domain come before copies.
//  3. Which experts move is chosen by measured load: hottest first, as far as they fit the receiver's share.
//  4. An expert changes its owners in one stage only. A source is freed after the commit, so a stage needs
//     old and new together, and holds the budgets with both.
//     With `even_load`, experts beyond these are exchanged, hot for cold, until the members' loads in each
//     layer are even: as many on each as before, and no busiest member is busier.
//  5. First stage: new members join without experts, so that they take requests as soon as the non-expert
//     weights are there. Then experts, hottest first, in batches. Last stage: leaving members, empty by now,
//     are dropped. With `at_once_bytes` all of that is one stage, if experts of no more bytes are copied,
//     budgets allow it, and members only come or only go: a commit waits for a step's end, remapping takes
//     less than a step, and so little is copied sooner by a device that does nothing else yet.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/error.h"
#include "core/placement/placement.h"

namespace elasticmoe::core {

struct PlanDevice {
  DeviceId device;
  DomainId domain;
  double weight = 1.0;                    // relative speed: its share of the experts
  std::uint64_t expert_budget_bytes = 0;  // experts of all layers together; 0 = no limit
};

// What is true whatever the operation.
struct PlanFacts {
  int layers = 0;                   // MoE layers; 0 for a dense model
  int experts = 0;                  // a layer
  std::vector<PlanDevice> devices;  // members and those that could become one
  std::uint64_t expert_bytes = 0;   // one expert of one layer
  std::uint64_t shared_bytes = 0;   // all other weights: once in each domain that has a member
  std::vector<double> load;         // [layers, experts] rows lately; empty = unknown, taken as uniform
  int redundancy = 0;               // extra copies a layer, given to the hottest experts
  int stage_experts = 0;            // experts a commit; 0 = an eighth of all that move
  bool even_load = false;           // exchange experts until loads are even (see 3 above)
  // One commit for all, where experts of at most so many bytes are copied (see 5 above); none: never.
  std::optional<std::uint64_t> at_once_bytes;
};

struct PlanInput {
  std::optional<Placement> present;  // none: the first placement; experts come from the checkpoint
  std::vector<DeviceId> target;      // members wanted, any order
  PlanFacts facts;
};

enum class MoveKind {
  kRemap,  // another owner in the same domain has it: the pages are mapped, no byte is copied
  kCopy,   // peer to peer from another domain
  kLoad,   // from the checkpoint (first placement only)
};

// Moves of a stage are in an order in which they can be done: `from` owned the expert before the stage, or
// got it by an earlier move of the same stage (a chain). No device is copied from twice for one expert.
struct ExpertMove {
  int layer = 0;
  int expert = 0;
  DeviceId from;  // without meaning for kLoad
  DeviceId to;
  MoveKind kind = MoveKind::kRemap;
  std::uint64_t bytes = 0;  // copied or loaded; 0 for kRemap
  friend bool operator==(const ExpertMove&, const ExpertMove&) = default;
};

// What a device gives up once the stage is committed and no step of an older epoch runs.
struct ExpertDrop {
  int layer = 0;
  int expert = 0;
  DeviceId device;
  friend bool operator==(const ExpertDrop&, const ExpertDrop&) = default;
};

struct PlanStage {
  Placement placement;
  std::vector<ExpertMove> moves;
  std::vector<ExpertDrop> drops;
};

struct DevicePeak {
  DeviceId device;
  std::uint64_t expert_bytes = 0;  // highest before any commit: old and new together
};

struct DomainPeak {
  DomainId domain;
  std::uint64_t bytes = 0;  // shared weights once, and each expert that any member of the domain has once
};

struct ResizePlan {
  Placement base;                 // no members = none yet
  std::vector<PlanStage> stages;  // none: nothing to do
  std::vector<DevicePeak> device_peaks;
  std::vector<DomainPeak> domain_peaks;
  int moves = 0;
  int lower_bound = 0;  // fewest moves that any placement with such shares needs
  int replicas = 0;     // copies beyond the first, over all layers, in the final placement
  std::uint64_t bytes_remapped = 0;
  std::uint64_t bytes_copied = 0;
  std::uint64_t bytes_loaded = 0;

  const Placement& Final() const { return stages.empty() ? base : stages.back().placement; }
};

// Errors:
//   kInvalidArgument    no target, a device twice or unknown, a weight or load that is no positive number,
//   ... kResourceExhausted  the budgets cannot hold the experts, at the end or at a stage: the numbers and
//   what to change
Expected<ResizePlan> PlanResize(const PlanInput& input);

// The way back from stage `committed - 1` of `plan` to plan.base, through the same placements in reverse
// order, as epochs after the last committed one. It fits whenever the way there did: old and new together are
// the same. REQUIRES: 0 <= committed <= stages, and the plan has a base.
ResizePlan ReversePlan(const PlanFacts& facts, const ResizePlan& plan, int committed);

// Members after a resize to `count`: `victims` go; then the newest (last in rank) go or the lowest
// numbers of `available` come, until it fits.
// kInvalidArgument: count < 1 or beyond what there is, a victim that is no member.
Expected<std::vector<DeviceId>> ChooseMembers(std::span<const DeviceId> present,
                                              std::span<const DeviceId> available, int count,
                                              std::span<const DeviceId> victims);

}  // namespace elasticmoe::core
