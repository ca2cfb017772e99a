#include "sim/profile.h"

#include <algorithm>
#include <cmath>

namespace elasticmoe::sim {
namespace {

constexpr double kGiB = 1024.0 * 1024 * 1024;

// Start-up of vLLM on Ascend as Table 1 of the paper has it (docs/simulator.md shows the arithmetic); nothing
// as detailed is published for other accelerators.
ClusterProfile Accelerator(ClusterProfile profile) {
  profile.host_bytes_s = 6.7e8;
  profile.disk_bytes_s = 1e12;  // nodes keep the checkpoint in their memory
  profile.boot_device_s = 6.545;
  profile.warmup_layer_s = 0.0887;
  profile.kv_init_s = 4.62;
  profile.allocator_s = 0.71;
  profile.allocator_share = 0.054;
  return profile;
}

double AttentionWeights(const core::ModelSpec& model) {
  const core::AttentionSpec& a = model.attention;
  double weights = static_cast<double>(model.hidden) * (a.QkvRows() + a.heads * a.OutDim());
  if (a.Latent()) {
    if (a.q_lora_rank > 0) weights += static_cast<double>(a.q_lora_rank) * a.heads * a.head_dim;
    weights += static_cast<double>(a.kv_lora_rank) * a.heads * (a.PlainDim() + a.value_dim);
  }
  return weights;
}

}  // namespace

Expected<ClusterProfile> ProfileOf(std::string_view name) {
  // Memory, bandwidths and power from the makers' data sheets; flops are 40 % of the dense bf16 peak, reads
  // 80 % of the memory's and links 70 % of the fabric's, as serving engines reach. attach_s is an assumption:
  // what waits warmed up, so that joining is connecting and mapping. A CPU device is one core of an
  // AVX512-BF16 machine, as measured by bench kernels; `calibrate` measures whole steps.
  static const std::vector<ClusterProfile> kProfiles = {
      Accelerator({.name = "ascend-910c",
                   .devices = 64,
                   .memory_bytes = 64 * kGiB,
                   .flops = 1.5e14,
                   .memory_bytes_s = 1.28e12,
                   .link_bytes_s = 1.4e11,
                   .devices_per_node = 16,
                   .step_s = 8e-3,
                   .peer_s = 5e-5,
                   .idle_watts = 120,
                   .busy_watts = 350,
                   .attach_s = 1.0}),
      Accelerator({.name = "h100",
                   .devices = 64,
                   .memory_bytes = 80 * kGiB,
                   .flops = 4e14,
                   .memory_bytes_s = 2.7e12,
                   .link_bytes_s = 3.1e11,
                   .devices_per_node = 8,
                   .node_bytes_s = 2.8e11,  // eight 400 Gbit/s adapters
                   .step_s = 5e-3,
                   .peer_s = 5e-5,
                   .idle_watts = 120,
                   .busy_watts = 600,
                   .attach_s = 0.5}),
      Accelerator({.name = "gb200",
                   .devices = 72,
                   .memory_bytes = 186 * kGiB,
                   .flops = 1e15,
                   .memory_bytes_s = 6.4e12,
                   .link_bytes_s = 6.3e11,
                   .devices_per_node = 4,
                   .step_s = 4e-3,
                   .peer_s = 3e-5,
                   .idle_watts = 200,
                   .busy_watts = 1000,
                   .attach_s = 0.5}),
      {.name = "cpu-core",
       .devices = 64,
       .memory_bytes = 8 * kGiB,
       .flops = 3.8e11,
       .memory_bytes_s = 3.3e10,
       .link_bytes_s = 1.7e10,
       .disk_bytes_s = 3.2e9,
       .host_bytes_s = 3.2e9,
       .step_s = 1e-4,
       .peer_s = 1e-5,
       .token_s = 1e-4,
       .idle_watts = 2,
       .busy_watts = 8,
       .attach_s = 0.01,
       .boot_s = 0.5},
  };
  std::string names;
  for (const ClusterProfile& one : kProfiles) {
    if (one.name == name) return one;
    names += (names.empty() ? "" : ", ") + one.name;
  }
  return Fail(ErrorCode::kInvalidArgument,
              "reading the cluster: profile={} (one of {}, or a file that `elasticmoe calibrate` wrote)",
              name, names);
}

ClusterProfile InGroups(const ClusterProfile& cluster) {
  ClusterProfile out = cluster;
  const int group = std::max(1, cluster.tensor_parallel);
  out.tensor_parallel = 1;
  out.devices /= group;
  if (out.devices_per_node > 0) out.devices_per_node = std::max(1, out.devices_per_node / group);
  for (double* one :
       {&out.memory_bytes, &out.kv_memory_bytes, &out.flops, &out.memory_bytes_s, &out.link_bytes_s,
        &out.host_bytes_s, &out.boot_device_s, &out.idle_watts, &out.busy_watts})
    *one *= group;
  return out;
}

ModelShape ShapeOf(const core::ModelSpec& model, double weight_bytes) {
  ModelShape out;
  out.layers = model.LayerCount();
  out.moe_layers = static_cast<int>(std::ranges::count_if(model.layers, &core::LayerSpec::moe));
  out.experts = model.moe.experts;
  out.top_k = model.moe.top_k;
  const double hidden = model.hidden;
  const double expert = 3 * hidden * model.moe.expert_width;
  double shared = hidden * model.vocab * (model.tied_head ? 1 : 2);
  for (const core::LayerSpec& layer : model.layers) {
    shared += AttentionWeights(model);
    shared += layer.moe ? hidden * (model.moe.experts + 3 * model.moe.shared_width)
                        : 3 * hidden * layer.dense_width;
  }
  const auto& a = model.attention;
  const int cached = a.Latent() ? a.LatentDim() : 2 * a.kv_heads * a.head_dim;
  out.expert_bytes = static_cast<std::uint64_t>(expert * weight_bytes);
  out.shared_bytes = static_cast<std::uint64_t>(shared * weight_bytes);
  out.kv_token_bytes = 2.0 * cached * out.layers;
  out.expert_row_flops = 2 * expert * out.top_k * out.moe_layers;
  out.row_flops = 2 * shared + out.expert_row_flops;
  return out;
}

core::StepCost CostOf(const ClusterProfile& cluster, const ModelShape& model) {
  if (cluster.measured) return *cluster.measured;
  return {.fixed_s = cluster.step_s + static_cast<double>(model.shared_bytes) / cluster.memory_bytes_s,
          .row_s = (model.row_flops - model.expert_row_flops) / cluster.flops,
          .expert_row_s = model.expert_row_flops / cluster.flops,
          .expert_s = static_cast<double>(model.expert_bytes) / cluster.memory_bytes_s,
          .kv_byte_s = 1 / cluster.memory_bytes_s,
          .token_s = cluster.token_s,
          .peer_s = cluster.peer_s};
}

int LeastDevices(const ClusterProfile& cluster, const ModelShape& model) {
  const double usable = cluster.memory_bytes * 0.95 - static_cast<double>(model.shared_bytes);
  return usable <= 0 ? 0 : std::max(1, static_cast<int>(std::ceil(model.AllExpertBytes() / usable + 1e-9)));
}

}  // namespace elasticmoe::sim
