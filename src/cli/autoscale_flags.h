// The flags of the autoscaler, and what it starts with.
#pragma once

#include <memory>
#include <string>

#include "base/error.h"
#include "core/spec.h"
#include "runtime/coordinator/replica_set.h"

namespace CLI {
class App;
}

namespace elasticmoe::cli {

struct AutoscaleFlags {
  std::string policy = "off";
  std::string strategy = "elastic";
  bool observe = false;
  double slo_ttft_ms = 2000, slo_tpot_ms = 200, slo_attainment = 0.99;
  int min_devices = 1;
  double window_s = 10, hold_s = 600;
};

void AddAutoscaleFlags(CLI::App& app, AutoscaleFlags& flags);

// Null where the policy is off. It does not run yet. `max_devices`: as the user gave it; 0: the policy stays
// within the cores, since devices that share one are no faster.
Expected<std::unique_ptr<runtime::Autoscaler>> MakeAutoscaler(const AutoscaleFlags& flags, int max_devices,
                                                              runtime::ReplicaSet& replicas);

}  // namespace elasticmoe::cli
