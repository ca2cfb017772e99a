// What the benchmarks of this machine share: its limits, measured in the same run, and how results are
// written. A row of the JSON has "name", "value" and "unit" (more is better), and, where there is a limit,
// "limit_fraction"; bench/compare reads those.
#pragma once

#include <string>
#include <vector>

#include "base/error.h"
#include "base/json.h"
#include "cli/bench_forward.h"
#include "compute/kernels.h"
#include "compute/limits.h"
#include "compute/parallel.h"
#include "core/weight_format.h"

namespace CLI {
class App;
}

namespace elasticmoe::cli {

struct MachineLimits {
  std::string kernels;
  core::WeightFormat weights = core::WeightFormat::kBf16;
  int threads = 0;
  double bytes_per_s = 0;       // read, all threads together
  double operations_per_s = 0;  // of the table's dot product; 0 = unknown

  // The least time for that work: both can overlap, so the longer of the two.
  double Seconds(const Work& work) const;
  void Raise(const MachineLimits& other);  // the better of each
};

// On all threads of the pool, half a second.
MachineLimits MeasureLimits(const compute::Kernels& kernels, core::WeightFormat weights,
                            compute::ThreadPool& threads, const compute::ReadProbe& probe);

// "Intel(R) Xeon(R) ..., 2 threads: reads 62.1 GB/s, amxbf16 3012 GFLOP/s"
std::string Describe(const MachineLimits& limits);
// {"cpu", "threads", "kernels", "weights", "read_gb_per_s", "dot_gflop_per_s", "version"}
Json ToJson(const MachineLimits& limits);

// Rates and fractions of the limits for `work` done in `seconds`: "ms", "gflop_per_s", "gb_per_s", "of_peak",
// "of_bandwidth", "limit_fraction".
Json RatesOf(const Work& work, double seconds, const MachineLimits& limits);

struct ReportFlags {
  bool json = false;
  std::string output;
};
void AddReportFlags(CLI::App& app, ReportFlags& flags);

// Columns aligned, the first to the left, others to the right; row 0 = the heads.
std::string AlignColumns(const std::vector<std::vector<std::string>>& rows);

// {"bench": name, "machine", "rows"} as asked: on stdout, or `table` there; and to the output file.
// The exit code.
int Report(const ReportFlags& flags, const char* command, const MachineLimits& limits, const Json& rows,
           const std::string& table);

double Median(std::vector<double> values);  // REQUIRES: not empty

}  // namespace elasticmoe::cli
