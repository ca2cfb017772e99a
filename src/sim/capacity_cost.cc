// Cost model: profiles, step and resize times.
#include <algorithm>

#include "core/placement/planner.h"
#include "sim/capacity.h"

namespace elasticmoe::sim {
namespace {

constexpr double kGiB = 1024.0 * 1024 * 1024;

int MoeLayers(const core::ModelSpec& model) {
  return static_cast<int>(
      std::ranges::count_if(model.layers, [](const core::LayerSpec& layer) { return layer.moe; }));
}

std::vector<DeviceId> Devices(int count) {
  std::vector<DeviceId> out;
  for (int i = 0; i < count; ++i) out.emplace_back(i);
  return out;
}

}  // namespace

Expected<ClusterProfile> ProfileOf(std::string_view name) {
  // Memory, bandwidths and power from the makers' data sheets; flops are 40 % of the dense bf16 peak, reads
  // 80 % of the memory's and links 70 % of the fabric's, as serving engines reach. Start-up as the paper's
  // ablation: an engine process takes 50 s without a warm standby. A CPU device is one core of an AVX512-BF16
  // machine.
  static const std::vector<ClusterProfile> kProfiles = {
      {.name = "ascend-910c",
       .devices = 64,
       .memory_bytes = 64 * kGiB,
       .flops = 1.5e14,
       .memory_bytes_s = 1.28e12,
       .link_bytes_s = 1.4e11,
       .disk_bytes_s = 5e9,
       .step_s = 8e-3,
       .peer_s = 5e-5,
       .attach_s = 1.0,
       .boot_s = 50,
       .idle_watts = 120,
       .busy_watts = 350},
      {.name = "h100",
       .devices = 64,
       .memory_bytes = 80 * kGiB,
       .flops = 4e14,
       .memory_bytes_s = 2.7e12,
       .link_bytes_s = 3.1e11,
       .disk_bytes_s = 5e9,
       .step_s = 5e-3,
       .peer_s = 5e-5,
       .attach_s = 0.5,
       .boot_s = 50,
       .idle_watts = 120,
       .busy_watts = 600},
      {.name = "gb200",
       .devices = 64,
       .memory_bytes = 186 * kGiB,
       .flops = 1e15,
       .memory_bytes_s = 6.4e12,
       .link_bytes_s = 6.3e11,
       .disk_bytes_s = 1e10,
       .step_s = 4e-3,
       .peer_s = 3e-5,
       .attach_s = 0.5,
       .boot_s = 50,
       .idle_watts = 200,
       .busy_watts = 1000},
      {.name = "cpu-core",
       .devices = 64,
       .memory_bytes = 8 * kGiB,
       .flops = 3.8e11,
       .memory_bytes_s = 3.3e10,
       .link_bytes_s = 1.7e10,
       .disk_bytes_s = 3.2e9,
       .step_s = 1e-4,
       .peer_s = 1e-5,
       .attach_s = 0.01,
       .boot_s = 0.5,
       .idle_watts = 2,
       .busy_watts = 8},
  };
  std::string names;
  for (const ClusterProfile& one : kProfiles) {
    if (one.name == name) return one;
    names += (names.empty() ? "" : ", ") + one.name;
  }
  return Fail(ErrorCode::kInvalidArgument, "reading the cluster: profile={} (one of {})", name, names);
}

std::string_view ToString(ResizeStrategy strategy) {
  switch (strategy) {
    case ResizeStrategy::kElastic:
      return "elastic";
    case ResizeStrategy::kDrain:
      return "drain";
    case ResizeStrategy::kColdRestart:
      return "cold-restart";
  }
  return "?";
}

Expected<ResizeStrategy> ParseStrategy(std::string_view name) {
  for (const auto one : {ResizeStrategy::kElastic, ResizeStrategy::kDrain, ResizeStrategy::kColdRestart})
    if (name == ToString(one)) return one;
  return Fail(ErrorCode::kInvalidArgument,
              "reading the strategy: strategy={} (one of elastic, drain, cold-restart)", name);
}

std::uint64_t ExpertBytes(const core::ModelSpec& model) {
  return std::uint64_t{6} * static_cast<std::uint64_t>(model.hidden) *
         static_cast<std::uint64_t>(model.moe.expert_width);
}

std::uint64_t SharedBytes(const core::ModelSpec& model) {
  const auto hidden = static_cast<std::uint64_t>(model.hidden);
  const auto& a = model.attention;
  std::uint64_t weights = hidden * static_cast<std::uint64_t>(model.vocab) * (model.tied_head ? 1 : 2);
  for (const core::LayerSpec& layer : model.layers) {
    weights += hidden * static_cast<std::uint64_t>(a.QkvRows() + a.heads * a.head_dim);
    weights += hidden * static_cast<std::uint64_t>(layer.moe ? model.moe.experts : 3 * layer.dense_width);
  }
  return 2 * weights;
}

core::StepCost CostOf(const ClusterProfile& cluster, const core::ModelSpec& model) {
  const double expert = static_cast<double>(ExpertBytes(model));
  const double shared = static_cast<double>(SharedBytes(model));
  const double active =
      shared + expert * model.moe.top_k * MoeLayers(model);  // bytes = 2 a weight = FLOPs of a row
  return {.fixed_s = cluster.step_s + shared / cluster.memory_bytes_s,
          .row_s = active / cluster.flops,
          .expert_s = expert / cluster.memory_bytes_s,
          .kv_byte_s = 1 / cluster.memory_bytes_s,
          .peer_s = cluster.peer_s};
}

Expected<double> ResizeSeconds(const ClusterProfile& cluster, const core::ModelSpec& model,
                               ResizeStrategy strategy, int from, int to) {
  const double shared = static_cast<double>(SharedBytes(model));
  const double all = shared + static_cast<double>(ExpertBytes(model)) * model.moe.experts * MoeLayers(model);
  if (strategy == ResizeStrategy::kColdRestart) return cluster.boot_s + all / cluster.disk_bytes_s;
  core::PlanInput plan;
  plan.facts.layers = MoeLayers(model);
  plan.facts.experts = model.moe.experts;
  plan.facts.expert_bytes = ExpertBytes(model);
  plan.facts.shared_bytes = SharedBytes(model);
  for (int i = 0; i < std::max(from, to); ++i)
    plan.facts.devices.push_back({.device = DeviceId(i), .domain = DomainId(i)});
  plan.target = Devices(from);
  EM_ASSIGN_OR_RETURN(const core::ResizePlan first, core::PlanResize(plan));
  plan.present = first.Final();
  plan.target = Devices(to);
  EM_ASSIGN_OR_RETURN(const core::ResizePlan resize, core::PlanResize(plan));
  // Links run side by side, so the device that takes most sets the time; an arriving one takes the shared
  // weights, too.
  std::vector<double> taken(static_cast<std::size_t>(std::max(from, to)), 0.0);
  for (int i = from; i < to; ++i) taken[static_cast<std::size_t>(i)] = shared;
  for (const core::PlanStage& stage : resize.stages)
    for (const core::ExpertMove& move : stage.moves)
      taken[static_cast<std::size_t>(move.to.value)] += static_cast<double>(move.bytes);
  return (to > from ? cluster.attach_s : 0) + *std::ranges::max_element(taken) / cluster.link_bytes_s;
}

}  // namespace elasticmoe::sim
