// What `bench resize` makes of its runs: one row a strategy, as JSON and as a table. Pure.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/json.h"
#include "cli/load_report.h"
#include "cli/load_run.h"
#include "cli/server_child.h"

namespace elasticmoe::cli {

// One strategy's run. Times are after the load's start.
struct ResizeRun {
  std::string strategy;
  std::string error;  // the server refused it, or it was aborted; then what follows may be missing
  LoadResult load;
  TimeNs asked_ns = 0;  // the resize was asked for
  TimeNs done_ns = 0;   // and reported as over
  double scaling_latency_ms = 0, first_capacity_ms = 0, total_ms = 0;
  double engine_pause_ms = 0;  // longest time between two steps, as the server says
  double copy_ms = 0;          // it spent on copies between domains
  std::uint64_t bytes_copied = 0;
  std::vector<MemorySample> memory;  // `at` after the load's start, too
};

struct ResizeRow {
  std::string strategy, error;
  double scaling_latency_ms = 0, first_capacity_ms = 0, total_ms = 0;
  double pause_ms = 0;         // longest time in which no client got a token, from the command on
  double usual_pause_ms = 0;   // the longest such time before the command, once the load was on
  double step_ms = 0;          // median time between two tokens of a request, before it
  double engine_pause_ms = 0;  // longest time between two steps
  int refused = 0;             // answered 429 or 503, or no connection
  int failed = 0;              // any other end but the whole answer
  // Tokens that clients got in the window after the command, over those of the undisturbed run in the same
  // time. Below one: some came late or never. Above: latecomers of before, or requests served faster.
  double during_throughput_ratio = 0;
  double after_throughput_ratio = 0;  // likewise, from its report until the last request
  double peak_memory_ratio = 0;       // over the larger of before and after
  std::uint64_t bytes_copied = 0;
  double copy_ms = 0;
  double copy_bytes_per_s = 0;
  double copy_ratio = 0;         // of what plain copies on an idle machine take for so many bytes; 0 = none
  double slo_attainment = 0;     // share of all requests
  bool tokens_identical = true;  // of all whole answers, with those of the undisturbed run
};

// Limits that an undisturbed server holds with room: five times its median TTFT, twice its median TPOT, both
// of the requests that ended before the command.
SloLimits DefaultLimits(const ResizeRun& run);

// `undisturbed`: the same requests at the same times without a resize; tokens of those that are missing there
// are not compared. `window_ns` is the same for all rows: what is compared is the service over the same time.
// `copy_bytes_per_s`: of those plain copies.
ResizeRow MakeRow(const ResizeRun& run, const LoadResult& undisturbed, const SloLimits& slo, TimeNs window_ns,
                  double copy_bytes_per_s = 0);

Json ToJson(const ResizeRow& row);
// Aligned, with scaling latencies as ratios to cold-restart's, where that is among the rows.
std::string ToTable(const std::vector<ResizeRow>& rows);

}  // namespace elasticmoe::cli
