#include "core/placement/placement.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace elasticmoe::core {
namespace {

const DeviceId kA{0}, kB{1}, kC{2};

TEST(Placement, EvenPlacementCountsDifferByOneAndRotateTheRest) {
  const Placement placement = EvenPlacement(Epoch(1), {kA, kB, kC}, 6, 16);
  for (const DeviceId device : placement.members()) {
    for (int layer = 0; layer < 6; ++layer) {
      EXPECT_GE(placement.ExpertsOn(device, layer), 5);
      EXPECT_LE(placement.ExpertsOn(device, layer), 6);
    }
    EXPECT_EQ(placement.ExpertsOn(device), 32);
  }
}

TEST(Placement, KeepsOtherOwnersWhenOneExpertGetsMoreReplicas) {
  Placement placement = EvenPlacement(Epoch(1), {kA, kB}, 2, 3);
  placement.SetOwners(1, 1, {kB, kA});
  placement.SetOwners(0, 2, {kA, kB, kC});
  EXPECT_TRUE(std::ranges::equal(placement.Owners(1, 1), std::vector{kB, kA}));
  EXPECT_TRUE(std::ranges::equal(placement.Owners(0, 2), std::vector{kA, kB, kC}));
  EXPECT_EQ(placement.Owners(0, 0).size(), 1U);
  placement.SetOwners(0, 2, {kC});
  EXPECT_TRUE(std::ranges::equal(placement.Owners(0, 2), std::vector{kC}));
}

TEST(Placement, EqualityAndHashSeeOwnersNotTheirStorage) {
  Placement a = EvenPlacement(Epoch(1), {kA, kB}, 1, 4), b = a;
  b.SetOwners(0, 0, {kA, kB});
  EXPECT_NE(a, b);
  EXPECT_NE(a.Hash(), b.Hash());
  b.SetOwners(0, 0, {kA});
  EXPECT_EQ(a, b);
  EXPECT_EQ(a.Hash(), b.Hash());
  EXPECT_NE(a, a.With(Epoch(2), a.members()));
}

TEST(Placement, ReplicasShareTheSourceRanks) {
  Placement placement = EvenPlacement(Epoch(1), {kA, kB}, 1, 2);
  placement.SetOwners(0, 0, {kA, kB});
  EXPECT_EQ(placement.OwnerFor(0, 0, 0), kA);
  EXPECT_EQ(placement.OwnerFor(0, 0, 1), kB);
  EXPECT_EQ(placement.OwnerFor(0, 0, 2), kA);
}

}  // namespace
}  // namespace elasticmoe::core
