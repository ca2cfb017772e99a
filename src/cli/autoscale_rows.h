// What `bench autoscale` makes of its runs: one row a way to scale; as a table, as JSON, and as an HTML page
// with curves. Pure.
#pragma once

#include <string>
#include <vector>

#include "base/json.h"
#include "cli/load_report.h"
#include "cli/load_run.h"

namespace elasticmoe::cli {

// The server's own figures, a few times a second. `at_s` is after the load's start.
struct AutoscaleSample {
  double at_s = 0;
  double devices = 0;
  double running = 0, waiting = 0;
  double device_s = 0;  // counters, since the server's start
  double joules = 0;
};

struct AutoscaleRun {
  std::string name;
  LoadResult load;
  std::vector<AutoscaleSample> samples;  // first: at the load's start; last: after its end
  bool joules_measured = false;          // else by the power model
  Json decisions = Json::array();        // those of the server that were applied, oldest first
};

// Times in which requests come faster than usual, in seconds after the start, ascending.
struct Burst {
  double from_s = 0, to_s = 0;
};
// Bins of `bin_s` with more than one and a half times the arrivals of the median bin; bursts less than five
// bins apart are one.
std::vector<Burst> FindBursts(const std::vector<double>& arrivals_s, double bin_s);

struct AutoscaleRow {
  std::string name;
  std::size_t requests = 0, whole = 0, failed = 0;
  double attainment = 0;        // share of all requests within both limits
  double burst_attainment = 0;  // of those that came in bursts; 1 without any
  double ttft_p50_ms = 0, ttft_p99_ms = 0, tpot_p50_ms = 0, tpot_p99_ms = 0;  // of whole ones
  double device_s = 0, joules = 0;  // from the load's start to the last answer
  double joules_per_token = 0, device_s_per_request = 0;
  double worst_gap_ms = 0;  // longest time in which somebody waited and nobody got a token
  int resizes = 0;
  int rebalances = 0;            // hot experts changed place, at the same size
  double resizes_per_burst = 0;  // 0 without any
};

AutoscaleRow MakeRow(const AutoscaleRun& run, const SloLimits& slo, const std::vector<Burst>& bursts);
Json ToJson(const AutoscaleRow& row);
std::string ToTable(const std::vector<AutoscaleRow>& rows);
// Curves of arrivals, size, queue, TTFT and attainment over time, and why the size was changed.
std::string AutoscaleHtml(const std::string& title, const std::vector<AutoscaleRun>& runs,
                          const std::vector<AutoscaleRow>& rows, const SloLimits& slo,
                          const std::vector<Burst>& bursts);

}  // namespace elasticmoe::cli
