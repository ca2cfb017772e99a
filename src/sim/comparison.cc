#include "sim/comparison.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

namespace elasticmoe::sim {
namespace {

constexpr double kMargin = 5;  // seconds round a transition

constexpr std::array<std::pair<Measure, std::string_view>, 14> kMeasures = {{
    {Measure::kLatency, "latency_s"},
    {Measure::kDowntime, "downtime_s"},
    {Measure::kPeak, "peak_gb"},
    {Measure::kWarmup, "warmup_s"},
    {Measure::kMoving, "moving_s"},
    {Measure::kBefore, "requests_s_before"},
    {Measure::kDuring, "requests_s_during"},
    {Measure::kAfter, "requests_s_after"},
    {Measure::kAttainment, "attainment"},
    {Measure::kAttainmentShare, "attainment_per_device"},
    {Measure::kMaxRate, "max_rate"},
    {Measure::kGoodput, "goodput"},
    {Measure::kJoules, "joules_per_token"},
    {Measure::kDevices, "mean_devices"},
}};

bool LessIsBetter(Measure measure) {
  return measure <= Measure::kMoving || measure == Measure::kJoules || measure == Measure::kDevices;
}

double EndedBetween(const CapacityResult& result, double from_s, double to_s) {
  if (to_s <= from_s) return 0;
  const auto count = std::ranges::count_if(
      result.each, [&](const CapacityRequest& one) { return one.end_s > from_s && one.end_s <= to_s; });
  return static_cast<double>(count) / (to_s - from_s);
}

CapacityInput InputOf(const ComparisonRow& row, ResizeStrategy strategy) {
  CapacityInput input = row.input;
  input.strategy = strategy;
  input.start_devices = row.from;
  if (row.at_s > 0) input.resizes = {{row.at_s, row.to}};
  return input;
}

}  // namespace

std::string_view ToString(Measure measure) {
  for (const auto& [one, name] : kMeasures)
    if (one == measure) return name;
  return "?";
}

Expected<Measure> ParseMeasure(std::string_view name) {
  std::string names;
  for (const auto& [one, text] : kMeasures) {
    if (text == name) return one;
    names += fmt::format("{}{}", names.empty() ? "" : ", ", text);
  }
  return Fail(ErrorCode::kInvalidArgument, "reading the measure: measure={} (one of {})", name, names);
}

Expected<ComparisonValue> Comparison::Evaluate(const ComparisonRow& row) {
  ComparisonValue out;
  EM_ASSIGN_OR_RETURN(out.simulated, Value(row, row.strategy, row.without));
  EM_ASSIGN_OR_RETURN(out.ours, Value(row, ResizeStrategy::kElastic, {}));
  if (row.against.empty() && row.against_static == 0) return out;
  EM_ASSIGN_OR_RETURN(const double best, Best(row));
  const double over = std::max(best, 1e-12);
  return ComparisonValue{out.simulated / over, out.ours / over};
}

Expected<double> Comparison::Best(const ComparisonRow& row) {
  std::optional<double> best;
  if (row.against_static > 0) {
    ComparisonRow still = row;
    still.input.policy.kind = core::PolicyKind::kStatic;
    still.from = still.to = row.against_static;
    still.at_s = 0;
    EM_ASSIGN_OR_RETURN(best, Value(still, ResizeStrategy::kElastic, {}));
  }
  for (const ResizeStrategy one : row.against) {
    EM_ASSIGN_OR_RETURN(const double value, Value(row, one, {}));
    if (!best || (LessIsBetter(row.measure) ? value < *best : value > *best)) best = value;
  }
  return *best;
}

Expected<double> Comparison::Value(const ComparisonRow& row, ResizeStrategy strategy,
                                   const Without& without) {
  if (row.measure <= Measure::kMoving) return OfResize(row, strategy, without);
  if (row.measure == Measure::kMaxRate) return MaxRate(row, strategy);
  return OfLoad(row, strategy);
}

Expected<double> Comparison::OfResize(const ComparisonRow& row, ResizeStrategy strategy,
                                      const Without& without) const {
  const int group = std::max(1, row.input.cluster.tensor_parallel);
  const int from = row.from / group;
  EM_ASSIGN_OR_RETURN(const ResizeCost cost, CostOfResize(InGroups(row.input.cluster), row.input.model,
                                                          strategy, from, row.to / group, from, without));
  switch (row.measure) {
    case Measure::kDowntime:
      return cost.downtime_s;
    case Measure::kPeak:
      return cost.peak_bytes * 1e-9;
    case Measure::kWarmup:
      return cost.warmup_s;
    case Measure::kMoving:
      return cost.copy_s + cost.load_s;
    default:
      return cost.latency_s;
  }
}

Expected<double> Comparison::OfLoad(const ComparisonRow& row, ResizeStrategy strategy) {
  if (row.input.requests.empty())
    return Fail(ErrorCode::kInvalidArgument, "comparing: row '{}' measures {} without a workload", row.name,
                ToString(row.measure));
  const std::string key = fmt::format("{}/{}/{}/{}/{}/{}", row.key, ToString(strategy), row.from, row.to,
                                      row.at_s, core::ToString(row.input.policy.kind));
  if (!runs_.contains(key)) {
    EM_ASSIGN_OR_RETURN(runs_[key], RunCapacity(InputOf(row, strategy)));
  }
  const CapacityResult& result = runs_[key];
  const int group = std::max(1, row.input.cluster.tensor_parallel);
  const double longest = StartSeconds(InGroups(row.input.cluster), row.input.model, row.to / group);
  const double over = row.at_s + longest + kMargin;
  const double devices = result.duration_s > 0 ? result.device_s / result.duration_s : 0;
  double met_tokens = 0;
  int after = 0, after_met = 0;
  for (std::size_t i = 0; i < result.each.size(); ++i) {
    const SimRequest& asked = row.input.requests[i];
    if (result.each[i].met) met_tokens += asked.output_tokens;
    if (static_cast<double>(asked.at_ns) * 1e-9 < row.at_s) continue;
    ++after;
    after_met += result.each[i].met;
  }
  const double attainment = after > 0 ? 100.0 * after_met / after : 0;
  switch (row.measure) {
    case Measure::kBefore:
      return EndedBetween(result, row.at_s / 2, row.at_s - kMargin);
    case Measure::kDuring:
      return EndedBetween(result, row.at_s - kMargin, over);
    case Measure::kAfter:
      return EndedBetween(result, over + row.at_s / 2, over + row.at_s);
    case Measure::kAttainment:
      return attainment;
    case Measure::kAttainmentShare:
      return attainment / std::max(devices, 1e-9);
    case Measure::kGoodput:
      return met_tokens / std::max(result.duration_s, 1e-9);
    case Measure::kJoules:
      return result.joules / std::max(result.output_tokens, 1.0);
    default:
      return devices;
  }
}

// The workload's arrivals, faster or slower, by bisection to a fiftieth.
Expected<double> Comparison::MaxRate(const ComparisonRow& row, ResizeStrategy strategy) const {
  if (row.input.requests.size() < 2)
    return Fail(ErrorCode::kInvalidArgument, "comparing: row '{}' measures {} without a workload", row.name,
                ToString(row.measure));
  const double span_s = static_cast<double>(row.input.requests.back().at_ns) * 1e-9;
  const double rate = static_cast<double>(row.input.requests.size()) / std::max(span_s, 1e-9);
  const auto holds = [&](double speed) -> Expected<bool> {
    CapacityInput input = InputOf(row, strategy);
    // The same seconds of load whatever the rate: requests again and again from the list.
    input.requests.clear();
    for (std::size_t i = 0;; ++i) {
      const SimRequest& one = row.input.requests[i % row.input.requests.size()];
      const double round = static_cast<double>(i / row.input.requests.size());
      const double at = (static_cast<double>(one.at_ns) * 1e-9 + round * span_s) / speed;
      if (at > span_s) break;
      input.requests.push_back({static_cast<TimeNs>(at * 1e9), one.prompt_tokens, one.output_tokens});
    }
    EM_ASSIGN_OR_RETURN(const CapacityResult result, RunCapacity(input));
    return result.attainment >= input.policy.slo.attainment;
  };
  double low = 0, high = 1;
  for (; high < 256; high *= 2) {
    EM_ASSIGN_OR_RETURN(const bool ok, holds(high));
    if (!ok) break;
    low = high;
  }
  while (high - low > 0.02 * high && high > 1e-2) {
    const double middle = (low + high) / 2;
    EM_ASSIGN_OR_RETURN(const bool ok, holds(middle));
    (ok ? low : high) = middle;
  }
  return low * rate;
}

}  // namespace elasticmoe::sim
