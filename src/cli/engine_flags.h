// The flags of an engine, the same for every subcommand that starts one, and the progress bar while it loads.
#pragma once

#include <memory>
#include <string>

#include "base/error.h"
#include "runtime/coordinator/elastic_engine.h"
#include "runtime/coordinator/replica_set.h"

namespace CLI {
class App;
}

namespace elasticmoe::cli {

struct EngineFlags {
  runtime::EngineOptions options;
  int devices = 0;      // 0 = one a core, two at least
  int max_devices = 0;  // 0 = as many as there are cores, eight at least
  std::string pages = "auto";
  std::string expert_table = "pointer";
};

// --weights, which every process of a server has.
void AddWeightsFlag(CLI::App& app, core::WeightFormat& weights);

void AddEngineFlags(CLI::App& app, EngineFlags& flags);

// Where the memory daemon of the server of that name listens.
std::string HmmSocketOf(const std::string& name);

// Fills in what was left to us, starts the engine, and draws the progress of loading on a terminal.
// `name` tells this server's HMM from others' on the machine.
Expected<std::unique_ptr<runtime::ElasticEngine>> StartEngine(const EngineFlags& flags,
                                                              const std::string& name);
Expected<std::unique_ptr<runtime::ReplicaSet>> StartReplicas(const EngineFlags& flags,
                                                             const std::string& name);

}  // namespace elasticmoe::cli
