#include <gtest/gtest.h>

#include <vector>

#include "base/rng.h"
#include "core/memory/budget.h"
#include "core/memory/page_pool.h"

namespace elasticmoe::core {
namespace {

TEST(PagePool, GivesTheLowestRunAndJoinsFreedNeighbours) {
  PagePool pool(10);
  const PageRun a = *pool.Allocate(3, PageTag::kExpert, DeviceId(0));
  const PageRun b = *pool.Allocate(3, PageTag::kKv, DeviceId(1));
  EXPECT_EQ(a, (PageRun{0, 3}));
  EXPECT_EQ(b, (PageRun{3, 3}));
  pool.Free(a);
  pool.Free(b);
  pool.CheckIntegrity();
  EXPECT_EQ(*pool.Allocate(10, PageTag::kShared, DeviceId(0)), (PageRun{0, 10}));
}

TEST(PagePool, RefusesBeyondABudgetWithoutChange) {
  PagePool pool(10);
  ASSERT_TRUE(pool.SetBudget(DeviceId(0), 4));
  ASSERT_TRUE(pool.Allocate(3, PageTag::kExpert, DeviceId(0)));
  auto more = pool.Allocate(2, PageTag::kExpert, DeviceId(0));
  ASSERT_FALSE(more);
  EXPECT_EQ(more.error().code, ErrorCode::kResourceExhausted);
  EXPECT_EQ(pool.FreePages(), 7u);
  EXPECT_FALSE(pool.SetBudget(DeviceId(0), 2));
}

TEST(PagePool, ChangingTheAccountMovesNoPage) {
  PagePool pool(8);
  const PageRun run = *pool.Allocate(5, PageTag::kExpert, DeviceId(0));
  ASSERT_TRUE(pool.Reaccount(run, DeviceId(1)));
  EXPECT_EQ(pool.UsedBy(DeviceId(0)), 0u);
  EXPECT_EQ(pool.UsedBy(DeviceId(1)), 5u);
  pool.CheckIntegrity();
}

TEST(PagePool, KeepsItsInvariantsUnderRandomUse) {
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    Rng rng(seed);
    PagePool pool(64);
    std::vector<PageRun> held;
    for (int i = 0; i < 300; ++i) {
      if (rng.Below(2) == 0 || held.empty()) {
        const auto run =
            pool.Allocate(1 + rng.Below(9), static_cast<PageTag>(rng.Below(3)), DeviceId(rng.Below(3)));
        if (run) held.push_back(*run);
      } else {
        const std::size_t index = rng.Below(held.size());
        if (rng.Below(3) == 0) {
          ASSERT_TRUE(pool.Reaccount(held[index], DeviceId(rng.Below(3))));
        } else {
          pool.Free(held[index]);
          held.erase(held.begin() + static_cast<long>(index));
        }
      }
      pool.CheckIntegrity();
    }
  }
}

TEST(Budget, PicksTheLargestPageThatWastesLittle) {
  EXPECT_EQ(ChoosePageBytes(196'608), 65'536u);   // 3 pages, no waste
  EXPECT_EQ(ChoosePageBytes(9 << 20), 1u << 20);  // 4.5 pages of 2 MiB would waste 11 %
  EXPECT_EQ(ChoosePageBytes(64u << 20), 2u << 20);
  EXPECT_EQ(ChoosePageBytes(5'000), 4'096u);
  EXPECT_EQ(ChoosePageBytes(0), 2u << 20);  // a model without experts
}

TEST(Budget, RefusesWithTheNumbersAndWhatToChange) {
  MemoryRequest request;
  request.shared_bytes = 100 << 20;
  request.expert_bytes = 2 << 20;
  request.moe_layers = 4;
  request.experts = 8;
  request.kv_block_bytes = 1 << 16;
  request.kv_memory_bytes = 64 << 20;
  request.devices = 2;
  request.available_bytes = std::size_t{1} << 30;
  ASSERT_TRUE(PlanMemory(request));
  request.device_memory_bytes = 100 << 20;
  auto plan = PlanMemory(request);
  ASSERT_FALSE(plan);
  EXPECT_NE(plan.error().message.find("raise --device-memory"), std::string::npos) << plan.error().message;
  request.device_memory_bytes = 0;
  request.available_bytes = 200 << 20;
  EXPECT_FALSE(PlanMemory(request));
  request.kv_memory_bytes = 100;
  EXPECT_EQ(PlanMemory(request).error().code, ErrorCode::kInvalidArgument);
}

TEST(Growth, IsRefusedWithTheNumbersWhereTheMachineHasTooLittle) {
  constexpr std::size_t kMiB = 1 << 20;
  GrowthRequest request{2, 4, 100 * kMiB, 800 * kMiB, 50 * kMiB, false, 100 * kMiB};
  EXPECT_EQ(GrowthBytes(request), 100 * kMiB);
  EXPECT_TRUE(CheckGrowth(request));
  request.domain_per_device = true;  // shared weights and a quarter of the experts for each of the two
  EXPECT_EQ(GrowthBytes(request), (100 + 2 * (100 + 200)) * kMiB);
  const Status refused = CheckGrowth(request);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kResourceExhausted);
  EXPECT_NE(refused.error().message.find("700.0 MiB more"), std::string::npos) << refused.error().message;
  request.joining = -1;
  EXPECT_TRUE(CheckGrowth(request));
}

}  // namespace
}  // namespace elasticmoe::core
