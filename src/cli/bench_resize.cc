// elasticmoe bench resize: one load, one resize in its middle, by each strategy in turn, on servers of its
// own.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>

#include "base/file.h"
#include "cli/client.h"
#include "cli/command.h"
#include "cli/interrupt.h"
#include "cli/load_run.h"
#include "cli/machine_speed.h"
#include "cli/resize_rows.h"
#include "cli/server_child.h"
#include "runtime/process.h"

namespace elasticmoe::cli {
namespace {

constexpr char kCommand[] = "bench resize";
constexpr TimeNs kMillisecond = 1'000'000, kSecond = 1'000'000'000;
constexpr TimeNs kSettle = 3 * kSecond;  // of load after the end of the operation
constexpr TimeNs kPollEvery = 10 * kMillisecond;
constexpr TimeNs kStartTimeout = 600 * kSecond;
constexpr double kLoadShare = 0.7;  // of what the server can do, unless --rate says another
constexpr std::uint64_t kCapacityRounds = 3;
constexpr int kWarmTokens = 4;
constexpr TimeNs kLeastWindow = 2 * kSecond;  // some requests' tokens
const std::vector<std::string> kStrategies{"elastic",     "drain",     "cold-restart",
                                           "extravagant", "colocated", "horizontal"};

struct Options {
  std::string model;
  int from = 1, to = 2;
  std::string strategies = "all";
  double rate = 0, before_s = 5, after_s = 7;
  int input_tokens = 32, output_tokens = 32;
  int concurrency = 16;
  std::uint64_t seed = 1;
  double slo_ttft_ms = 0, slo_tpot_ms = 0;
  int cycles = 0;
  int threads_per_device = 1;
  bool domain_per_device = false;
  std::vector<std::string> serve_flags;
  bool json = false;
  std::string output;
};

TimeNs Seconds(double seconds) {
  return static_cast<TimeNs>(seconds * 1e9);
}

Expected<std::vector<std::string>> ParseStrategies(const std::string& text) {
  if (text == "all") return kStrategies;
  std::vector<std::string> list;
  for (const std::string& name : CLI::detail::split(text, ',')) {
    if (std::ranges::find(kStrategies, name) == kStrategies.end())
      return Fail(ErrorCode::kInvalidArgument, "--strategies: {} is none of {}", name,
                  fmt::join(kStrategies, ", "));
    list.push_back(name);
  }
  return list;
}

Status Check(const Options& options) {
  if (!std::filesystem::is_directory(options.model))
    return Fail(ErrorCode::kInvalidArgument,
                "--model: {} is no directory; elasticmoe make-model makes one of any size", options.model);
  if (options.from == options.to)
    return Fail(ErrorCode::kInvalidArgument, "--from and --to are both {}: there is nothing to resize",
                options.from);
  EM_RETURN_IF_ERROR(ParseStrategies(options.strategies));
  return {};
}

Expected<std::unique_ptr<ServerChild>> StartServer(const Options& options) {
  std::vector<std::string> arguments{options.model,
                                     "--devices",
                                     std::to_string(options.from),
                                     "--max-devices",
                                     std::to_string(std::max(options.from, options.to)),
                                     "--threads-per-device",
                                     std::to_string(options.threads_per_device)};
  if (options.domain_per_device) arguments.emplace_back("--domain-per-device");
  arguments.insert(arguments.end(), options.serve_flags.begin(), options.serve_flags.end());
  return ServerChild::Start(std::move(arguments), kStartTimeout);
}

// The load of every run, without its end. Token ids as prompts: any model takes them.
Expected<LoadOptions> MakeLoad(HttpClient& client, const Options& options) {
  EM_ASSIGN_OR_RETURN(const auto models, ListModels(client));
  LoadOptions load;
  load.model = models.front().id;
  load.shape.seed = options.seed;
  load.shape.input = {options.input_tokens, options.input_tokens};
  load.shape.output = {options.output_tokens, options.output_tokens};
  const int vocab = models.front().vocab;
  if (vocab > 0) {
    load.shape.first_id = vocab > 400 ? 100 : 0;
    load.shape.end_id = vocab;
  }
  load.return_token_ids = load.keep_outputs = true;
  return load;
}

LoadResult ClosedLoop(EventLoop& loop, HttpClient& client, LoadOptions load, int concurrency,
                      std::uint64_t requests, TimeNs duration) {
  load.concurrency = concurrency;
  load.requests = requests;
  load.duration_ns = duration;
  return LoadRun(loop, client, std::move(load)).Run();
}

// What the server can do, in requests a second. It is warm afterwards.
double Capacity(EventLoop& loop, HttpClient& client, LoadOptions load, const Options& options) {
  load.shape.seed = ~load.shape.seed;
  const LoadResult result = ClosedLoop(loop, client, load, options.concurrency,
                                       kCapacityRounds * static_cast<std::uint64_t>(options.concurrency), 0);
  const double seconds = static_cast<double>(result.duration_ns) * 1e-9;
  return seconds > 0 ? static_cast<double>(result.requests.size()) / seconds : 1.0;
}

// So that no request of the load is the first to touch a page.
void Warm(EventLoop& loop, HttpClient& client, LoadOptions load, const Options& options) {
  load.shape.seed = ~load.shape.seed;
  load.shape.output = {kWarmTokens, kWarmTokens};
  (void)ClosedLoop(loop, client, load, options.concurrency, static_cast<std::uint64_t>(options.concurrency),
                   0);
}

double Number(const Json& json, const char* key) {
  const auto at = json.find(key);
  return at != json.end() && at->is_number() ? at->get<double>() : 0.0;
}

// Asks for the resize at its time, and for how it goes until it is over: then `over` is called. With
// `await_capacity` it goes on asking, since the first token of a new device may come after that.
class Resizer {
 public:
  Resizer(EventLoop& loop, HttpClient& client, ResizeRun& run, int devices, bool await_capacity,
          std::function<void()> over)
      : loop_(loop),
        client_(client),
        run_(run),
        devices_(devices),
        await_capacity_(await_capacity),
        over_(std::move(over)),
        timer_(loop) {}

  void AskAt(TimeNs at, TimeNs origin) {
    origin_ = origin;
    timer_.At(at, [this] {
      run_.asked_ns = loop_.Now() - origin_;
      const Json body = {{"devices", devices_}, {"strategy", run_.strategy}};
      Send({.method = "POST", .target = "/v1/scale", .body = DumpJson(body)});
    });
  }

 private:
  void Send(HttpRequest request) {
    answer_.clear();
    status_ = 0;
    call_ = client_.Send(std::move(request),
                         {.head = [this](const HttpHead& head) { status_ = head.status; },
                          .data = [this](std::string_view bytes, TimeNs) { answer_ += bytes; },
                          .done = [this](const Status& status) { Take(status); }});
  }

  void Take(const Status& status) {
    const auto answer = status ? ParseJson(answer_) : tl::unexpected<Error>(status.error());
    if (!answer || status_ >= 300) {
      // While a server restarts it may not answer: it is asked again.
      if (!id_.empty()) return Poll();
      run_.error = answer && answer->contains("error") ? (*answer)["error"].value("message", "refused")
                   : status                            ? fmt::format("http {}", status_)
                                                       : status.error().message;
      return End();
    }
    id_ = answer->value("id", "");
    const std::string state = answer->value("state", "");
    if (state != "done" && state != "aborted") return Poll();
    const Json report = answer->value("report", Json::object());
    run_.scaling_latency_ms = Number(report, "scaling_latency_ms");
    run_.first_capacity_ms = Number(report, "first_capacity_ms");
    run_.total_ms = Number(report, "total_ms");
    run_.engine_pause_ms = Number(report, "pause_ms");
    run_.copy_ms = Number(report, "copy_ms");
    run_.bytes_copied = static_cast<std::uint64_t>(Number(report, "bytes_copied"));
    if (state == "aborted")
      run_.error = answer->contains("error") && (*answer)["error"].is_string()
                       ? (*answer)["error"].get<std::string>()
                       : "aborted";
    if (run_.done_ns == 0) End();
    if (await_capacity_ && run_.error.empty() && run_.first_capacity_ms == 0 &&
        loop_.Now() - origin_ < run_.done_ns + kSettle)
      Poll();
  }

  void Poll() {
    timer_.At(loop_.Now() + kPollEvery, [this] { Send({.target = "/v1/scale/" + id_}); });
  }

  void End() {
    run_.done_ns = loop_.Now() - origin_;
    over_();
  }

  EventLoop& loop_;
  HttpClient& client_;
  ResizeRun& run_;
  int devices_;
  bool await_capacity_;
  std::function<void()> over_;
  Timer timer_;
  TimeNs origin_ = 0;
  std::string id_, answer_;
  int status_ = 0;
  std::shared_ptr<HttpCall> call_;
};

void Say(const std::string& text) {
  std::fprintf(stderr, "%s\n", text.c_str());
}

// The load: the same requests at the same times in every run.
LoadOptions OpenLoop(LoadOptions load, double rate, const Options& options) {
  constexpr double kForever = 1e9;  // seconds
  load.arrivals = Arrivals::Poisson({{rate, kForever}}, options.seed);
  return load;
}

// `rate` 0: it is measured first.
Expected<ResizeRun> RunStrategy(const Options& options, const std::string& strategy, double& rate) {
  EM_ASSIGN_OR_RETURN(const auto server, StartServer(options));
  EventLoop loop;
  HttpClient client(loop, *ParseUrl(server->url()), {});
  HttpClient control(loop, *ParseUrl(server->url()), {});
  EM_ASSIGN_OR_RETURN(const LoadOptions load, MakeLoad(client, options));
  Warm(loop, client, load, options);
  if (rate == 0) {
    Say("measuring what the server can do");
    rate = kLoadShare * Capacity(loop, client, load, options);
  }
  Say(fmt::format("{}: {} -> {} devices at {:.2f} requests/s", strategy, options.from, options.to, rate));
  ResizeRun run;
  run.strategy = strategy;
  LoadRun traffic(loop, client, OpenLoop(load, rate, options));
  Timer ending(loop);
  const TimeNs origin = loop.Now();
  const TimeNs least_end = origin + Seconds(options.before_s + options.after_s);
  Resizer resizer(loop, control, run, options.to, true, [&] {
    ending.At(std::max(least_end, loop.Now() + kSettle), [&] { traffic.StopStarting(); });
  });
  resizer.AskAt(origin + Seconds(options.before_s), origin);
  MemorySampler memory(server->pid());
  run.load = traffic.Run();
  run.memory = memory.Stop();
  for (MemorySample& sample : run.memory) sample.at -= origin;
  return run;
}

Expected<LoadResult> Undisturbed(const Options& options, std::size_t requests, double rate) {
  EM_ASSIGN_OR_RETURN(const auto server, StartServer(options));
  EventLoop loop;
  HttpClient client(loop, *ParseUrl(server->url()), {});
  EM_ASSIGN_OR_RETURN(LoadOptions load, MakeLoad(client, options));
  Warm(loop, client, load, options);
  load.requests = requests;
  return LoadRun(loop, client, OpenLoop(load, rate, options)).Run();
}

int Finish(const Options& options, const Json& json, const std::string& table, bool good) {
  const std::string shown = options.json ? json.dump(2) + "\n" : table;
  std::fwrite(shown.data(), 1, shown.size(), stdout);
  if (!options.output.empty())
    if (Status written = WriteFile(options.output, json.dump(2) + "\n"); !written)
      return Complain(kCommand, written.error());
  return good ? 0 : 1;
}

int Compare(const Options& options) {
  double rate = options.rate;
  std::vector<ResizeRun> runs;
  std::size_t requests = 0;
  TimeNs window = kLeastWindow;
  const std::vector<std::string> strategies = *ParseStrategies(options.strategies);
  for (const std::string& strategy : strategies) {
    auto run = RunStrategy(options, strategy, rate);
    if (!run) return Complain(kCommand, run.error());
    requests = std::max(requests, run->load.requests.size());
    window = std::max(window, static_cast<TimeNs>(run->scaling_latency_ms * 1e6) + kSecond);
    runs.push_back(*std::move(run));
  }
  window = std::min(window, Seconds(options.after_s));
  Say(fmt::format("the same {} requests undisturbed", requests));
  const auto undisturbed = Undisturbed(options, requests, rate);
  if (!undisturbed) return Complain(kCommand, undisturbed.error());

  double copy_bandwidth = 0;
  std::uint64_t copied = 0;
  for (const ResizeRun& run : runs) copied = std::max(copied, run.bytes_copied);
  if (copied > 0) {
    Say(fmt::format("plain copies of {} MiB", copied >> 20));
    const auto measured = ParallelCopyBandwidth(copied, static_cast<int>(runtime::AllowedCpus().size()));
    if (!measured) return Complain(kCommand, measured.error());
    copy_bandwidth = *measured;
  }
  SloLimits slo = DefaultLimits(runs.front());
  if (options.slo_ttft_ms > 0) slo.ttft_ms = options.slo_ttft_ms;
  if (options.slo_tpot_ms > 0) slo.tpot_ms = options.slo_tpot_ms;
  std::vector<ResizeRow> rows;
  Json json_rows = Json::array();
  bool good = true;
  for (const ResizeRun& run : runs) {
    rows.push_back(MakeRow(run, *undisturbed, slo, window, copy_bandwidth));
    json_rows.push_back(ToJson(rows.back()));
    good = good && rows.back().error.empty() && rows.back().tokens_identical;
  }
  const Json json = {{"model", options.model},
                     {"from", options.from},
                     {"to", options.to},
                     {"domain_per_device", options.domain_per_device},
                     {"rate", rate},
                     {"copy_bytes_per_s", copy_bandwidth},
                     {"window_s", static_cast<double>(window) * 1e-9},
                     {"slo_ttft_ms", slo.ttft_ms.value_or(0)},
                     {"slo_tpot_ms", slo.tpot_ms.value_or(0)},
                     {"rows", json_rows}};
  const std::string title = fmt::format(
      "\nresize {} -> {} devices{}, {}: {:.2f} requests/s of {} + {} tokens, step {:.1f} ms, longest time "
      "without a token before {:.1f} ms\n"
      "during: the {:.1f} s after the command, after: from its report on, over the tokens of the same time "
      "undisturbed; SLO: TTFT <= {:.0f} ms, TPOT <= {:.0f} ms\n\n",
      options.from, options.to, options.domain_per_device ? " (a memory domain each)" : "", options.model,
      rate, options.input_tokens, options.output_tokens, rows.front().step_ms, rows.front().usual_pause_ms,
      static_cast<double>(window) * 1e-9, slo.ttft_ms.value_or(0), slo.tpot_ms.value_or(0));
  std::string copies;
  for (const ResizeRow& row : rows)
    if (row.copy_ratio > 0)
      copies += fmt::format(
          "  {}: {} MiB copied in {:.0f} ms under load, {:.2f} GB/s; plain copies on all cores of the idle "
          "machine: {:.2f} GB/s, {:.2f} times that\n",
          row.strategy, row.bytes_copied >> 20, row.copy_ms, row.copy_bytes_per_s / 1e9, copy_bandwidth / 1e9,
          row.copy_ratio);
  return Finish(options, json, title + ToTable(rows) + copies, good);
}

// Grows and shrinks again and again under load: what must not grow is what the server takes of the machine.
int Soak(const Options& options) {
  auto server = StartServer(options);
  if (!server) return Complain(kCommand, server.error());
  EventLoop loop;
  HttpClient client(loop, *ParseUrl((*server)->url()), {});
  HttpClient control(loop, *ParseUrl((*server)->url()), {});
  auto load = MakeLoad(client, options);
  if (!load) return Complain(kCommand, load.error());
  load->concurrency = options.concurrency;
  load->duration_ns = 24 * 3600 * kSecond;
  LoadRun traffic(loop, client, *load);
  const int settled = std::min(10, std::max(1, options.cycles / 2));
  TreeUsage first, last;
  int cycle = 0;
  std::vector<double> latencies;
  std::string error;
  std::unique_ptr<Resizer> resizer;
  ResizeRun run;
  bool up = true;
  Timer pause(loop);
  std::function<void()> next = [&] {
    if (!run.error.empty()) error = run.error;
    if (run.done_ns > 0) latencies.push_back(run.scaling_latency_ms);
    if (!up && run.done_ns > 0) {
      ++cycle;
      // At the end of a cycle all KV memory that has gone is given back, a moment later.
      if (cycle == settled || cycle == options.cycles)
        (cycle == settled ? first : last) = UsageOfTree((*server)->pid());
    }
    if (run.done_ns > 0) up = !up;
    if (!error.empty() || cycle == options.cycles) return traffic.StopStarting();
    run = {};
    run.strategy = "elastic";
    run.first_capacity_ms = 0;
    resizer = std::make_unique<Resizer>(loop, control, run, up ? options.to : options.from, false,
                                        [&] { pause.At(loop.Now() + 200 * kMillisecond, next); });
    resizer->AskAt(loop.Now(), loop.Now());
  };
  pause.At(loop.Now() + kSecond, next);
  const LoadResult result = traffic.Run();
  LoadReport report = Summarize(result, {});
  const auto growth = [](auto before, auto after) {
    return static_cast<std::int64_t>(after) - static_cast<std::int64_t>(before);
  };
  const Json json = {{"cycles", cycle},
                     {"error", error.empty() ? Json() : Json(error)},
                     {"completed", report.completed},
                     {"failed", report.failed},
                     {"memory_growth_bytes", growth(first.memory_bytes, last.memory_bytes)},
                     {"descriptor_growth", growth(first.descriptors, last.descriptors)},
                     {"mapping_growth", growth(first.mappings, last.mappings)},
                     {"process_growth", growth(first.processes, last.processes)},
                     {"memory_bytes", last.memory_bytes},
                     {"descriptors", last.descriptors},
                     {"mappings", last.mappings}};
  std::sort(latencies.begin(), latencies.end());
  const std::string table = fmt::format(
      "\n{} cycles {} -> {} -> {} under load: {} requests whole, {} not{}\n"
      "  from cycle {} to {}: memory {:+.1f} MiB of {:.1f}, descriptors {:+} of {}, mappings {:+} of {}, "
      "processes {:+}\n"
      "  scaling latency: median {:.1f} ms, largest {:.1f} ms\n",
      cycle, options.from, options.to, options.from, report.completed, report.failed,
      error.empty() ? "" : "; ended by: " + error, settled, cycle,
      static_cast<double>(growth(first.memory_bytes, last.memory_bytes)) / (1 << 20),
      static_cast<double>(last.memory_bytes) / (1 << 20), growth(first.descriptors, last.descriptors),
      last.descriptors, growth(first.mappings, last.mappings), last.mappings,
      growth(first.processes, last.processes), latencies.empty() ? 0 : latencies[latencies.size() / 2],
      latencies.empty() ? 0 : latencies.back());
  return Finish(options, json, table, error.empty() && report.failed == 0);
}

int Run(const Options& options) {
  if (Status status = Check(options); !status) {
    (void)Complain(kCommand, status.error());
    return 2;
  }
  return options.cycles > 0 ? Soak(options) : Compare(options);
}

}  // namespace

void RegisterBenchResize(CLI::App& bench, Action& action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub =
      bench.add_subcommand("resize", "One load through a resize by each strategy: the paper's tables");
  sub->footer(
      "Examples:\n"
      "  elasticmoe make-model --shape qwen3-moe --params 1.4B /tmp/made\n"
      "  elasticmoe bench resize --model /tmp/made --from 1 --to 2\n"
      "  elasticmoe bench resize --model /tmp/made --from 1 --to 2 --strategies elastic,drain "
      "--domain-per-device\n"
      "  elasticmoe bench resize --model models/demo --from 1 --to 2 --cycles 200\n"
      "\nEach strategy gets a server of its own, on this machine, and the same requests at the same times.\n"
      "Exit code 1: a strategy was refused or failed, or tokens differ. 2: a wrong option.");
  sub->add_option("--model", options->model, "Model directory")->required();
  sub->add_option("--from", options->from, "Devices before")->check(CLI::Range(1, 64))->capture_default_str();
  sub->add_option("--to", options->to, "Devices after")->check(CLI::Range(1, 64))->capture_default_str();
  sub->add_option("--strategies", options->strategies,
                  "all, or a list: " + fmt::format("{}", fmt::join(kStrategies, ",")))
      ->capture_default_str();
  sub->add_option("--cycles", options->cycles,
                  "Instead: grow and shrink so often under load, and show what grew")
      ->check(CLI::Range(2, 1'000'000));
  sub->add_option("--rate", options->rate,
                  "Requests a second, Poisson (default: 70 % of what the server can do)")
      ->check(CLI::Range(1e-3, 1e6));
  sub->add_option("--before", options->before_s, "Seconds of load before the command")
      ->check(CLI::Range(0.2, 3600.0))
      ->capture_default_str();
  sub->add_option("--after", options->after_s, "Seconds of load after it, at least")
      ->check(CLI::Range(0.2, 3600.0))
      ->capture_default_str();
  sub->add_option("--input-tokens", options->input_tokens)
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  sub->add_option("--output-tokens", options->output_tokens)
      ->check(CLI::Range(2, 1'000'000))
      ->capture_default_str();
  sub->add_option("--concurrency", options->concurrency, "Of warming up, measuring, and --cycles")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  sub->add_option("--seed", options->seed)->capture_default_str();
  sub->add_option("--slo-ttft-ms", options->slo_ttft_ms, "Default: five times the median before")
      ->check(CLI::PositiveNumber);
  sub->add_option("--slo-tpot-ms", options->slo_tpot_ms, "Default: twice the median before")
      ->check(CLI::PositiveNumber);
  sub->add_option("--threads-per-device", options->threads_per_device)
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  sub->add_flag("--domain-per-device", options->domain_per_device, "A memory domain a device");
  sub->add_option("--serve-flag", options->serve_flags,
                  "Passed on to serve, e.g. --serve-flag=--kv-memory=256MiB");
  sub->add_flag("--json", options->json, "JSON on stdout instead of the table");
  sub->add_option("--output", options->output, "Write the JSON to this file too");
  sub->callback([&action, options] { action = [options] { return Run(*options); }; });
}

}  // namespace elasticmoe::cli
