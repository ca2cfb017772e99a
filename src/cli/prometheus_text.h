// The Prometheus text exposition format (0.0.4), read. Pure; foreign bytes may be anything.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"

namespace elasticmoe::cli {

struct MetricSample {
  std::string name;
  std::map<std::string, std::string> labels;
  double value = 0;  // may be NaN or infinite
};

// Comments and timestamps are left out. kInvalidArgument names the line.
Expected<std::vector<MetricSample>> ParsePrometheusText(std::string_view text);

// Sum of the samples called `name`, whatever their labels; nullopt where there is none.
std::optional<double> SumOf(const std::vector<MetricSample>& samples, std::string_view name);

}  // namespace elasticmoe::cli
