// What a load run comes to: percentiles, rates, errors by kind, SLO attainment; as JSON and as a table. Pure.
#pragma once

#include <map>
#include <optional>
#include <string>

#include "base/json.h"
#include "cli/load_run.h"
#include "cli/samples.h"

namespace elasticmoe::cli {

// A request meets the SLO when it completes and keeps each limit that is given.
struct SloLimits {
  std::optional<double> ttft_ms;
  std::optional<double> tpot_ms;
};

struct LoadReport {
  std::uint64_t requests = 0, completed = 0, failed = 0, cancelled = 0;  // requests: all that were due
  double duration_s = 0;
  std::uint64_t input_tokens = 0, output_tokens = 0;  // of completed requests
  Samples ttft_ms, tpot_ms, itl_ms, e2e_ms;           // of completed requests
  std::map<std::string, std::uint64_t> errors;        // by kind
  std::map<std::string, std::string> first_error;     // by kind, its message
  std::optional<std::uint64_t> slo_met;               // where limits were given
  SloLimits slo;
  double client_cpu_s = 0;
  bool interrupted = false;
};

LoadReport Summarize(const LoadResult& result, const SloLimits& slo);

// The keys that programs read; `about` (what was asked) is put in as "config".
Json ToJson(LoadReport& report, Json about);
// Lines for people, aligned.
std::string ToTable(LoadReport& report, const std::string& title);

// One JSON object a line and request, in their order: {"index", "input_tokens", "token_ids"} or "text" where
// the server gave no ids, or {"index", "failed"}. Equal files = equal answers.
std::string OutputLines(const LoadResult& result);

}  // namespace elasticmoe::cli
