// elasticmoe simulate: scheduler, planner, resize machine and recovery under faults by seed, no process
// started.
#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <memory>

#include "cli/command.h"
#include "sim/simulate.h"

namespace elasticmoe::cli {
namespace {

int Run(const sim::SimulationOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  const sim::SimulationReport report = sim::Simulate(options);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  for (const std::string& line : report.trace) std::printf("%s\n", line.c_str());
  const auto show = [](const char* what, std::uint64_t count) {
    std::printf("  %-20s %12llu\n", what, static_cast<unsigned long long>(count));
  };
  std::printf("%d seeds from %llu in %.1f s: %d failed; hash %016llx\n", report.seeds,
              static_cast<unsigned long long>(options.first_seed), seconds, report.failed,
              static_cast<unsigned long long>(report.hash));
  show("events", report.events);
  show("steps", report.steps);
  show("steps given up", report.steps_abandoned);
  show("requests", report.requests);
  show("tokens", report.tokens);
  show("preemptions", report.preemptions);
  show("sequences moved", report.sequences_moved);
  show("resizes done", report.resizes_done);
  show("resizes rolled back", report.resizes_aborted);
  show("worker deaths", report.worker_deaths);
  show("memory deaths", report.memory_deaths);
  show("messages lost", report.messages_lost);
  if (report.failed == 0) return 0;
  std::fprintf(
      stderr,
      "elasticmoe: seed %llu: %s\nreplay it with: elasticmoe simulate --seed %llu --seeds 1 --trace\n",
      static_cast<unsigned long long>(report.failed_seed), report.failure.c_str(),
      static_cast<unsigned long long>(report.failed_seed));
  return 1;
}

}  // namespace

void RegisterSimulate(CLI::App& app, Action& action) {
  auto options = std::make_shared<sim::SimulationOptions>();
  options->seeds = 1000;
  CLI::App* sub = app.add_subcommand("simulate", "Run the deciding code through faults, by seed");
  sub->footer("Example:\n  elasticmoe simulate --seeds 10000");
  sub->add_option("--seeds", options->seeds, "How many")->check(CLI::PositiveNumber)->capture_default_str();
  sub->add_option("--seed", options->first_seed, "The first one")->capture_default_str();
  sub->add_flag("--trace", options->trace, "Print what happened in the last seed");
  sub->callback([&action, options] { action = [options] { return Run(*options); }; });
}

}  // namespace elasticmoe::cli
