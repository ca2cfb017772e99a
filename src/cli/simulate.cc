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
  show("coordinator deaths", report.coordinator_deaths);
  show("requests asked again", report.requests_again);
  show("KV memory shrunk", report.kv_shrinks);
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
  std::string html, trace;
  bool json = false;
};

// Sizes of a static cluster that are looked at where no run held the goal: the ends and some between.
constexpr int kSizesTried = 5;

int Refuse(const Error& error) {
  std::fprintf(stderr, "elasticmoe: %s\n", error.message.c_str());
  return 2;
}

Status WritePage(const std::string& file, const std::string& page) {
  if (file.empty()) return {};
  std::ofstream out(file);
  out << page;
  if (!out.flush())
    return Fail(ErrorCode::kInvalidArgument, "writing the report: html={} cannot be written", file);
  return {};
}

// Where no run holds the goal: does any size? kFailedPrecondition says that none does, and the best possible.
Status CheckGoal(const std::vector<ScenarioRun>& asked, const std::vector<NamedRun>& runs) {
  const sim::CapacityInput& first = asked.front().input;
  const double goal = first.policy.slo.attainment;
  double best = -1;
  int best_size = 0;
  for (std::size_t i = 0; i < runs.size(); ++i) {
    const sim::CapacityResult& result = runs[i].result;
    if (result.attainment >= goal) return {};
    if (result.attainment <= best) continue;
    best = result.attainment;
    best_size = asked[i].input.start_devices;
    for (const sim::CapacityResize& one : result.resizes) best_size = std::max(best_size, one.decision.to);
  }
  const int step = std::max(first.policy.step_devices, first.cluster.tensor_parallel);
  const int least = std::max(first.policy.min_devices, runs.front().result.least_devices);
  const int most = first.policy.max_devices / step * step;
  std::string why;
  int last = 0;
  for (int i = kSizesTried; i >= 0; --i) {
    const int size = std::max(step, (least + (most - least) * i / kSizesTried) / step * step);
    if (size == last) continue;
    last = size;
    sim::CapacityInput input = first;
    input.policy.kind = core::PolicyKind::kStatic;
    input.strategy = sim::ResizeStrategy::kElastic;
    input.start_devices = size;
    input.resizes.clear();
    // What one request alone would see bounds what any load sees.
    const double alone = sim::AloneAttainment(input, size);
    if (alone <= best) continue;
    EM_ASSIGN_OR_RETURN(const sim::CapacityResult result, sim::RunCapacity(input));
    if (result.attainment >= goal) return {};
    if (result.attainment > best) best = result.attainment, best_size = size;
  }
  return Fail(
      ErrorCode::kFailedPrecondition,
      "no size holds the goal: attainment={:.2f} % at best, with up to {} devices (limit={:.2f} % of "
      "requests within ttft_s={} and tpot_s={}, sizes {} to {}); loosen slo, raise max_devices or lower "
      "the load",
      best * 100, best_size, goal * 100, first.policy.slo.ttft_s, first.policy.slo.tpot_s, least, most);
}

int RunComparison(const Scenario& scenario, const ScenarioOptions& options) {
  sim::Comparison comparison;
  std::vector<ComparedRow> rows;
  for (const sim::ComparisonRow& row : scenario.rows) {
    auto value = comparison.Evaluate(row);
    if (!value) return Refuse(Within("row '" + row.name + "'", value.error()).value());
    rows.push_back({row, *value});
  }
  if (const Status written = WritePage(options.html, ComparisonHtml(scenario.name, scenario.notes, rows));
      !written)
    return Refuse(written.error());
  if (options.json) {
    const Json out = {{"name", scenario.name}, {"notes", scenario.notes}, {"rows", ComparisonJson(rows)}};
    std::printf("%s\n", DumpJson(out).c_str());
    return 0;
  }
  std::printf("%s\n%s", scenario.name.c_str(), ComparisonTable(rows).c_str());
  for (const std::string& note : scenario.notes) std::printf("%s\n", note.c_str());
  return 0;
}

// Bad input is 2, as for flags; so is a goal that no size holds, after the results.
int RunScenario(const ScenarioOptions& options) {
  auto scenario = ReadScenario(options.file, options.trace);
  if (!scenario) return Refuse(scenario.error());
  if (!scenario->rows.empty()) return RunComparison(*scenario, options);
  std::vector<NamedRun> runs;
  for (const ScenarioRun& one : scenario->runs) {
    auto result = sim::RunCapacity(one.input);
    if (!result) return Refuse(result.error());
    runs.push_back({one.name, std::move(*result)});
  }
  if (const Status written = WritePage(options.html, CapacityHtml(scenario->name, runs)); !written)
    return Refuse(written.error());
  const Status goal = CheckGoal(scenario->runs, runs);
  if (options.json) {
    Json out = {{"name", scenario->name}, {"runs", CapacityJson(runs)}};
    if (!goal) out["error"] = goal.error().message;
    std::printf("%s\n", DumpJson(out).c_str());
  } else {
    std::printf("%s\n%s", scenario->name.c_str(), CapacityTable(runs).c_str());
    for (const std::string& note : scenario->notes) std::printf("%s\n", note.c_str());
  }
  return goal ? 0 : Refuse(goal.error());
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
      "scenarios/paper/table1.json\n  elasticmoe simulate --seeds 10000\nExit codes: 0, 1 a seed broke a "
      "promise, "
      "2 bad input, a model that does not fit, or no size holds the goal.");
  CLI::Option* file =
      sub->add_option("scenario", scenario->file, "JSON file; none: randomized faults, by seed");
  sub->add_option("--replay", scenario->trace, "Replay this CSV instead of the scenario's trace")
      ->needs(file)
      ->check(CLI::ExistingFile);
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
