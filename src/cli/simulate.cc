// elasticmoe simulate: without a scenario, scheduler, planner, resize machine and recovery under faults by
// seed; with one, what a cluster would do with a workload. No process is started.
#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <memory>

#include "cli/capacity_report.h"
#include "cli/command.h"
#include "cli/scenario.h"
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

struct ScenarioOptions {
  std::string file;
  std::string html;
  bool json = false;
};

// Bad input is 2, as for flags.
int RunScenario(const ScenarioOptions& options) {
  const auto refuse = [](const Error& error) {
    std::fprintf(stderr, "elasticmoe: %s\n", error.message.c_str());
    return 2;
  };
  auto scenario = ReadScenario(options.file);
  if (!scenario) return refuse(scenario.error());
  std::vector<NamedRun> runs;
  for (const ScenarioRun& one : scenario->runs) {
    auto result = sim::RunCapacity(one.input);
    if (!result) return refuse(result.error());
    runs.push_back({one.name, std::move(*result)});
  }
  if (!options.html.empty()) {
    std::ofstream page(options.html);
    page << CapacityHtml(scenario->name, runs);
    if (!page.flush())
      return refuse(
          {ErrorCode::kInvalidArgument, "writing the report: html=" + options.html + " cannot be written"});
  }
  if (options.json)
    std::printf("%s\n", DumpJson(Json{{"name", scenario->name}, {"runs", CapacityJson(runs)}}).c_str());
  else
    std::printf("%s\n%s", scenario->name.c_str(), CapacityTable(runs).c_str());
  return 0;
}

}  // namespace

void RegisterSimulate(CLI::App& app, Action& action) {
  auto options = std::make_shared<sim::SimulationOptions>();
  options->seeds = 1000;
  auto scenario = std::make_shared<ScenarioOptions>();
  CLI::App* sub =
      app.add_subcommand("simulate", "Run the deciding code in virtual time: a scenario, or faults by seed");
  sub->footer(
      "Examples:\n  elasticmoe simulate scenarios/burst.json --html burst.html\n  elasticmoe simulate "
      "--seeds 10000");
  CLI::Option* file =
      sub->add_option("scenario", scenario->file, "JSON file; none: randomized faults, by seed");
  sub->add_flag("--json", scenario->json, "Print the results of the scenario as JSON")->needs(file);
  sub->add_option("--html", scenario->html, "Write the scenario's curves to this file")->needs(file);
  sub->add_option("--seeds", options->seeds, "How many")
      ->check(CLI::PositiveNumber)
      ->capture_default_str()
      ->excludes(file);
  sub->add_option("--seed", options->first_seed, "The first one")->capture_default_str()->excludes(file);
  sub->add_flag("--trace", options->trace, "Print what happened in the last seed")->excludes(file);
  sub->callback([&action, options, scenario] {
    action = [options, scenario] { return scenario->file.empty() ? Run(*options) : RunScenario(*scenario); };
  });
}

}  // namespace elasticmoe::cli
