#include "sim/capacity.h"

#include <algorithm>
#include <cmath>

#include "sim/capacity_world.h"

namespace elasticmoe::sim {
namespace {

core::ServingShape ServingOf(const ModelShape& model, const CapacityInput& input) {
  core::ServingShape shape;
  shape.moe_layers = model.moe_layers;
  shape.experts = model.experts;
  shape.top_k = model.top_k;
  shape.kv_token_bytes = model.kv_token_bytes;
  shape.max_step_rows = input.max_step_rows;
  shape.max_running = input.max_running;
  return shape;
}

// In units of tensor-parallel groups.
Expected<CapacityInput> Grouped(const CapacityInput& input) {
  const int group = std::max(1, input.cluster.tensor_parallel);
  CapacityInput out = input;
  out.cluster = InGroups(input.cluster);
  out.policy.step_devices = std::max(group, input.policy.step_devices);
  out.policy.min_devices = (input.policy.min_devices + group - 1) / group;
  out.max_running_per_device *= group;
  const auto divide = [&](const char* what, int* value) -> Status {
    if (*value % group != 0)
      return Fail(ErrorCode::kInvalidArgument, "simulating: {}={} is no multiple of tensor_parallel={}", what,
                  *value, group);
    *value /= group;
    return {};
  };
  EM_RETURN_IF_ERROR(divide("step_devices", &out.policy.step_devices));
  EM_RETURN_IF_ERROR(divide("max_devices", &out.policy.max_devices));
  EM_RETURN_IF_ERROR(divide("devices", &out.start_devices));
  for (SimResize& one : out.resizes) {
    EM_RETURN_IF_ERROR(divide("resizes.to", &one.to));
  }
  return out;
}

void Ungroup(CapacityResult& result, int group) {
  if (group <= 1) return;
  result.device_s *= group;
  result.least_devices *= group;
  for (CapacitySample& one : result.samples) one.devices *= group;
  for (CapacityResize& one : result.resizes) {
    one.decision.from *= group;
    one.decision.to *= group;
    if (one.decision.code != core::DecisionCode::kManual)
      one.decision.reason += fmt::format(" (its devices are groups of {})", group);
  }
}

// What sequences can hold at most: as many as may run, each as long as the longest, in whole blocks and one
// more.
double MostKvTokens(const CapacityInput& input) {
  constexpr double kSlack = 64;
  double sum = 0, longest = 0;
  for (const SimRequest& one : input.requests) {
    const double tokens = static_cast<double>(one.prompt_tokens) + one.output_tokens + kSlack;
    sum += tokens;
    longest = std::max(longest, tokens);
  }
  return std::max(kSlack, std::min(sum, longest * input.max_running));
}

}  // namespace

Expected<CapacityResult> RunCapacity(const CapacityInput& given) {
  EM_ASSIGN_OR_RETURN(const CapacityInput input, Grouped(given));
  const ModelShape& model = input.model;
  const ClusterProfile& cluster = input.cluster;
  const bool twice = input.strategy == ResizeStrategy::kColocated;  // weights, and half of the KV memory each
  ModelShape held = model;
  if (twice) held.shared_bytes *= 2, held.expert_bytes *= 2;
  const int least = LeastDevices(cluster, held);
  const int step = std::max(1, input.policy.step_devices);
  const int rounded = (least + step - 1) / step * step;
  if (least == 0 || rounded > input.policy.max_devices || input.policy.max_devices > cluster.devices)
    return Fail(ErrorCode::kResourceExhausted,
                "fitting the model into the cluster: weights={:.1f} GB shared on each device and {:.1f} GB "
                "of experts{} (limit={} of {} devices with {:.1f} GB); take more devices or a smaller model",
                static_cast<double>(held.shared_bytes) * 1e-9, held.AllExpertBytes() * 1e-9,
                twice ? " (two copies)" : "", input.policy.max_devices, cluster.devices,
                cluster.memory_bytes * 1e-9);
  core::ServingShape shape = ServingOf(model, input);
  const double share = twice ? 0.5 : 1.0;
  if (cluster.kv_memory_bytes > 0) {
    shape.kv_tokens_per_device = share * cluster.kv_memory_bytes / shape.kv_token_bytes;
  } else {
    const double left = cluster.memory_bytes * 0.95 - static_cast<double>(held.shared_bytes);
    shape.kv_tokens_per_device = share * left / shape.kv_token_bytes;
    shape.kv_tokens_fixed = -share * held.AllExpertBytes() / shape.kv_token_bytes;
  }
  core::AutoscalerOptions policy = input.policy;
  policy.min_devices = std::max(policy.min_devices, rounded);
  const int start = std::max(input.start_devices, rounded);
  const int other = std::max(policy.min_devices, policy.max_devices / 2);
  EM_ASSIGN_OR_RETURN(const ResizeCost usual,
                      CostOfResize(cluster, model, input.strategy, other, policy.max_devices, start));
  policy.resize_s = usual.latency_s;
  policy.stopped_s = StoppedSeconds(cluster, input.strategy, usual.latency_s, usual.copy_s);
  // The autoscaler is not told the truth: it starts half wrong and learns from the steps.
  core::StepCost prior = CostOf(cluster, model);
  for (double* one : {&prior.fixed_s, &prior.row_s, &prior.expert_row_s, &prior.expert_s, &prior.kv_byte_s,
                      &prior.token_s, &prior.peer_s})
    *one *= 1.5;
  const EngineLimits limits{.max_step_rows = input.max_step_rows,
                            .max_running = input.max_running,
                            .max_running_per_device = input.max_running_per_device,
                            .kv_tokens_fixed = shape.kv_tokens_fixed,
                            .kv_tokens_per_device = shape.kv_tokens_per_device,
                            .kv_tokens_most = MostKvTokens(input)};
  if (limits.max_running_per_device > 0)
    shape.max_running =
        std::min(shape.max_running, limits.max_running_per_device * std::max(1, policy.max_devices));
  EM_ASSIGN_OR_RETURN(core::Autoscaler scaler, core::Autoscaler::Make(policy, shape, prior));
  CapacityWorld world(input, std::move(scaler), shape, limits, start, rounded);
  EM_ASSIGN_OR_RETURN(CapacityResult result, world.Run());
  result.least_devices = rounded;
  Ungroup(result, given.cluster.tensor_parallel);
  return result;
}

double AloneAttainment(const CapacityInput& given, int devices) {
  if (given.requests.empty()) return 1;
  const ClusterProfile cluster = InGroups(given.cluster);
  const ModelShape& model = given.model;
  const core::StepCost cost = CostOf(cluster, model);
  const int groups = std::max(1, devices / std::max(1, given.cluster.tensor_parallel));
  const auto seconds = [&](double rows, double context) {
    return cost.Seconds(
        {.devices = groups,
         .rows = rows,
         .expert_rows = rows / groups,
         .experts = core::ExpertsTouched(model.experts, model.top_k, groups, rows) * model.moe_layers,
         .kv_bytes = context * model.kv_token_bytes,
         .tokens = 1});
  };
  int met = 0;
  for (const SimRequest& one : given.requests) {
    double ttft = 0;
    for (int left = std::max(1, one.prompt_tokens); left > 0; left -= given.max_step_rows)
      ttft += seconds(std::min(left, given.max_step_rows), 0);
    const double tpot = one.output_tokens > 1 ? seconds(1, one.prompt_tokens) : 0;
    met += ttft <= given.policy.slo.ttft_s && tpot <= given.policy.slo.tpot_s;
  }
  return static_cast<double>(met) / static_cast<double>(given.requests.size());
}

}  // namespace elasticmoe::sim
