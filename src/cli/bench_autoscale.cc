// elasticmoe bench autoscale: one trace of requests, by each way to scale in turn, on servers of its own.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>

#include "base/file.h"
#include "base/rng.h"
#include "cli/autoscale_rows.h"
#include "cli/client.h"
#include "cli/command.h"
#include "cli/prometheus_text.h"
#include "cli/server_child.h"

namespace elasticmoe::cli {
namespace {

constexpr char kCommand[] = "bench autoscale";
constexpr TimeNs kSecond = 1'000'000'000;
constexpr TimeNs kPollEvery = kSecond / 4;
constexpr TimeNs kStartTimeout = 600 * kSecond;
constexpr double kPeakBinS = 2;     // the trace's peak is looked for in bins of it, in replayed time
constexpr double kPeakShare = 0.9;  // of the bins have a lower rate than what counts as the peak
constexpr int kMeasured = 4;        // rounds of the closed loop that measures what one size can do
constexpr double kTtftRoom = 10, kTpotRoom = 1.5;

struct Way {
  std::string name, policy, strategy;
  bool peak = false;  // at the largest size throughout
};
const std::vector<Way> kWays{{"static-min", "off", "elastic"},
                             {"static-peak", "off", "elastic", true},
                             {"threshold+cold-restart", "threshold", "cold-restart"},
                             {"threshold+drain", "threshold", "drain"},
                             {"slo+elastic", "slo", "elastic"}};

struct Options {
  std::string model, trace;
  std::vector<std::string> runs;
  double speed = 1, duration_s = 0, times = 0, peak = 1.15;
  int max_tokens = 32, concurrency = 16;
  int min_devices = 1, max_devices = 2, threads_per_device = 1;
  double slo_ttft_ms = 0, slo_tpot_ms = 0, slo_attainment = 0.95, window_s = 4;
  std::uint64_t seed = 1;
  std::vector<std::string> serve_flags;
  bool json = false;
  std::string html, output;
};

void Say(const std::string& text) {
  std::fprintf(stderr, "%s\n", text.c_str());
}

std::vector<std::string> ServeArguments(const Options& options, int devices) {
  std::vector<std::string> arguments{options.model,
                                     "--devices",
                                     std::to_string(devices),
                                     "--max-devices",
                                     std::to_string(options.max_devices),
                                     "--threads-per-device",
                                     std::to_string(options.threads_per_device)};
  arguments.insert(arguments.end(), options.serve_flags.begin(), options.serve_flags.end());
  return arguments;
}

// Token ids as prompts: any model takes them.
Expected<LoadOptions> MakeLoad(HttpClient& client, const Options& options, std::vector<TraceRow> trace) {
  EM_ASSIGN_OR_RETURN(const auto models, ListModels(client));
  LoadOptions load;
  load.model = models.front().id;
  load.shape.seed = options.seed;
  load.shape.trace = std::move(trace);
  load.shape.trace_max_tokens = options.max_tokens;
  const int vocab = models.front().vocab;
  if (vocab > 0) {
    load.shape.first_id = vocab > 400 ? 100 : 0;
    load.shape.end_id = vocab;
  }
  return load;
}

LoadResult ClosedLoop(EventLoop& loop, HttpClient& client, LoadOptions load, int concurrency,
                      std::uint64_t requests) {
  load.concurrency = concurrency;
  load.requests = requests;
  return LoadRun(loop, client, std::move(load)).Run();
}

struct Measured {
  double requests_s = 0;  // that the smallest size can do
  SloLimits limits;       // what it does at that load, with room
};

Expected<Measured> Measure(const Options& options, const std::vector<TraceRow>& trace) {
  EM_ASSIGN_OR_RETURN(
      const auto server,
      ServerChild::Start(ServeArguments(options, std::max(1, options.min_devices)), kStartTimeout));
  EventLoop loop;
  HttpClient client(loop, *ParseUrl(server->url()), {});
  EM_ASSIGN_OR_RETURN(const LoadOptions load, MakeLoad(client, options, trace));
  const auto round = static_cast<std::uint64_t>(options.concurrency);
  (void)ClosedLoop(loop, client, load, options.concurrency, 2 * round);
  const LoadResult full = ClosedLoop(loop, client, load, options.concurrency, kMeasured * 4 * round);
  const LoadResult light = ClosedLoop(loop, client, load, 2, kMeasured * round);
  if (full.duration_ns <= 0) return Fail(ErrorCode::kUnavailable, "measuring the server: it served nothing");
  Measured measured;
  measured.requests_s =
      static_cast<double>(full.requests.size()) * 1e9 / static_cast<double>(full.duration_ns);
  AutoscaleRun run;
  run.load = light;
  measured.limits.ttft_ms = kTtftRoom * MakeRow(run, {}, {}).ttft_p50_ms;
  run.load = full;
  measured.limits.tpot_ms = kTpotRoom * MakeRow(run, {}, {}).tpot_p50_ms;
  return measured;
}

// In replayed time, until `duration_s`, with `times` as many requests: a part of them by lot, or more of
// each, spread until the next one of the trace comes.
std::vector<TraceRow> Replayed(const Options& options, std::span<const TraceRow> trace, double times) {
  std::vector<TraceRow> rows;
  const auto replayed = [&](std::size_t i) {
    return static_cast<double>(trace[std::min(i, trace.size() - 1)].at_ns) / options.speed;
  };
  for (std::size_t i = 0; i < trace.size(); ++i) {
    if (options.duration_s > 0 && replayed(i) >= options.duration_s * 1e9) break;
    Rng rng(options.seed ^ (i << 20));
    const int copies = static_cast<int>(times + rng.Uniform());
    for (int copy = 0; copy < copies; ++copy) {
      TraceRow row = trace[i];
      const double later = times > 1 ? rng.Uniform() * (replayed(i + 1) - replayed(i)) : 0;
      row.at_ns = static_cast<TimeNs>(replayed(i) + later);
      rows.push_back(row);
    }
  }
  std::ranges::stable_sort(rows, {}, &TraceRow::at_ns);
  return rows;
}

double PeakRate(const std::vector<TraceRow>& rows) {
  std::vector<double> counts;
  for (const TraceRow& row : rows) {
    const auto bin = static_cast<std::size_t>(static_cast<double>(row.at_ns) * 1e-9 / kPeakBinS);
    if (counts.size() <= bin) counts.resize(bin + 1);
    ++counts[bin];
  }
  if (counts.empty()) return 0;
  std::ranges::sort(counts);
  return counts[static_cast<std::size_t>(kPeakShare * static_cast<double>(counts.size() - 1))] / kPeakBinS;
}

// Reads the server's own figures while the load runs.
class Watcher {
 public:
  Watcher(EventLoop& loop, HttpClient& client, AutoscaleRun& run)
      : loop_(loop), client_(client), run_(run), timer_(loop), origin_(loop.Now()) {}

  void Watch() {
    timer_.At(loop_.Now() + kPollEvery, [this] {
      body_.clear();
      call_ = client_.Send({.target = "/metrics"},
                           {.head = [](const HttpHead&) {},
                            .data = [this](std::string_view bytes, TimeNs) { body_ += bytes; },
                            .done =
                                [this](const Status& status) {
                                  if (status) Take(body_);
                                  Watch();
                                }});
    });
  }
  void Stop() { timer_.Cancel(); }

  Status Once() {
    EM_ASSIGN_OR_RETURN(const auto page, client_.Fetch({.target = "/metrics"}));
    Take(page.body);
    return {};
  }

 private:
  void Take(const std::string& page) {
    const auto metrics = ParsePrometheusText(page);
    if (!metrics) return;
    const auto value = [&](const char* name) { return SumOf(*metrics, name).value_or(0); };
    run_.samples.push_back({.at_s = static_cast<double>(loop_.Now() - origin_) * 1e-9,
                            .devices = value("elasticmoe_devices"),
                            .running = value("vllm:num_requests_running"),
                            .waiting = value("vllm:num_requests_waiting"),
                            .device_s = value("elasticmoe_device_seconds_total"),
                            .joules = value("elasticmoe_energy_joules_total")});
    for (const MetricSample& one : *metrics)
      if (one.name == "elasticmoe_energy_joules_total")
        run_.joules_measured = one.labels.contains("source") && one.labels.at("source") == "rapl";
  }

  EventLoop& loop_;
  HttpClient& client_;
  AutoscaleRun& run_;
  Timer timer_;
  TimeNs origin_;
  std::string body_;
  std::shared_ptr<HttpCall> call_;
};

Expected<AutoscaleRun> RunWay(const Options& options, const Way& way, const std::vector<TraceRow>& trace,
                              const SloLimits& slo) {
  std::vector<std::string> arguments =
      ServeArguments(options, way.peak ? options.max_devices : std::max(1, options.min_devices));
  for (std::string one :
       {std::string("--autoscale"), way.policy, std::string("--autoscale-strategy"), way.strategy,
        std::string("--min-devices"), std::to_string(options.min_devices), std::string("--slo-ttft"),
        fmt::format("{}", *slo.ttft_ms), std::string("--slo-tpot"), fmt::format("{}", *slo.tpot_ms),
        std::string("--slo-attainment"), fmt::format("{}", options.slo_attainment),
        std::string("--autoscale-window"), fmt::format("{}", options.window_s)})
    arguments.push_back(std::move(one));
  EM_ASSIGN_OR_RETURN(const auto server, ServerChild::Start(arguments, kStartTimeout));
  EventLoop loop;
  HttpClient client(loop, *ParseUrl(server->url()), {}), control(loop, *ParseUrl(server->url()), {});
  EM_ASSIGN_OR_RETURN(LoadOptions load, MakeLoad(client, options, trace));
  LoadOptions warm = load;
  warm.shape.seed = ~load.shape.seed;
  (void)ClosedLoop(loop, client, warm, 2, 2 * static_cast<std::uint64_t>(options.concurrency));

  AutoscaleRun run;
  run.name = way.name;
  load.arrivals = Arrivals::FromTrace(load.shape);
  LoadRun traffic(loop, client, load);
  Watcher watcher(loop, control, run);
  const TimeNs origin = loop.Now();
  EM_RETURN_IF_ERROR(watcher.Once());
  watcher.Watch();
  run.load = traffic.Run();
  watcher.Stop();
  EM_RETURN_IF_ERROR(watcher.Once());
  EM_ASSIGN_OR_RETURN(const Json state, CallJson(control, {.target = "/v1/autoscale"}));
  const double now_s = static_cast<double>(loop.Now() - origin) * 1e-9;
  for (const Json& one : state.value("decisions", Json::array())) {
    const double at_s = now_s - one.value("ago_s", 0.0);
    if (!one.value("applied", false) || at_s < 0) continue;  // while it warmed up
    run.decisions.push_back(one);
    run.decisions.back()["at_s"] = at_s;
  }
  return run;
}

Json ToJson(const Options& options, double times, const SloLimits& slo, const std::vector<Burst>& bursts,
            const std::vector<AutoscaleRun>& runs, const std::vector<AutoscaleRow>& rows) {
  Json json_rows = Json::array(), json_bursts = Json::array();
  for (std::size_t i = 0; i < rows.size(); ++i) {
    json_rows.push_back(ToJson(rows[i]));
    json_rows.back()["joules_by"] = runs[i].joules_measured ? "rapl" : "model";
    json_rows.back()["decisions"] = runs[i].decisions;
  }
  for (const Burst& burst : bursts) json_bursts.push_back({{"from_s", burst.from_s}, {"to_s", burst.to_s}});
  return {{"model", options.model},
          {"trace", options.trace},
          {"speed", options.speed},
          {"requests_of_each", times},
          {"min_devices", options.min_devices},
          {"max_devices", options.max_devices},
          {"slo_ttft_ms", *slo.ttft_ms},
          {"slo_tpot_ms", *slo.tpot_ms},
          {"slo_attainment", options.slo_attainment},
          {"bursts", std::move(json_bursts)},
          {"rows", std::move(json_rows)}};
}

Expected<std::vector<TraceRow>> ReadTrace(const Options& options) {
  EM_ASSIGN_OR_RETURN(const std::string text, ReadFile(options.trace));
  return ParseTraceCsv(text);
}

int Run(const Options& options) {
  if (!std::filesystem::exists(options.model))
    return Complain(kCommand,
                    {ErrorCode::kInvalidArgument, fmt::format("--model: {} is not there", options.model)});
  if (options.min_devices > options.max_devices)
    return Complain(kCommand,
                    {ErrorCode::kInvalidArgument, fmt::format("--min-devices: {} is above --max-devices={}",
                                                              options.min_devices, options.max_devices)});
  const auto trace = ReadTrace(options);
  if (!trace) return Complain(kCommand, trace.error());
  double times = options.times > 0 ? options.times : 1;
  SloLimits slo{options.slo_ttft_ms, options.slo_tpot_ms};
  const std::vector<TraceRow> whole = Replayed(options, *trace, 1);
  if (options.times == 0 || options.slo_ttft_ms == 0 || options.slo_tpot_ms == 0) {
    Say("measuring what the smallest size can do");
    const auto measured = Measure(options, whole);
    if (!measured) return Complain(kCommand, measured.error());
    if (options.slo_ttft_ms == 0) slo.ttft_ms = measured->limits.ttft_ms;
    if (options.slo_tpot_ms == 0) slo.tpot_ms = measured->limits.tpot_ms;
    const double peak = PeakRate(whole);
    if (options.times == 0) times = options.peak * measured->requests_s / std::max(peak, 1e-9);
    Say(fmt::format("{:.1f} requests/s; the trace's peak is {:.1f}, replayed with {:.3f} times its requests",
                    measured->requests_s, peak, times));
  }
  const std::vector<TraceRow> kept = Replayed(options, *trace, times);
  if (kept.empty())
    return Complain(kCommand, {ErrorCode::kInvalidArgument, "--trace: no request of it is left to be sent"});
  std::vector<double> arrivals_s;
  for (const TraceRow& row : kept) arrivals_s.push_back(static_cast<double>(row.at_ns) * 1e-9);
  const std::vector<Burst> bursts = FindBursts(arrivals_s, kPeakBinS / 2);

  std::vector<AutoscaleRun> runs;
  std::vector<AutoscaleRow> rows;
  for (const Way& way : kWays) {
    if (!options.runs.empty() && std::ranges::find(options.runs, way.name) == options.runs.end()) continue;
    Say(fmt::format("{}: {} requests in {:.0f} s", way.name, kept.size(), arrivals_s.back()));
    auto run = RunWay(options, way, kept, slo);
    if (!run) return Complain(kCommand, run.error());
    runs.push_back(*std::move(run));
    rows.push_back(MakeRow(runs.back(), slo, bursts));
  }
  const std::string title = fmt::format(
      "{} on {} to {} devices: {} requests in {:.0f} s ({} bursts), SLO TTFT <= {:.0f} ms, TPOT <= {:.1f} ms",
      options.trace, options.min_devices, options.max_devices, kept.size(), arrivals_s.back(), bursts.size(),
      *slo.ttft_ms, *slo.tpot_ms);
  const Json json = ToJson(options, times, slo, bursts, runs, rows);
  const std::string shown =
      options.json ? json.dump(2) + "\n" : fmt::format("\n{}\n\n{}", title, ToTable(rows));
  std::fwrite(shown.data(), 1, shown.size(), stdout);
  for (const auto& [file, text] : {std::pair(options.output, json.dump(2) + "\n"),
                                   std::pair(options.html, AutoscaleHtml(title, runs, rows, slo, bursts))})
    if (!file.empty())
      if (Status written = WriteFile(file, text); !written) return Complain(kCommand, written.error());
  return 0;
}

}  // namespace

void RegisterBenchAutoscale(CLI::App& bench, Action& action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub =
      bench.add_subcommand("autoscale", "Replay a trace by each way to scale: attainment and cost");
  sub->footer(
      "Examples:\n"
      "  elasticmoe bench autoscale --model models/demo --trace scenarios/traces/bursts.csv --html "
      "report.html\n"
      "  elasticmoe bench autoscale --model models/demo --trace azure.csv --speed 30 --duration 120\n"
      "\nEach run is a server of its own, at first of --min-devices. What is refused or cut off has missed "
      "its "
      "limits.\n"
      "Without --requests, so many of the trace's requests are sent, or copies of each, that its peak is "
      "--peak "
      "times what the smallest size can do.");
  sub->add_option("--model", options->model, "Model directory or .gguf file")->required();
  sub->add_option("--trace", options->trace, "CSV of TIMESTAMP,ContextTokens,GeneratedTokens")
      ->required()
      ->check(CLI::ExistingFile);
  sub->add_option("--speed", options->speed, "Times as fast as the trace")
      ->check(CLI::Range(1e-3, 1e6))
      ->capture_default_str();
  sub->add_option("--duration", options->duration_s, "Seconds of replay (default: to the trace's end)")
      ->check(CLI::Range(1.0, 1e6));
  sub->add_option("--requests", options->times, "Requests sent for each of the trace (default: by --peak)")
      ->check(CLI::Range(1e-6, 1e4));
  sub->add_option("--peak", options->peak, "Peak of the load over what the smallest size can do")
      ->check(CLI::Range(0.01, 100.0))
      ->capture_default_str();
  sub->add_option("--max-tokens", options->max_tokens, "Prompts and outputs are cut to so many")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  std::vector<std::string> names;
  for (const Way& way : kWays) names.push_back(way.name);
  sub->add_option("--runs", options->runs, fmt::format("Some of {} (default: all)", fmt::join(names, ",")))
      ->delimiter(',')
      ->check(CLI::IsMember(names));
  sub->add_option("--min-devices", options->min_devices)->check(CLI::Range(0, 64))->capture_default_str();
  sub->add_option("--max-devices", options->max_devices)->check(CLI::Range(1, 64))->capture_default_str();
  sub->add_option("--threads-per-device", options->threads_per_device)
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  sub->add_option("--slo-ttft", options->slo_ttft_ms,
                  "Milliseconds (default: ten times the median of a light load)")
      ->check(CLI::PositiveNumber);
  sub->add_option("--slo-tpot", options->slo_tpot_ms,
                  "Milliseconds (default: 1.5 times the median at full load)")
      ->check(CLI::PositiveNumber);
  sub->add_option("--slo-attainment", options->slo_attainment, "Goal of the slo policy")
      ->check(CLI::Range(0.01, 1.0))
      ->capture_default_str();
  sub->add_option("--autoscale-window", options->window_s, "Seconds, of all policies")
      ->check(CLI::Range(0.25, 600.0))
      ->capture_default_str();
  sub->add_option("--concurrency", options->concurrency, "Of measuring")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  sub->add_option("--seed", options->seed)->capture_default_str();
  sub->add_option("--serve-flag", options->serve_flags,
                  "Passed on to serve, e.g. --serve-flag=--kv-memory=256MiB");
  sub->add_flag("--json", options->json, "JSON on stdout instead of the table");
  sub->add_option("--output", options->output, "Write the JSON to this file too");
  sub->add_option("--html", options->html, "Write a page with curves to this file");
  sub->callback([&action, options] { action = [options] { return Run(*options); }; });
}

}  // namespace elasticmoe::cli
