// What a change of size takes by each strategy: seconds, phases, peak memory. Pure.
#pragma once

#include "sim/profile.h"

namespace elasticmoe::sim {

// How the size changes.
//   elastic       ours: prepared under load by the planner's stages, then a switch between two steps
//   drain         prepared as ours; then those that run end on the old size while others wait
//   elastic-paper the paper's: an instance that waits warmed to its CPU part gets copies peer to peer and
//                 warms up, then drain
//   elastic-paper-overlap  the other reading of the paper: the new instance takes requests at once while the
//                 old one ends its own, on the same devices in turns
//   cold-restart  stop, start with the new size; requests begin again from their tokens
//   extravagant   a whole instance of the new size on other devices, then the old one ends its requests
//   colocated     the same on the same devices: two copies of the weights, half of the KV memory each, always
//   horizontal    replicas of the first size come and go
enum class ResizeStrategy {
  kElastic,
  kDrain,
  kElasticPaper,
  kElasticPaperOverlap,
  kColdRestart,
  kExtravagant,
  kColocated,
  kHorizontal
};
std::string_view ToString(ResizeStrategy strategy);
// kInvalidArgument names those there are.
Expected<ResizeStrategy> ParseStrategy(std::string_view name);

// Parts of the paper's design that its ablation takes away, one after the other.
struct Without {
  bool allocator = false;    // IPC-safe allocation
  bool peer_copies = false;  // weights come from the host instead
  bool standby = false;      // the instance is started when it is wanted
  bool zero_copy = false;    // nothing is taken over: stop, then load all
};

struct ResizeCost {
  double latency_s = 0;   // command to new size serving; drain not counted
  double downtime_s = 0;  // of it, nothing serves
  double boot_s = 0, load_s = 0, copy_s = 0, warmup_s = 0;
  double bytes_copied = 0;  // device to device
  double peak_bytes = 0;    // of all devices together, KV memory included
};

// `from` and `to` in devices of `cluster`, which has no tensor-parallel groups (InGroups). For horizontal,
// `replica` is the size of one. `without` is of the paper's alone. kResourceExhausted: a size is too small
// for the model.
Expected<ResizeCost> CostOfResize(const ClusterProfile& cluster, const ModelShape& model,
                                  ResizeStrategy strategy, int from, int to, int replica = 1,
                                  const Without& without = {});

// An engine of the paper's kind from nothing to serving on `devices`.
double BootSeconds(const ClusterProfile& cluster, int devices);
double LoadSeconds(const ClusterProfile& cluster, const ModelShape& model, int devices);
double StartSeconds(const ClusterProfile& cluster, const ModelShape& model, int devices);

// Steps beside copies of a resize take so many times as long: a link takes its share of memory bandwidth.
double SlowdownOfCopies(const ClusterProfile& cluster);

// How long of a resize of `seconds`, in `copy_s` of which copies run, serving in effect stood still. Other
// strategies than ours hold back or refuse what comes, or leave the present size alone with the load.
double StoppedSeconds(const ClusterProfile& cluster, ResizeStrategy strategy, double seconds, double copy_s);

}  // namespace elasticmoe::sim
