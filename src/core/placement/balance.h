// Inside of the planner: how many experts each member gets in each layer, and which. Not for others. Pure.
#pragma once

#include <vector>

#include "core/placement/planner.h"

namespace elasticmoe::core {

// counts[layer][member] experts; each is the member's share rounded down or up.
struct Quotas {
  std::vector<std::vector<int>> counts;
  int lower_bound = 0;  // moves that any choice of the rounding needs
};

// `members` is final.members(). kResourceExhausted where the budgets cannot hold all experts.
Expected<Quotas> ChooseQuotas(const PlanInput& input, const std::vector<DeviceId>& members);

// The owners after the resize, with the fewest moves that `quotas` allow.
void AssignExperts(const PlanInput& input, const Quotas& quotas, Placement& final);

const PlanDevice* FindDevice(const PlanFacts& facts, DeviceId device);
// Experts that fit a device's budget.
std::int64_t BudgetExperts(const PlanFacts& facts, const PlanDevice& device);

}  // namespace elasticmoe::core
