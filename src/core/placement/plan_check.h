// An independent check of resize plans: shares nothing with the planner but the value types, and runs before
// every resize, in production too. Pure.
//
// Checked at every stage: members are those before and after the resize, leaving ones go in the last stage
// alone; every expert is served, by members; moves and drops are exactly the difference between neighbouring
// placements, in an order in which they can be done, with true sources, kinds and bytes; an expert changes
// its owners once; no device is over its budget with old and new together; epochs are consecutive, the first
// follows the present one. And over all: the final placement is balanced as the planner promises with as few
// moves, sums and peaks are right.
#pragma once

#include "core/placement/planner.h"

namespace elasticmoe::core {

// kInternal with the first violation in words.
Status CheckPlan(const PlanInput& input, const ResizePlan& plan);

// The way back of `there` after `committed` stages: as above, but the goal is there.base.
Status CheckReversePlan(const PlanFacts& facts, const ResizePlan& there, int committed,
                        const ResizePlan& back);

}  // namespace elasticmoe::core
