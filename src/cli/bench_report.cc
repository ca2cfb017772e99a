#include "cli/bench_report.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <fstream>

#include "base/check.h"
#include "base/file.h"
#include "cli/client.h"

namespace elasticmoe::cli {
namespace {

// The model name of the first core that /proc/cpuinfo shows.
std::string CpuName() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const std::size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown processor";
}

}  // namespace

double MachineLimits::Seconds(const Work& work) const {
  const double reading = bytes_per_s > 0 ? work.bytes / bytes_per_s : 0;
  return operations_per_s > 0 ? std::max(reading, work.operations / operations_per_s) : reading;
}

void MachineLimits::Raise(const MachineLimits& other) {
  kernels = other.kernels;
  weights = other.weights;
  threads = other.threads;
  bytes_per_s = std::max(bytes_per_s, other.bytes_per_s);
  operations_per_s = std::max(operations_per_s, other.operations_per_s);
}

MachineLimits MeasureLimits(const compute::Kernels& kernels, core::WeightFormat weights,
                            compute::ThreadPool& threads, const compute::ReadProbe& probe) {
  return {std::string(kernels.name), weights, threads.Size(), probe.BytesPerSecond(threads),
          compute::DotPeak(kernels, weights, threads)};
}

std::string Describe(const MachineLimits& limits) {
  std::string text = fmt::format("{}, {} thread{}: reads {:.1f} GB/s", CpuName(), limits.threads,
                                 limits.threads == 1 ? "" : "s", limits.bytes_per_s / 1e9);
  if (limits.operations_per_s > 0)
    text += fmt::format(", {} {:.0f} {}", limits.kernels, limits.operations_per_s / 1e9,
                        limits.weights == core::WeightFormat::kBf16 ? "GFLOP/s" : "GOP/s of int8");
  return text;
}

Json ToJson(const MachineLimits& limits) {
  return {{"cpu", CpuName()},
          {"threads", limits.threads},
          {"kernels", limits.kernels},
          {"weights", core::NameOf(limits.weights)},
          {"read_gb_per_s", limits.bytes_per_s / 1e9},
          {"dot_gflop_per_s", limits.operations_per_s > 0 ? Json(limits.operations_per_s / 1e9) : Json()},
          {"version", ELASTICMOE_VERSION}};
}

Json RatesOf(const Work& work, double seconds, const MachineLimits& limits) {
  const double operations = work.operations / seconds, bytes = work.bytes / seconds;
  Json json = {{"ms", seconds * 1e3}, {"gflop_per_s", operations / 1e9}, {"gb_per_s", bytes / 1e9}};
  json["of_peak"] = limits.operations_per_s > 0 ? Json(operations / limits.operations_per_s) : Json();
  json["of_bandwidth"] = limits.bytes_per_s > 0 ? Json(bytes / limits.bytes_per_s) : Json();
  json["limit_fraction"] = limits.Seconds(work) / seconds;
  return json;
}

void AddReportFlags(CLI::App& app, ReportFlags& flags) {
  app.add_flag("--json", flags.json, "JSON on stdout instead of the table");
  app.add_option("--output", flags.output, "Write the JSON to this file too");
}

std::string AlignColumns(const std::vector<std::vector<std::string>>& rows) {
  std::vector<std::size_t> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string text;
  for (const auto& row : rows) {
    std::string line = "  ";
    for (std::size_t i = 0; i < row.size(); ++i)
      line += i == 0 ? fmt::format("{:<{}}", row[i], widths[i]) : fmt::format("  {:>{}}", row[i], widths[i]);
    text += line.substr(0, line.find_last_not_of(' ') + 1) + "\n";
  }
  return text;
}

int Report(const ReportFlags& flags, const char* command, const MachineLimits& limits, const Json& rows,
           const std::string& table) {
  const Json json = {{"bench", command}, {"machine", ToJson(limits)}, {"rows", rows}};
  std::fputs(flags.json ? (json.dump(2) + "\n").c_str() : table.c_str(), stdout);
  if (flags.output.empty()) return 0;
  const Status written = WriteFile(flags.output, json.dump(2) + "\n");
  return written ? 0 : Complain(command, written.error());
}

double Median(std::vector<double> values) {
  EM_CHECK(!values.empty());
  std::sort(values.begin(), values.end());
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

}  // namespace elasticmoe::cli
