#include "core/placement/step_switch.h"

#include <algorithm>

namespace elasticmoe::core {

bool MaySwitchWithinStep(const Placement& present, const Placement& next,
                         const std::function<int(DeviceId)>& rows) {
  return std::ranges::none_of(present.members(), [&](DeviceId member) {
    if (next.RankOf(member) < 0) return rows(member) > 0;
    return present.ExpertsOn(member) == 0 && next.ExpertsOn(member) > 0;
  });
}

}  // namespace elasticmoe::core
