#include "core/placement/step_switch.h"

#include <gtest/gtest.h>

namespace elasticmoe::core {
namespace {

Placement Owned(int epoch, std::vector<DeviceId> members, std::vector<DeviceId> owner_of_expert) {
  Placement placement(Epoch(epoch), std::move(members), 1, static_cast<int>(owner_of_expert.size()));
  for (std::size_t i = 0; i < owner_of_expert.size(); ++i)
    placement.SetOwners(0, static_cast<int>(i), {owner_of_expert[i]});
  return placement;
}

TEST(MaySwitchWithinStep, AMemberThatGetsItsFirstExpertsWaitsForTheStepsEnd) {
  const DeviceId a(0), b(1);
  const auto some = [](DeviceId) { return 3; };
  const auto none = [](DeviceId) { return 0; };
  const Placement alone = Owned(1, {a}, {a, a, a}), joined = Owned(2, {a, b}, {a, a, a}),
                  shared = Owned(3, {a, b}, {a, b, a}), more = Owned(4, {a, b}, {b, b, a});
  EXPECT_TRUE(MaySwitchWithinStep(alone, joined, some));
  EXPECT_TRUE(MaySwitchWithinStep(alone, shared, some));
  EXPECT_FALSE(MaySwitchWithinStep(joined, shared, some));  // with rows of its own, too
  EXPECT_FALSE(MaySwitchWithinStep(joined, shared, none));
  EXPECT_TRUE(MaySwitchWithinStep(shared, more, none));
  EXPECT_TRUE(MaySwitchWithinStep(shared, joined, some));
}

TEST(MaySwitchWithinStep, AMemberThatLeavesHasNoRows) {
  const DeviceId a(0), b(1);
  const Placement both = Owned(1, {a, b}, {a, b}), alone = Owned(2, {a}, {a, a});
  EXPECT_TRUE(MaySwitchWithinStep(both, alone, [&](DeviceId device) { return device == a ? 5 : 0; }));
  EXPECT_FALSE(MaySwitchWithinStep(both, alone, [&](DeviceId device) { return device == b ? 1 : 0; }));
}

}  // namespace
}  // namespace elasticmoe::core
