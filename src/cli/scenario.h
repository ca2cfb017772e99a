// Scenario files of `elasticmoe simulate`: cluster, model, workload, limits and runs, or rows to compare with
// published numbers, as JSON (docs/simulator.md).
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/json.h"
#include "sim/capacity.h"
#include "sim/comparison.h"

namespace elasticmoe::cli {

struct ScenarioRun {
  std::string name;
  sim::CapacityInput input;
};

struct Scenario {
  std::string name;
  std::vector<std::string> notes;  // shown below
  std::vector<ScenarioRun> runs;   // one of these two
  std::vector<sim::ComparisonRow> rows;
};

// Reads the file and those it names (relative to it). `trace`, where not empty, is read instead of the one
// that the workload names. kInvalidArgument names the key, or the line of a trace.
Expected<Scenario> ReadScenario(const std::filesystem::path& file, const std::filesystem::path& trace = {});

// Parts of it; paths in them are relative to `base`.
Expected<sim::ClusterProfile> ReadCluster(const Json& json, const std::filesystem::path& base);
Expected<std::vector<sim::SimRequest>> ReadWorkload(const Json& json, const std::filesystem::path& base);
Expected<std::vector<sim::ComparisonRow>> ReadRows(const Json& scenario, const sim::CapacityInput& common,
                                                   const std::filesystem::path& base);
// What `calibrate` writes, and a cluster's "profile" may name.
Json ProfileJson(const sim::ClusterProfile& profile);

}  // namespace elasticmoe::cli
