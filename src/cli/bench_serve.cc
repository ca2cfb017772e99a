// elasticmoe bench serve: a load generator against any OpenAI server.
#include <sys/resource.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <memory>

#include "base/file.h"
#include "cli/client.h"
#include "cli/command.h"
#include "cli/interrupt.h"
#include "cli/load_report.h"
#include "cli/load_run.h"
#include "cli/server_child.h"

namespace elasticmoe::cli {
namespace {

constexpr char kCommand[] = "bench serve";

constexpr TimeNs kStartTimeout = 600'000'000'000;

struct Options {
  ServerFlags server;
  std::string start;  // model of a server of our own
  std::vector<std::string> serve_flags;
  std::string model;
  std::string endpoint = "completions";
  int concurrency = 0;
  std::uint64_t requests = 0;
  double rate = 0, duration_s = 0, timeout_s = 600, interval_s = 0;
  std::string rate_schedule;
  int input_tokens = 128, output_tokens = 128;
  std::string input_range, output_range;
  std::string trace;
  double trace_speed = 1;
  int trace_max_tokens = 0;
  std::string prompt_style = "auto";
  int vocab = 0;
  std::uint64_t seed = 0;
  std::uint64_t warmup = 0;
  double temperature = 0;
  bool ignore_eos = true, no_stream = false, return_token_ids = false;
  std::string save_tokens, output;
  bool json = false;
  double slo_ttft_ms = 0, slo_tpot_ms = 0;
};

TimeNs Seconds(double seconds) {
  return static_cast<TimeNs>(seconds * 1e9);
}

// A connection is a descriptor: take as many as the machine allows.
void RaiseDescriptorLimit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);
}

// All that can be said without the server.
Expected<LoadOptions> ReadOptions(const Options& options) {
  LoadOptions load;
  load.shape.seed = options.seed;
  load.shape.input = {options.input_tokens, options.input_tokens};
  load.shape.output = {options.output_tokens, options.output_tokens};
  if (!options.input_range.empty()) {
    EM_ASSIGN_OR_RETURN(load.shape.input, ParseTokenRange(options.input_range));
  }
  if (!options.output_range.empty()) {
    EM_ASSIGN_OR_RETURN(load.shape.output, ParseTokenRange(options.output_range));
  }
  load.concurrency = options.concurrency;
  load.requests = options.requests;
  load.duration_ns = Seconds(options.duration_s);
  load.timeout_ns = Seconds(options.timeout_s);
  load.chat = options.endpoint == "chat";
  load.stream = !options.no_stream;
  load.ignore_eos = options.ignore_eos;
  load.return_token_ids = options.return_token_ids || !options.save_tokens.empty();
  load.keep_outputs = !options.save_tokens.empty();
  load.temperature = options.temperature;
  if (!options.trace.empty()) {
    EM_ASSIGN_OR_RETURN(const std::string text, ReadFile(options.trace));
    auto rows = ParseTraceCsv(text);
    if (!rows) return Within(options.trace, std::move(rows.error()));
    load.shape.trace = *std::move(rows);
    load.shape.trace_speed = options.trace_speed;
    load.shape.trace_max_tokens = options.trace_max_tokens;
  }
  if (!options.rate_schedule.empty()) {
    EM_ASSIGN_OR_RETURN(auto schedule, ParseRateSchedule(options.rate_schedule));
    load.arrivals = Arrivals::Poisson(std::move(schedule), options.seed);
  } else if (options.rate > 0) {
    constexpr double kForever = 1e9;  // seconds
    load.arrivals = Arrivals::Poisson({{options.rate, kForever}}, options.seed);
  } else if (!load.shape.trace.empty() && options.concurrency == 0) {
    load.arrivals = Arrivals::FromTrace(load.shape);
  }
  if (!load.arrivals && load.concurrency == 0) load.concurrency = 8;
  const bool ends = load.requests > 0 || load.duration_ns > 0 ||
                    (load.arrivals && (!options.rate_schedule.empty() || options.rate == 0));
  if (!ends) load.requests = load.shape.trace.empty() ? 64 : load.shape.trace.size();
  return load;
}

// Model, vocabulary and kind of prompt, as the server has them.
Status AskServer(HttpClient& client, const Options& options, LoadOptions& load) {
  auto models = ListModels(client);
  // A server without /v1/models can be measured when it is told which model to use.
  if (!models && (options.model.empty() || models.error().code != ErrorCode::kNotFound))
    return tl::unexpected<Error>(std::move(models.error()));
  int vocab = options.vocab;
  if (models) {
    const auto named =
        std::ranges::find_if(*models, [&](const ModelInfo& model) { return model.id == options.model; });
    const ModelInfo& model = named == models->end() ? models->front() : *named;
    load.model = options.model.empty() ? model.id : options.model;
    if (vocab == 0) vocab = model.vocab;
  } else {
    load.model = options.model;
  }
  // The first ids of a vocabulary are often special: leave them out where there are enough others.
  if (vocab > 0) {
    load.shape.first_id = vocab > 400 ? 100 : 0;
    load.shape.end_id = vocab;
  }
  load.text_prompts = load.chat || options.prompt_style == "text";
  if (load.text_prompts || options.prompt_style == "ids") return {};
  // Does it take token ids? One small request tells.
  LoadOptions probe = load;
  probe.stream = false;
  probe.shape.trace.clear();
  probe.shape.input = {8, 8};
  probe.shape.output = {1, 1};
  auto answer = CallJson(client, {.method = "POST",
                                  .target = std::string(RequestTarget(probe)),
                                  .body = RequestBody(probe, 0),
                                  .timeout_ns = load.timeout_ns});
  if (answer) return {};
  if (answer.error().code != ErrorCode::kInvalidArgument)
    return tl::unexpected<Error>(std::move(answer.error()));
  std::fprintf(stderr, "elasticmoe bench serve: no prompts of token ids (%s); sending text instead\n",
               answer.error().message.c_str());
  load.text_prompts = true;
  return {};
}

void ShowProgress(const LoadProgress& now, const LoadProgress& before, bool in_place) {
  const double seconds = static_cast<double>(now.elapsed_ns - before.elapsed_ns) * 1e-9;
  const double per_s =
      seconds > 0 ? static_cast<double>(now.output_tokens - before.output_tokens) / seconds : 0;
  std::string line =
      fmt::format("{:7.1f} s  {} completed  {} failed  {} running",
                  static_cast<double>(now.elapsed_ns) * 1e-9, now.completed, now.failed, now.running);
  if (now.waiting > 0) line += fmt::format("  {} waiting", now.waiting);
  line += fmt::format("  {:.0f} tokens/s", per_s);
  std::fprintf(stderr, in_place ? "\r%s\x1b[K" : "%s\n", line.c_str());
  std::fflush(stderr);
}

std::string Title(const Options& options, const LoadOptions& load) {
  std::string how = load.arrivals
                        ? (!options.rate_schedule.empty() ? fmt::format("rate {}", options.rate_schedule)
                           : options.rate > 0             ? fmt::format("{} requests/s", options.rate)
                                              : fmt::format("trace at speed {}", options.trace_speed))
                        : fmt::format("concurrency {}", load.concurrency);
  if (load.arrivals && load.concurrency > 0) how += fmt::format(", at most {} at a time", load.concurrency);
  const auto range = [](const TokenRange& r) {
    return r.min == r.max ? fmt::format("{}", r.min) : fmt::format("{}-{}", r.min, r.max);
  };
  const std::string lengths = load.shape.trace.empty() ? fmt::format("{} in, {} out", range(load.shape.input),
                                                                     range(load.shape.output))
                                                       : fmt::format("lengths of {}", options.trace);
  return fmt::format("{} at {} ({}; {}; seed {})", load.model, options.server.url, how, lengths,
                     options.seed);
}

Json About(const Options& options, const LoadOptions& load) {
  return Json{{"url", options.server.url},
              {"model", load.model},
              {"endpoint", options.endpoint},
              {"loop", load.arrivals ? "open" : "closed"},
              {"rate", load.arrivals && options.rate > 0 ? Json(options.rate) : Json()},
              {"rate_schedule", options.rate_schedule.empty() ? Json() : Json(options.rate_schedule)},
              {"concurrency", load.concurrency > 0 ? Json(load.concurrency) : Json()},
              {"trace", options.trace.empty() ? Json() : Json(options.trace)},
              {"prompts", load.text_prompts ? "text" : "ids"},
              {"input_tokens", {load.shape.input.min, load.shape.input.max}},
              {"output_tokens", {load.shape.output.min, load.shape.output.max}},
              {"seed", options.seed}};
}

// Same shapes, other prompts: what the server builds up once is built, and no answer of the run is cached by
// it.
bool WarmUp(EventLoop& loop, HttpClient& client, const LoadOptions& load, std::uint64_t count,
            LoadRun*& current) {
  LoadOptions warm = load;
  warm.arrivals.reset();
  warm.shape.seed = ~load.shape.seed;
  warm.requests = count;
  warm.duration_ns = 0;
  warm.concurrency =
      static_cast<int>(std::min<std::uint64_t>(count, load.concurrency > 0 ? load.concurrency : 8));
  LoadRun run(loop, client, std::move(warm));
  current = &run;
  const LoadResult result = run.Run();
  current = nullptr;
  return !result.interrupted;
}

int Run(Options options) {
  auto load = ReadOptions(options);
  if (!load) return Complain(kCommand, load.error());
  std::unique_ptr<ServerChild> own;
  if (!options.start.empty()) {
    std::vector<std::string> arguments{options.start};
    arguments.insert(arguments.end(), options.serve_flags.begin(), options.serve_flags.end());
    auto started = ServerChild::Start(std::move(arguments), kStartTimeout);
    if (!started) return Complain(kCommand, started.error());
    own = *std::move(started);
    options.server.url = own->url();
  }
  auto url = ParseUrl(options.server.url);
  if (!url) return Complain(kCommand, url.error());
  RaiseDescriptorLimit();
  EventLoop loop;
  HttpClient client(loop, *std::move(url), {.api_key = options.server.api_key});
  if (Status asked = AskServer(client, options, *load); !asked) return Complain(kCommand, asked.error());

  LoadRun* current = nullptr;
  Interrupts interrupts;
  loop.OnReadable(interrupts.fd(), [&] {
    if (interrupts.Take() && current != nullptr) current->Interrupt();
  });
  if (options.warmup > 0 && !WarmUp(loop, client, *load, options.warmup, current)) return 130;

  const std::string title = Title(options, *load);
  const bool terminal = IsTerminal(STDERR_FILENO);
  LoadRun run(loop, client, *load);
  current = &run;
  LoadProgress before;
  if (terminal || options.interval_s > 0) {
    const bool in_place = options.interval_s <= 0;
    run.OnProgress(Seconds(in_place ? 0.5 : options.interval_s),
                   [&before, in_place](const LoadProgress& now) {
                     ShowProgress(now, before, in_place);
                     before = now;
                   });
  }
  const LoadResult result = run.Run();
  current = nullptr;
  if (terminal && options.interval_s <= 0) std::fputs("\r\x1b[K", stderr);

  SloLimits slo;
  if (options.slo_ttft_ms > 0) slo.ttft_ms = options.slo_ttft_ms;
  if (options.slo_tpot_ms > 0) slo.tpot_ms = options.slo_tpot_ms;
  LoadReport report = Summarize(result, slo);
  Json json = ToJson(report, About(options, *load));
  // As bench/compare reads it.
  json["rows"] = Json::array({Json{{"name", fmt::format("serve_{}", options.concurrency)},
                                   {"value", json["output_tokens_per_s"]},
                                   {"unit", "tokens/s"}}});
  const std::string shown = options.json ? json.dump(2) + "\n" : ToTable(report, title);
  std::fwrite(shown.data(), 1, shown.size(), stdout);
  if (!options.output.empty())
    if (Status written = WriteFile(options.output, json.dump(2) + "\n"); !written)
      return Complain(kCommand, written.error());
  if (!options.save_tokens.empty())
    if (Status written = WriteFile(options.save_tokens, OutputLines(result)); !written)
      return Complain(kCommand, written.error());
  if (result.interrupted) return 130;
  return report.failed == 0 ? 0 : 1;
}

}  // namespace

void RegisterBenchServe(CLI::App& bench, Action& action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = bench.add_subcommand("serve", "Load on an OpenAI server: latencies, throughput, errors");
  sub->footer(
      "Examples:\n"
      "  elasticmoe bench serve --concurrency 32 --requests 256 --input-tokens 256 --output-tokens 64\n"
      "  elasticmoe bench serve --rate 8 --duration 60 --slo-ttft-ms 500 --slo-tpot-ms 50\n"
      "  elasticmoe bench serve --rate-schedule 2:30,12:30,2:30 --interval 5\n"
      "  elasticmoe bench serve --trace azure-llm-2023-conv.csv --trace-speed 4 --trace-max-tokens 512 "
      "--duration 120\n"
      "\nA closed loop (--concurrency) sends the next request when one ends; an open loop (--rate, "
      "--rate-schedule,\n"
      "--trace) sends them when they are due, and counts each one's time from then.");
  AddServerFlags(*sub, options->server);
  auto* start = sub->add_option("--start", options->start,
                                "Model directory: start a server of it for the run, instead of --url");
  sub->add_option("--serve-flag", options->serve_flags,
                  "Passed on to that server, e.g. --serve-flag=--devices=4")
      ->needs(start);
  sub->add_option("--model", options->model, "Default: the first of /v1/models");
  sub->add_option("--endpoint", options->endpoint, "completions or chat")
      ->check(CLI::IsMember({"completions", "chat"}))
      ->capture_default_str();
  const std::string loop = "Load";
  sub->add_option("--concurrency", options->concurrency,
                  "Requests at a time (closed loop: 8), a bound in an open loop")
      ->check(CLI::Range(1, 1'000'000))
      ->group(loop);
  sub->add_option("--requests", options->requests, "How many (closed loop: 64, unless --duration)")
      ->group(loop);
  sub->add_option("--duration", options->duration_s, "Seconds in which requests are started")
      ->check(CLI::Range(0.001, 1e7))
      ->group(loop);
  auto* rate = sub->add_option("--rate", options->rate, "Requests a second, Poisson")
                   ->check(CLI::Range(1e-6, 1e6))
                   ->group(loop);
  sub->add_option("--rate-schedule", options->rate_schedule, "RATE:SECONDS,RATE:SECONDS,...")
      ->excludes(rate)
      ->group(loop);
  auto* trace = sub->add_option("--trace", options->trace,
                                "CSV of TIMESTAMP,ContextTokens,GeneratedTokens: lengths, and times where "
                                "neither --rate nor --concurrency is given")
                    ->group(loop);
  sub->add_option("--trace-speed", options->trace_speed, "2 = twice as fast")
      ->check(CLI::Range(1e-6, 1e6))
      ->needs(trace)
      ->capture_default_str()
      ->group(loop);
  sub->add_option("--trace-max-tokens", options->trace_max_tokens, "Cut prompts and outputs to this length")
      ->check(CLI::Range(1, 10'000'000))
      ->needs(trace)
      ->group(loop);
  sub->add_option("--warmup", options->warmup, "Requests ahead that are not counted")->group(loop);
  sub->add_option("--seed", options->seed, "Of prompts, lengths, arrivals and sampling")
      ->capture_default_str()
      ->group(loop);
  sub->add_option("--timeout", options->timeout_s, "Seconds a request may take")
      ->check(CLI::Range(0.001, 1e6))
      ->capture_default_str()
      ->group(loop);

  const std::string shape = "Requests";
  sub->add_option("--input-tokens", options->input_tokens)
      ->check(CLI::Range(1, 10'000'000))
      ->capture_default_str()
      ->group(shape);
  sub->add_option("--output-tokens", options->output_tokens)
      ->check(CLI::Range(1, 10'000'000))
      ->capture_default_str()
      ->group(shape);
  sub->add_option("--input-tokens-range", options->input_range, "MIN-MAX, uniform")->group(shape);
  sub->add_option("--output-tokens-range", options->output_range, "MIN-MAX, uniform")->group(shape);
  sub->add_option("--prompt-style", options->prompt_style,
                  "ids, text, or auto: ids where the server takes them")
      ->check(CLI::IsMember({"auto", "ids", "text"}))
      ->capture_default_str()
      ->group(shape);
  sub->add_option("--vocab", options->vocab,
                  "Token ids are drawn below it (default: as the server says, else 2000)")
      ->check(CLI::Range(2, 100'000'000))
      ->group(shape);
  sub->add_option("--temperature", options->temperature)
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str()
      ->group(shape);
  sub->add_flag("--ignore-eos,!--no-ignore-eos", options->ignore_eos,
                "All output tokens, whatever the model says (default on)")
      ->group(shape);
  sub->add_flag("--no-stream", options->no_stream, "Whole answers: no token times")->group(shape);
  sub->add_flag("--return-token-ids", options->return_token_ids, "Ask for ids: tokens are counted by them")
      ->group(shape);

  const std::string out = "Output";
  sub->add_flag("--json", options->json, "JSON on stdout instead of the table")->group(out);
  sub->add_option("--output", options->output, "Write the JSON to this file too")->group(out);
  sub->add_option("--save-tokens", options->save_tokens,
                  "Write each request's token ids to this file, to compare runs")
      ->group(out);
  sub->add_option("--slo-ttft-ms", options->slo_ttft_ms, "Limit for the first token")
      ->check(CLI::PositiveNumber)
      ->group(out);
  sub->add_option("--slo-tpot-ms", options->slo_tpot_ms, "Limit for the mean time of later tokens")
      ->check(CLI::PositiveNumber)
      ->group(out);
  sub->add_option("--interval", options->interval_s, "Seconds between progress lines on stderr")
      ->check(CLI::Range(0.05, 1e6))
      ->group(out);
  sub->callback([&action, options] { action = [options] { return Run(*options); }; });
}

}  // namespace elasticmoe::cli
