// What a cluster would do with a workload: the scheduler, planner and autoscaler of the server in virtual
// time over a cost model of steps and resizes. Pure: the same input gives the same result. docs/simulator.md
// says what is modelled.
#pragma once

#include <string>
#include <vector>

#include "core/policy/autoscaler.h"
#include "core/spec.h"

namespace elasticmoe::sim {

// Of one device, where not said otherwise.
struct ClusterProfile {
  std::string name;
  int devices = 1;  // of the cluster
  double memory_bytes = 0;
  double flops = 0;           // sustained in grouped matrix products, not the peak of the data sheet
  double memory_bytes_s = 0;  // sustained reads
  double link_bytes_s = 0;    // into a device from others
  double disk_bytes_s = 0;    // of the checkpoint, all devices together
  double step_s = 0;          // of a step without rows: launches, scheduling
  double peer_s = 0;          // a step, for each device beyond the first
  double attach_s = 0;        // a standby worker becomes a member
  double boot_s = 0;          // an engine process from nothing to serving, without its weights
  double idle_watts = 0;      // stated power model: what waits draws this,
  double busy_watts = 0;      // what runs a step this
};

// kInvalidArgument names the profiles there are.
Expected<ClusterProfile> ProfileOf(std::string_view name);

// How the size changes. kElastic: ours, by small commits under load. kDrain: the paper's, prepared under
// load, then requests wait until those running have ended. kColdRestart: stop, start with the new size,
// requests begin again.
enum class ResizeStrategy { kElastic, kDrain, kColdRestart };
std::string_view ToString(ResizeStrategy strategy);
Expected<ResizeStrategy> ParseStrategy(std::string_view name);

struct SimRequest {
  TimeNs at_ns = 0;
  int prompt_tokens = 1;
  int output_tokens = 1;
};

struct CapacityInput {
  ClusterProfile cluster;
  core::ModelSpec model;             // two bytes a weight and a KV value
  std::vector<SimRequest> requests;  // by time
  ResizeStrategy strategy = ResizeStrategy::kElastic;
  core::AutoscalerOptions policy;  // resize_s is replaced by what the profile makes of it
  int start_devices = 1;
};

struct CapacitySample {
  double at_s = 0;
  int arrivals = 0;  // this second
  int devices = 0;   // paid for
  int waiting = 0;
  int running = 0;
  double attainment = 1;  // of requests that ended in the last ten seconds
};

struct CapacityResult {
  double duration_s = 0;
  int requests = 0;
  int ended = 0;
  int met = 0;  // both limits; requests that never ended did not
  double attainment = 0;
  double ttft_p50_s = 0, ttft_p99_s = 0, tpot_p50_s = 0, tpot_p99_s = 0;
  double device_s = 0;
  double joules = 0;
  double output_tokens = 0;
  double worst_gap_s = 0;  // without a step though requests were there
  int least_devices = 0;   // smallest size that holds the model
  long long steps = 0;
  std::vector<core::Decision> resizes;
  std::vector<CapacitySample> samples;
};

core::StepCost CostOf(const ClusterProfile& cluster, const core::ModelSpec& model);
std::uint64_t ExpertBytes(const core::ModelSpec& model);  // one expert of one layer
std::uint64_t SharedBytes(const core::ModelSpec& model);  // all that is no expert

// Seconds from the command to the new size by `strategy`, drain not counted.
Expected<double> ResizeSeconds(const ClusterProfile& cluster, const core::ModelSpec& model,
                               ResizeStrategy strategy, int from, int to);

// kResourceExhausted: the model does not fit the cluster, with the numbers. kInvalidArgument: options.
Expected<CapacityResult> RunCapacity(const CapacityInput& input);

}  // namespace elasticmoe::sim
