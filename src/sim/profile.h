// What a cluster and a model are for the simulator: numbers of one device, links and start-up; sizes in bytes
// and operations of a model. Pure values. Where the numbers come from: docs/simulator.md.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "core/policy/step_cost.h"
#include "core/spec.h"

namespace elasticmoe::sim {

// Of one device, where not said otherwise.
struct ClusterProfile {
  std::string name;
  int devices = 1;             // of the cluster
  int tensor_parallel = 1;     // devices that share the attention and its weights; sizes are multiples of it
  double memory_bytes = 0;     //
  double kv_memory_bytes = 0;  // for KV; 0 = all that the weights leave
  double flops = 0;            // sustained in grouped matrix products, not the peak of the data sheet
  double memory_bytes_s = 0;   // sustained reads
  double link_bytes_s = 0;     // into a device from others
  int devices_per_node = 0;    // 0 = one node
  double node_bytes_s = 0;     // into a node from others, its devices together; 0 = as fast as its links
  double disk_bytes_s = 0;     // of the checkpoint, all devices together
  double host_bytes_s = 0;     // of the checkpoint, into one device
  double step_s = 0;           // of a step without rows: launches, scheduling
  double peer_s = 0;           // a step, for each device beyond the first
  double token_s = 0;          // a step, for each token that it gives, where the coordinator shares its cores
  double request_s = 0;        // of a request outside of steps (connection, text); part of its TTFT
  double idle_watts = 0;       // stated power model: what waits draws this,
  double busy_watts = 0;       // what runs a step this

  // Start-up. Ours: a standby worker becomes a member.
  double attach_s = 0;
  // An engine of the paper's kind: process and communication groups, of a node one device after the other;
  double boot_s = 0, boot_device_s = 0;
  double warmup_layer_s = 0;   // first passes, a layer;
  double kv_init_s = 0;        // KV memory of its own is found, taken and cleared;
  double allocator_s = 0;      // tensors are made anew since their allocation cannot be handed on,
  double allocator_share = 0;  // and this share of all memory is lost to it.

  std::optional<core::StepCost> measured;  // by calibrate, for one model; replaces what the numbers above say
};

// kInvalidArgument names the profiles there are.
Expected<ClusterProfile> ProfileOf(std::string_view name);

// The same cluster with each group of tensor_parallel devices as one device.
ClusterProfile InGroups(const ClusterProfile& cluster);

struct ModelShape {
  int layers = 0, moe_layers = 0;
  int experts = 0, top_k = 0;
  std::uint64_t expert_bytes = 0;  // one expert of one layer
  std::uint64_t shared_bytes = 0;  // all that is no routed expert
  double kv_token_bytes = 0;       // two bytes a value, all layers
  // Two a weight that a row visits, attention over its past not counted: all, and those of its experts.
  double row_flops = 0, expert_row_flops = 0;

  double AllExpertBytes() const { return static_cast<double>(expert_bytes) * experts * moe_layers; }
  double AllBytes() const { return static_cast<double>(shared_bytes) + AllExpertBytes(); }
};

ModelShape ShapeOf(const core::ModelSpec& model, double weight_bytes = 2);

core::StepCost CostOf(const ClusterProfile& cluster, const ModelShape& model);

// Smallest number of devices whose memory holds the model, 0 = none does. A twentieth of the memory is left
// for activations.
int LeastDevices(const ClusterProfile& cluster, const ModelShape& model);

}  // namespace elasticmoe::sim
