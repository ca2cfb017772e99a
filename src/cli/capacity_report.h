// Tables, JSON and a self-contained HTML page of simulated runs. Pure.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "base/json.h"
#include "sim/capacity.h"

namespace elasticmoe::cli {

struct NamedRun {
  std::string name;
  sim::CapacityResult result;
};

std::string CapacityTable(const std::vector<NamedRun>& runs);
Json CapacityJson(const std::vector<NamedRun>& runs);
// Curves over time as inline SVG; loads nothing.
std::string CapacityHtml(const std::string& title, const std::vector<NamedRun>& runs);

}  // namespace elasticmoe::cli
