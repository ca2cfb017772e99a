// elasticmoe bench simulator: the same load measured on this machine and simulated with a profile of it.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>

#include "cli/calibration.h"
#include "cli/capacity_report.h"
#include "cli/client.h"
#include "cli/command.h"
#include "cli/load_plan.h"

namespace elasticmoe::cli {
namespace {

constexpr char kCommand[] = "bench simulator";

struct Options {
  CalibrationOptions machine;
  double load = 0.5;   // of what the size can do
  double seconds = 8;  // of load at a size, a round
  int input_tokens = 64;
  int output_tokens = 64;
  double goal = 0.15;
  bool json = false;
};

void Say(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
}

// The same in every round, and other ones at each size.
Arrivals ArrivalsAt(int devices, double per_s, double seconds) {
  return Arrivals::Poisson({{per_s, seconds}}, static_cast<std::uint64_t>(devices));
}

// What a size did under load, a sample a round.
struct Loaded {
  double requests_s = 0;  // of the Poisson arrivals: the first round's, so that all rounds get the same
  Samples full_tokens_s, tokens_s, ttft_ms, tpot_ms;
};

// All at once, for the most that it can do; then Poisson arrivals at a share of it.
constexpr int kAtOnce = 16, kRequestsAtOnce = 6 * kAtOnce;

Status Load(const Options& options, int devices, MeasuredServer& server, Loaded& out) {
  EM_ASSIGN_OR_RETURN(const LoadReport full,
                      server.Closed(options.input_tokens, options.output_tokens, kAtOnce, kRequestsAtOnce));
  out.full_tokens_s.Add(static_cast<double>(full.output_tokens) / full.duration_s);
  if (out.requests_s == 0)
    out.requests_s = options.load * static_cast<double>(full.completed) / full.duration_s;
  EM_ASSIGN_OR_RETURN(LoadReport seen, server.Open(options.input_tokens, options.output_tokens,
                                                   ArrivalsAt(devices, out.requests_s, options.seconds)));
  out.tokens_s.Add(static_cast<double>(seen.output_tokens) / seen.duration_s);
  out.ttft_ms.Add(seen.ttft_ms.Percentile(50));
  out.tpot_ms.Add(seen.tpot_ms.Percentile(50));
  return {};
}

// The same in the simulator.
Status Compare(const Options& options, const Calibration& calibration, const sim::ModelShape& model,
               int devices, Loaded& seen, std::vector<MeasuredRow>& rows) {
  sim::CapacityInput input{.cluster = calibration.profile, .model = model};
  input.cluster.memory_bytes = 1e13;  // what fits is not the question here
  input.policy.kind = core::PolicyKind::kStatic;
  input.policy.max_devices = options.machine.devices;
  input.max_running = 128;  // serve's
  input.start_devices = devices;
  Arrivals arrivals = ArrivalsAt(devices, seen.requests_s, options.seconds);
  while (const auto at = arrivals.Next())
    input.requests.push_back({*at, options.input_tokens, options.output_tokens});
  EM_ASSIGN_OR_RETURN(const sim::CapacityResult simulated, sim::RunCapacity(input));
  // A closed loop's throughput: as many at once, again and again.
  input.requests.clear();
  for (int i = 0; i < kRequestsAtOnce; ++i)
    input.requests.push_back({0, options.input_tokens, options.output_tokens});
  input.max_running = kAtOnce;
  EM_ASSIGN_OR_RETURN(const sim::CapacityResult closed, sim::RunCapacity(input));
  const std::string at = fmt::format("{} device{}", devices, devices == 1 ? "" : "s");
  const double load_percent = options.load * 100;
  rows.push_back({fmt::format("{}: output, {} at a time", at, kAtOnce), "tokens/s",
                  seen.full_tokens_s.Percentile(50), closed.output_tokens / closed.duration_s});
  rows.push_back({fmt::format("{}: output at {:.0f} % load", at, load_percent), "tokens/s",
                  seen.tokens_s.Percentile(50), simulated.output_tokens / simulated.duration_s});
  rows.push_back({fmt::format("{}: TTFT p50 at {:.0f} % load", at, load_percent), "ms",
                  seen.ttft_ms.Percentile(50), simulated.ttft_p50_s * 1e3});
  rows.push_back({fmt::format("{}: TPOT p50 at {:.0f} % load", at, load_percent), "ms",
                  seen.tpot_ms.Percentile(50), simulated.tpot_p50_s * 1e3});
  return {};
}

Expected<std::vector<MeasuredRow>> Measure(const Options& options) {
  EM_ASSIGN_OR_RETURN(const sim::ModelShape model, ModelShapeOf(options.machine.model));
  std::vector<Loaded> seen(options.machine.devices);
  EM_ASSIGN_OR_RETURN(const Calibration calibration,
                      Calibrate(options.machine, Say, [&](MeasuredServer& server, int devices, int) {
                        return Load(options, devices, server, seen[devices - 1]);
                      }));
  Say(fmt::format("the fit deviates by {:.0f} % at most", calibration.WorstDeviation() * 100));
  std::vector<MeasuredRow> rows;
  for (int devices = 1; devices <= options.machine.devices; ++devices)
    EM_RETURN_IF_ERROR(Compare(options, calibration, model, devices, seen[devices - 1], rows));
  // A first growth, as the calibrated one was: of another server.
  if (options.machine.devices > 1) {
    EM_ASSIGN_OR_RETURN(const auto server, MeasuredServer::Start(options.machine));
    EM_ASSIGN_OR_RETURN(LoadReport warm, server->Closed(options.input_tokens, options.output_tokens, 4, 16));
    EM_ASSIGN_OR_RETURN(const double measured, server->Scale(2));
    EM_ASSIGN_OR_RETURN(const sim::ResizeCost cost,
                        sim::CostOfResize(calibration.profile, model, sim::ResizeStrategy::kElastic, 1, 2));
    rows.push_back({"scaling latency, 1 to 2", "ms", measured * 1e3, cost.latency_s * 1e3});
  }
  return rows;
}

// A deviation beyond the goal is told, and no failure: the machine may have been busy.
int Run(const Options& options) {
  const auto rows = Measure(options);
  if (!rows) return Complain(kCommand, rows.error());
  double worst = 0;
  int beyond = 0;
  for (const MeasuredRow& one : *rows) {
    worst = std::max(worst, std::abs(one.Deviation()));
    beyond += std::abs(one.Deviation()) > options.goal;
  }
  if (options.json) {
    const Json out = {{"model", options.machine.model},
                      {"rows", MeasuredJson(*rows)},
                      {"worst_deviation", worst},
                      {"goal", options.goal}};
    std::printf("%s\n", out.dump(2).c_str());
    return 0;
  }
  std::printf("%s%d of %zu figures deviate by more than %.0f %%; the worst by %.0f %%\n",
              MeasuredTable(*rows).c_str(), beyond, rows->size(), options.goal * 100, worst * 100);
  return 0;
}

}  // namespace

void RegisterBenchSimulator(CLI::App& bench, Action& action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub =
      bench.add_subcommand("simulator", "What simulate says of this machine against what is measured on it");
  sub->footer(
      "Examples:\n  elasticmoe make-model --params 0.4B /tmp/made\n  elasticmoe bench simulator --model "
      "/tmp/made\n"
      "It calibrates (see calibrate) and loads in turns, on an idle machine.");
  sub->add_option("--model", options->machine.model, "Model directory")
      ->required()
      ->check(CLI::ExistingDirectory);
  sub->add_option("--devices", options->machine.devices, "Most devices")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  sub->add_option("--threads-per-device", options->machine.threads_per_device)
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  sub->add_option("--rounds", options->machine.rounds,
                  "Rounds of calibrating and loading in turns; medians count")
      ->check(CLI::Range(1, 100))
      ->capture_default_str();
  sub->add_flag("--domain-per-device", options->machine.domain_per_device, "A memory domain a device");
  sub->add_option("--serve-flag", options->machine.serve_flags, "Passed on to serve");
  sub->add_option("--load", options->load, "Share of what a size can do")
      ->check(CLI::Range(0.05, 1.0))
      ->capture_default_str();
  sub->add_option("--seconds", options->seconds, "Of load at a size, a round")
      ->check(CLI::Range(1.0, 3600.0))
      ->capture_default_str();
  sub->add_option("--input-tokens", options->input_tokens)
      ->check(CLI::Range(1, 100'000))
      ->capture_default_str();
  sub->add_option("--output-tokens", options->output_tokens)
      ->check(CLI::Range(2, 100'000))
      ->capture_default_str();
  sub->add_option("--goal", options->goal, "Share that is told as too much")
      ->check(CLI::Range(0.0, 10.0))
      ->capture_default_str();
  sub->add_flag("--json", options->json, "JSON on stdout instead of the table");
  sub->callback([&action, options] { action = [options] { return Run(*options); }; });
}

}  // namespace elasticmoe::cli
