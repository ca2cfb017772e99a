// Scenario files of `elasticmoe simulate`: cluster, model, workload, limits and runs as JSON
// (docs/simulator.md).
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "base/error.h"
#include "sim/capacity.h"

namespace elasticmoe::cli {

struct ScenarioRun {
  std::string name;
  sim::CapacityInput input;
};

struct Scenario {
  std::string name;
  std::vector<ScenarioRun> runs;
};

// Reads the file and those it names (relative to it). kInvalidArgument names the key, or the line of a trace.
Expected<Scenario> ReadScenario(const std::filesystem::path& file);

}  // namespace elasticmoe::cli
