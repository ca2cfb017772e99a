// When a step that runs may go over to another placement. Pure.
#pragma once

#include <functional>

#include "core/placement/placement.h"

namespace elasticmoe::core {

// Whether a step that began under `present` may go over to `next` between two of its layers; `rows` tells how
// many rows a device has in it. Not where a member that stays gets its first experts: it has said at the
// step's beginning that it serves none, so nobody would wait for what it computes. Nor where one that leaves
// has rows.
bool MaySwitchWithinStep(const Placement& present, const Placement& next,
                         const std::function<int(DeviceId)>& rows);

}  // namespace elasticmoe::core
