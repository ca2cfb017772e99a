// Tables, JSON and a self-contained HTML page of simulated runs, and of comparisons with published numbers.
// Pure.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/json.h"
#include "sim/capacity.h"
#include "sim/comparison.h"

namespace elasticmoe::cli {

struct NamedRun {
  std::string name;
  sim::CapacityResult result;
};

std::string CapacityTable(const std::vector<NamedRun>& runs);
Json CapacityJson(const std::vector<NamedRun>& runs);
// Curves over time as inline SVG; loads nothing.
std::string CapacityHtml(const std::string& title, const std::vector<NamedRun>& runs);

struct ComparedRow {
  sim::ComparisonRow row;
  sim::ComparisonValue value;
};

// Share by which the simulated number differs from the published one; none without one. Of a bound: 0 where
// it holds.
std::optional<double> Deviation(const ComparedRow& row);
std::string ComparisonTable(const std::vector<ComparedRow>& rows);
Json ComparisonJson(const std::vector<ComparedRow>& rows);
std::string ComparisonHtml(const std::string& title, const std::vector<std::string>& notes,
                           const std::vector<ComparedRow>& rows);

// What the simulator says against what was measured on this machine.
struct MeasuredRow {
  std::string name, unit;
  double measured = 0, simulated = 0;
  double Deviation() const { return measured != 0 ? simulated / measured - 1 : 0; }
};
std::string MeasuredTable(const std::vector<MeasuredRow>& rows);
Json MeasuredJson(const std::vector<MeasuredRow>& rows);

}  // namespace elasticmoe::cli
