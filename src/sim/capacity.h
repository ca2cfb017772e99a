// What a cluster would do with a workload: the scheduler, planner and autoscaler of the server in virtual
// time over a cost model of steps and resizes. Pure: the same input gives the same result. docs/simulator.md
// says what is modelled.
#pragma once

#include <string>
#include <vector>

#include "core/policy/autoscaler.h"
#include "sim/instance.h"
#include "sim/resize_cost.h"

namespace elasticmoe::sim {

struct SimRequest {
  TimeNs at_ns = 0;
  int prompt_tokens = 1;
  int output_tokens = 1;
};

// kWorker: a process dies, its memory stays. kDevice: its memory is gone, too.
enum class FaultKind { kWorker, kDevice };
struct SimFault {
  double at_s = 0;
  FaultKind kind = FaultKind::kWorker;
};

struct SimResize {  // asked for at a time, whatever the policy
  double at_s = 0;
  int to = 0;
};

struct CapacityInput {
  ClusterProfile cluster;
  ModelShape model;
  std::vector<SimRequest> requests;  // by time
  ResizeStrategy strategy = ResizeStrategy::kElastic;
  core::AutoscalerOptions policy;  // resize_s is replaced by what the profile makes of it
  int max_step_rows = 512;         // a device a step
  int max_running = 4096;          // sequences, all devices
  int max_running_per_device = 0;  // 0 = no limit
  int start_devices = 1;
  std::vector<SimResize> resizes;  // by time
  std::vector<SimFault> faults;    // by time
};

struct CapacitySample {
  double at_s = 0;
  int arrivals = 0;  // this second
  int devices = 0;   // paid for
  int waiting = 0;
  int running = 0;
  double attainment = 1;     // of requests that ended in the last ten seconds
  double worst_ttft_s = 0;   // of first tokens since the last sample
  double output_tokens = 0;  // since the last sample
};

struct CapacityRequest {
  double ttft_s = 0, tpot_s = 0;
  double end_s = -1;  // -1: never
  bool met = false;
};

struct CapacityResize {
  core::Decision decision;
  double ready_s = 0;  // the new size serves, drain not counted
  double done_s = 0;
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
  int faults = 0;
  std::vector<CapacityResize> resizes;
  std::vector<CapacitySample> samples;
  std::vector<CapacityRequest> each;  // as in the input
};

// kResourceExhausted: the model does not fit the cluster, with the numbers. kInvalidArgument: options, a size
// that is no multiple of the tensor-parallel group, a strategy that the cluster has not the devices for.
Expected<CapacityResult> RunCapacity(const CapacityInput& input);

// Share of the requests that would meet the limits if each had `devices` to itself: what no policy exceeds.
double AloneAttainment(const CapacityInput& input, int devices);

}  // namespace elasticmoe::sim
