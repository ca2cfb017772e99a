#include "sim/capacity.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace elasticmoe::sim {
namespace {

using ::testing::HasSubstr;

ModelShape Model() {
  core::ModelSpec model{.family = "toy", .vocab = 1000, .hidden = 512, .max_positions = 4096};
  model.attention = {.heads = 8, .kv_heads = 2, .head_dim = 64};
  model.moe = {.experts = 32, .top_k = 4, .expert_width = 256};
  model.layers.assign(8, {.moe = true});
  return ShapeOf(model);
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

constexpr ResizeStrategy kAll[] = {ResizeStrategy::kElastic,      ResizeStrategy::kDrain,
                                   ResizeStrategy::kElasticPaper, ResizeStrategy::kElasticPaperOverlap,
                                   ResizeStrategy::kColdRestart,  ResizeStrategy::kExtravagant,
                                   ResizeStrategy::kColocated,    ResizeStrategy::kHorizontal};

TEST(Capacity, EveryRequestEndsUnderEveryPolicyAndStrategy) {
  for (const auto kind : {core::PolicyKind::kStatic, core::PolicyKind::kThreshold, core::PolicyKind::kSlo})
    for (const auto strategy : kAll) {
      const CapacityInput input = Input(kind, strategy);
      const CapacityResult result = *RunCapacity(input);
      EXPECT_EQ(result.ended, static_cast<int>(input.requests.size())) << ToString(strategy);
      EXPECT_DOUBLE_EQ(result.output_tokens, 60.0 * static_cast<double>(input.requests.size()))
          << ToString(strategy);
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
  const ClusterProfile cluster = *ProfileOf("gb200");
  const double seconds = CostOfResize(cluster, Model(), ResizeStrategy::kElastic, 4, 8)->latency_s;
  const double least =
      (static_cast<double>(Model().shared_bytes) + static_cast<double>(Model().expert_bytes) * 8 * 4) /
      cluster.link_bytes_s;
  EXPECT_GE(seconds + 1e-12, cluster.attach_s + least);
  EXPECT_FALSE(ProfileOf("abacus"));
  EXPECT_FALSE(ParseStrategy("magic"));
}

TEST(Capacity, ASlowLinkBetweenNodesIsWhatAResizeAcrossThemTakes) {
  ClusterProfile cluster = *ProfileOf("h100");
  cluster.devices_per_node = 4;
  cluster.node_bytes_s = cluster.link_bytes_s / 100;
  const double across = CostOfResize(cluster, Model(), ResizeStrategy::kElastic, 4, 8)->copy_s;
  const double inside = CostOfResize(cluster, Model(), ResizeStrategy::kElastic, 2, 4)->copy_s;
  EXPECT_GT(across, 20 * inside);
}

TEST(Capacity, StrategiesDifferAsTheirDesignsDo) {
  const ClusterProfile cluster = *ProfileOf("ascend-910c");
  const auto cost = [&](ResizeStrategy strategy, Without without = {}) {
    return *CostOfResize(cluster, Model(), strategy, 4, 6, 4, without);
  };
  const ResizeCost ours = cost(ResizeStrategy::kElastic), paper = cost(ResizeStrategy::kElasticPaper),
                   cold = cost(ResizeStrategy::kColdRestart), big = cost(ResizeStrategy::kExtravagant),
                   together = cost(ResizeStrategy::kColocated), replica = cost(ResizeStrategy::kHorizontal);
  EXPECT_EQ(ours.downtime_s, 0);
  EXPECT_EQ(paper.downtime_s, 0);
  EXPECT_EQ(cold.downtime_s, cold.latency_s);
  EXPECT_LT(paper.latency_s, cold.latency_s);
  EXPECT_LE(ours.peak_bytes, paper.peak_bytes);  // one stage at a time
  EXPECT_LT(paper.peak_bytes, big.peak_bytes);
  EXPECT_LT(cold.peak_bytes, together.peak_bytes);
  EXPECT_LT(replica.latency_s, cold.latency_s);  // it starts 4, not 6
  // What is taken away makes it slower, each on its own.
  EXPECT_GT(cost(ResizeStrategy::kElasticPaper, {.allocator = true}).peak_bytes, paper.peak_bytes);
  EXPECT_GT(cost(ResizeStrategy::kElasticPaper, {.standby = true}).latency_s, paper.latency_s);
  EXPECT_GT(cost(ResizeStrategy::kElasticPaper, {.peer_copies = true}).latency_s, paper.latency_s);
  EXPECT_EQ(cost(ResizeStrategy::kElasticPaper, {.zero_copy = true}).latency_s, cold.latency_s);
}

TEST(Capacity, ADrainMakesNewRequestsWaitForTheLongestThatRuns) {
  CapacityInput input = Input(core::PolicyKind::kStatic, ResizeStrategy::kElastic);
  for (SimRequest& one : input.requests) one.output_tokens = 2000;
  input.requests.resize(30);
  input.start_devices = 2;
  input.resizes = {{5, 4}};
  const double elastic = RunCapacity(input)->ttft_p99_s;
  input.strategy = ResizeStrategy::kDrain;
  EXPECT_GT(RunCapacity(input)->ttft_p99_s, 2 * elastic);
}

TEST(Capacity, BothSizesArePaidForWhileAnExtravagantResizeRuns) {
  CapacityInput input = Input(core::PolicyKind::kStatic, ResizeStrategy::kExtravagant);
  input.start_devices = 2;
  input.resizes = {{5, 4}};
  const CapacityResult result = *RunCapacity(input);
  int most = 0;
  for (const CapacitySample& one : result.samples) most = std::max(most, one.devices);
  EXPECT_EQ(most, 6);
  EXPECT_EQ(result.samples.back().devices, 4);
}

TEST(Capacity, ADeadWorkerCostsUsAnAttachAndOthersARestart) {
  CapacityInput input = Input(core::PolicyKind::kStatic, ResizeStrategy::kElastic);
  input.start_devices = 4;
  input.faults = {{25, FaultKind::kWorker}, {35, FaultKind::kDevice}};
  const CapacityResult ours = *RunCapacity(input);
  input.strategy = ResizeStrategy::kColdRestart;
  const CapacityResult cold = *RunCapacity(input);
  EXPECT_EQ(ours.faults, 2);
  EXPECT_EQ(ours.ended, ours.requests);
  EXPECT_EQ(cold.ended, cold.requests);
  EXPECT_DOUBLE_EQ(ours.output_tokens, 60.0 * ours.requests);  // none lost, none twice
  EXPECT_LT(ours.worst_gap_s, cold.worst_gap_s);
}

TEST(Capacity, TensorParallelGroupsAreCountedInDevices) {
  CapacityInput input = Input(core::PolicyKind::kStatic, ResizeStrategy::kElastic);
  input.cluster.tensor_parallel = 2;
  input.start_devices = 2;
  input.resizes = {{5, 6}};
  const CapacityResult result = *RunCapacity(input);
  ASSERT_EQ(result.resizes.size(), 1U);
  EXPECT_EQ(result.resizes[0].decision.to, 6);
  EXPECT_EQ(result.samples.back().devices, 6);
  EXPECT_GE(result.device_s, 2 * result.duration_s - 1e-6);
  input.resizes = {{5, 3}};
  EXPECT_EQ(RunCapacity(input).error().code, ErrorCode::kInvalidArgument);
}

TEST(Capacity, ALimitOnRunningSequencesHoldsOthersBack) {
  CapacityInput input = Input(core::PolicyKind::kStatic, ResizeStrategy::kElastic);
  input.max_step_rows = 300;  // one prompt a step
  input.max_running_per_device = 4;
  int most = 0;
  const CapacityResult result = *RunCapacity(input);
  for (const CapacitySample& one : result.samples) most = std::max(most, one.running);
  EXPECT_LE(most, 5);
}

TEST(Capacity, OneRequestAloneBoundsWhatAnySizeReaches) {
  CapacityInput input = Input(core::PolicyKind::kStatic, ResizeStrategy::kElastic);
  EXPECT_DOUBLE_EQ(AloneAttainment(input, 8), 1);
  input.policy.slo.tpot_s = 1e-6;
  EXPECT_DOUBLE_EQ(AloneAttainment(input, 8), 0);
}

}  // namespace
}  // namespace elasticmoe::sim
