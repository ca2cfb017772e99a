// A published table or figure beside the simulator: one row a number, with what the simulator says of the
// published design and what it says of ours on the same hardware. Pure.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "sim/capacity.h"

namespace elasticmoe::sim {

enum class Measure {
  // of a resize alone
  kLatency,   // seconds from the command to the new size serving, drain not counted
  kDowntime,  // seconds in which nothing serves
  kPeak,      // GB of all devices together
  kWarmup,    // seconds
  kMoving,    // seconds of copies and loading
  // of a load with a resize in it
  kBefore,           // requests ended a second,
  kDuring,           // from 5 s before the longest transition (a cold restart) to 5 s after it,
  kAfter,            //
  kAttainment,       // percent of the requests that came after the command, within both limits
  kAttainmentShare,  // the same over the devices paid for on average
  kMaxRate,          // highest rate of requests whose attainment holds the goal
  kGoodput,          // output tokens a second of requests within both limits
  kJoules,           // of an output token
  kDevices           // paid for, mean
};
std::string_view ToString(Measure measure);
Expected<Measure> ParseMeasure(std::string_view name);

struct ComparisonRow {
  std::string name;
  std::string unit;
  std::optional<double> published;
  std::string bound;    // ">=" or "<=": the number is published as a bound
  bool fitted = false;  // the profile was made to match it: no prediction
  Measure measure = Measure::kLatency;
  ResizeStrategy strategy = ResizeStrategy::kElasticPaper;
  Without without;
  std::vector<ResizeStrategy> against;  // not empty: the value over the best of these
  int against_static = 0;               // > 0: the value over what that many devices do, always the same
  CapacityInput input;                  // strategy, start_devices and resizes are set from what stands here
  std::string key;                      // of the workload: rows with the same key share runs
  int from = 1, to = 1;
  double at_s = 0;  // of the command; 0 = none is given, the policy decides
};

struct ComparisonValue {
  double simulated = 0;
  double ours = 0;
};

class Comparison {
 public:
  // Errors of RunCapacity and CostOfResize. kInvalidArgument where a measure wants a load and none is there.
  Expected<ComparisonValue> Evaluate(const ComparisonRow& row);

 private:
  Expected<double> Value(const ComparisonRow& row, ResizeStrategy strategy, const Without& without);
  Expected<double> OfResize(const ComparisonRow& row, ResizeStrategy strategy, const Without& without) const;
  Expected<double> OfLoad(const ComparisonRow& row, ResizeStrategy strategy);
  Expected<double> MaxRate(const ComparisonRow& row, ResizeStrategy strategy) const;
  Expected<double> Best(const ComparisonRow& row);

  std::map<std::string, CapacityResult> runs_;
};

}  // namespace elasticmoe::sim
