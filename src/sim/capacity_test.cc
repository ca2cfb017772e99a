#include "sim/capacity.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace elasticmoe::sim {
namespace {

using ::testing::HasSubstr;

core::ModelSpec Model() {
  core::ModelSpec model{.family = "toy", .vocab = 1000, .hidden = 512, .max_positions = 4096};
  model.attention = {.heads = 8, .kv_heads = 2, .head_dim = 64};
  model.moe = {.experts = 32, .top_k = 4, .expert_width = 256};
  model.layers.assign(8, {.moe = true});
  return model;
}

CapacityInput Input(core::PolicyKind kind, ResizeStrategy strategy) {
  CapacityInput input;
  input.cluster = *ProfileOf("cpu-core");
  input.cluster.devices = 8;
  input.model = Model();
  input.strategy = strategy;
  input.policy.kind = kind;
  input.policy.max_devices = 8;
  input.policy.slo = {.ttft_s = 1, .tpot_s = 0.05, .attainment = 0.9};
  // Two requests a second, and forty of them from second 20 to 40.
  TimeNs at = 0;
  while (at < 60'000'000'000) {
    const bool burst = at > 20'000'000'000 && at < 40'000'000'000;
    input.requests.push_back({at, 300, 60});
    at += burst ? 25'000'000 : 500'000'000;
  }
  return input;
}

TEST(Capacity, SameInputSameResult) {
  const CapacityInput input = Input(core::PolicyKind::kSlo, ResizeStrategy::kElastic);
  const CapacityResult a = *RunCapacity(input), b = *RunCapacity(input);
  EXPECT_EQ(a.steps, b.steps);
  EXPECT_DOUBLE_EQ(a.device_s, b.device_s);
  EXPECT_EQ(a.resizes.size(), b.resizes.size());
}

TEST(Capacity, EveryRequestEndsUnderEveryPolicyAndStrategy) {
  for (const auto kind : {core::PolicyKind::kStatic, core::PolicyKind::kThreshold, core::PolicyKind::kSlo})
    for (const auto strategy :
         {ResizeStrategy::kElastic, ResizeStrategy::kDrain, ResizeStrategy::kColdRestart}) {
      const CapacityInput input = Input(kind, strategy);
      const CapacityResult result = *RunCapacity(input);
      EXPECT_EQ(result.ended, static_cast<int>(input.requests.size()));
      EXPECT_DOUBLE_EQ(result.output_tokens, 60.0 * static_cast<double>(input.requests.size()));
      if (kind == core::PolicyKind::kStatic) {
        EXPECT_TRUE(result.resizes.empty());
        EXPECT_NEAR(result.device_s, result.duration_s, 1e-6);  // one device all the time
      }
    }
}

TEST(Capacity, AColdRestartLeavesAGapAndAnElasticResizeDoesNot) {
  const CapacityResult cold = *RunCapacity(Input(core::PolicyKind::kSlo, ResizeStrategy::kColdRestart));
  const CapacityResult elastic = *RunCapacity(Input(core::PolicyKind::kSlo, ResizeStrategy::kElastic));
  ASSERT_FALSE(cold.resizes.empty());
  ASSERT_FALSE(elastic.resizes.empty());
  EXPECT_GE(cold.worst_gap_s, ProfileOf("cpu-core")->boot_s);
  EXPECT_LT(elastic.worst_gap_s, cold.worst_gap_s);
}

TEST(Capacity, AModelThatFitsNoClusterIsRefusedWithTheNumbers) {
  CapacityInput input = Input(core::PolicyKind::kSlo, ResizeStrategy::kElastic);
  input.cluster.memory_bytes = 1e6;
  const auto result = RunCapacity(input);
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().code, ErrorCode::kResourceExhausted);
  EXPECT_THAT(result.error().message, HasSubstr("8 of 8 devices"));
}

TEST(Capacity, WiderResizesCopyAtLeastWhatTheNewDevicesTake) {
  const ClusterProfile cluster = *ProfileOf("h100");
  const double seconds = *ResizeSeconds(cluster, Model(), ResizeStrategy::kElastic, 4, 8);
  const double least =
      static_cast<double>(SharedBytes(Model()) + ExpertBytes(Model()) * 8 * 4) / cluster.link_bytes_s;
  EXPECT_GE(seconds + 1e-12, cluster.attach_s + least);
  EXPECT_FALSE(ProfileOf("abacus"));
  EXPECT_FALSE(ParseStrategy("magic"));
}

}  // namespace
}  // namespace elasticmoe::sim
