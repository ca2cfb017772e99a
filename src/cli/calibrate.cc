// elasticmoe calibrate: a profile of this machine for the simulator.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>

#include "base/file.h"
#include "cli/calibration.h"
#include "cli/client.h"
#include "cli/command.h"
#include "cli/scenario.h"

namespace elasticmoe::cli {
namespace {

constexpr char kCommand[] = "calibrate";

int Run(const CalibrationOptions& options, const std::string& output, bool json) {
  const auto say = [&](const std::string& what) { std::fprintf(stderr, "%s\n", what.c_str()); };
  const auto calibration = Calibrate(options, say);
  if (!calibration) return Complain(kCommand, calibration.error());
  const Json profile = ProfileJson(calibration->profile);
  if (!output.empty())
    if (const Status written = WriteFile(output, profile.dump(2) + "\n"); !written)
      return Complain(kCommand, written.error());
  if (json) {
    std::printf("%s\n", profile.dump(2).c_str());
    return 0;
  }
  std::printf("%-32s %12s %12s\n", "step", "measured ms", "fitted ms");
  for (const CalibrationPoint& one : calibration->points)
    std::printf("%-32s %12.3f %12.3f\n", one.what.c_str(), one.measured_s * 1e3, one.fitted_s * 1e3);
  const sim::ClusterProfile& p = calibration->profile;
  std::printf(
      "  %-28s %10.1f GB/s\n  %-28s %10.3f s\n  %-28s %10.1f ms\n  %-28s %10.2f ms\n  %-28s %10.0f %%\n",
      "memory, one thread", p.memory_bytes_s * 1e-9, "server start, weights included", p.boot_s,
      "a device joins", p.attach_s * 1e3, "a request outside of steps", p.request_s * 1e3,
      "worst deviation of the fit", calibration->WorstDeviation() * 100);
  if (!output.empty()) std::printf("written to %s\n", output.c_str());
  return 0;
}

}  // namespace

void RegisterCalibrate(CLI::App& app, Action& action) {
  auto options = std::make_shared<CalibrationOptions>();
  auto output = std::make_shared<std::string>();
  auto json = std::make_shared<bool>(false);
  CLI::App* sub = app.add_subcommand("calibrate", "Measure this machine with a model, for simulate");
  sub->footer(
      "Example:\n  elasticmoe calibrate --model models/demo --output cpu.json\nA scenario names the file: "
      "\"cluster\": {\"profile\": \"cpu.json\", \"devices\": 8}.\nIt starts a server and loads it for a "
      "minute; "
      "other work on the machine spoils the figures.");
  sub->add_option("--model", options->model, "Model directory")->required()->check(CLI::ExistingDirectory);
  sub->add_option("--output", *output, "Write the profile to this file");
  sub->add_option("--devices", options->devices, "Most devices that are measured")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  sub->add_option("--threads-per-device", options->threads_per_device)
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  sub->add_option("--rounds", options->rounds, "Rounds of every measurement; their medians count")
      ->check(CLI::Range(1, 100))
      ->capture_default_str();
  sub->add_flag("--domain-per-device", options->domain_per_device, "A memory domain a device");
  sub->add_option("--serve-flag", options->serve_flags, "Passed on to serve");
  sub->add_flag("--json", *json, "The profile on stdout instead of the table");
  sub->callback([&action, options, output, json] {
    action = [options, output, json] { return Run(*options, *output, *json); };
  });
}

}  // namespace elasticmoe::cli
