// Inside of the planner: the row of commits between two placements, and what it costs. Not for others. Pure.
#pragma once

#include "core/placement/planner.h"

namespace elasticmoe::core {

// Fills plan.stages: from plan.base to the owners and members of `final`. kResourceExhausted where no order
// of the moves holds the budgets.
Status BuildStages(const PlanFacts& facts, const Placement& final, ResizePlan& plan);

// One stage from `before` to `after`: its moves and drops.
PlanStage MakeStage(const PlanFacts& facts, const Placement& before, Placement after);

// Fills the sums and peaks of a plan whose stages are there.
void Summarize(const PlanFacts& facts, ResizePlan& plan);

}  // namespace elasticmoe::core
