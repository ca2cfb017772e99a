// elasticmoe bench prefill and bench decode: an engine without HTTP, beside the forward pass alone.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <iostream>
#include <memory>
#include <optional>
#include <sstream>
#include <string>

#include "base/log.h"
#include "cli/bench_engine.h"
#include "cli/client.h"
#include "cli/command.h"

namespace elasticmoe::cli {
namespace {

struct Options {
  EngineFlags engine;
  ReportFlags report;
  std::vector<int> prefills;   // prompt tokens of each row
  std::vector<int> sequences;  // of each row of decoding
  int context = 64;            // prompt tokens before decoding
  int steps = 32;              // decoded and timed
  int rounds = 5;
  std::uint64_t seed = 1;
  bool paced = false;
};

// Median of rounds that took turns, the forward pass alone and the engine, on the same tokens.
struct Measured {
  std::string name;
  double tokens = 0;  // of a round
  int steps = 1;      // of a round
  std::vector<double> engine_s, alone_s;
  Work work;  // of one round
  bool same_tokens = true;
};

// One round of each side.
using Round = std::function<Status(std::uint64_t seed, Measured& measured)>;

Status PrefillRound(EngineBench& bench, int tokens, std::uint64_t seed, Measured& measured) {
  const auto prompt = bench.Prompts(1, tokens, seed)[0];
  const Timed alone = bench.PrefillAlone(prompt, measured.work);
  EM_ASSIGN_OR_RETURN(const Timed engine, bench.PrefillEngine(prompt));
  measured.alone_s.push_back(alone.seconds);
  measured.engine_s.push_back(engine.seconds);
  measured.same_tokens &= alone.generated == engine.generated;
  return {};
}

Status DecodeRound(EngineBench& bench, int sequences, const Options& options, std::uint64_t seed,
                   Measured& measured) {
  const auto prompts = bench.Prompts(sequences, options.context, seed);
  const Timed alone = bench.DecodeAlone(prompts, options.steps, measured.work);
  EM_ASSIGN_OR_RETURN(const Timed engine, bench.DecodeEngine(prompts, options.steps));
  measured.alone_s.push_back(alone.seconds);
  measured.engine_s.push_back(engine.seconds);
  measured.same_tokens &= alone.generated == engine.generated;
  return {};
}

Json RowOf(const Measured& measured, const MachineLimits& limits) {
  const double engine_s = Median(measured.engine_s), alone_s = Median(measured.alone_s);
  const auto side = [&](double seconds) {
    Json json = RatesOf(measured.work, seconds, limits);
    json["ms"] = seconds * 1e3 / measured.steps;
    json["tokens_per_s"] = measured.tokens / seconds;
    return json;
  };
  Json row = {{"name", measured.name}, {"value", measured.tokens / engine_s}, {"unit", "tokens/s"}};
  const Json engine = side(engine_s);
  row.update(engine);
  row["forward_alone"] = side(alone_s);
  row["engine_share"] = 1 - alone_s / engine_s;
  row["rounds_s"] = measured.engine_s;
  row["same_tokens"] = measured.same_tokens;
  return row;
}

std::vector<std::string> Cells(const std::string& name, const Json& side) {
  const auto percent = [&](const char* key) {
    return side[key].is_null() ? std::string("-") : fmt::format("{:.0f} %", side[key].get<double>() * 100);
  };
  return {name,
          fmt::format("{:.1f}", side["tokens_per_s"].get<double>()),
          fmt::format("{:.2f}", side["ms"].get<double>()),
          fmt::format("{:.0f}", side["gflop_per_s"].get<double>()),
          percent("of_peak"),
          fmt::format("{:.1f}", side["gb_per_s"].get<double>()),
          percent("of_bandwidth"),
          percent("limit_fraction")};
}

std::string Table(const EngineBench& bench, const Json& rows, int rounds) {
  std::vector<std::vector<std::string>> cells{{"", "tokens/s", "ms/step", "GFLOP/s", "of peak", "GB/s",
                                               "of bandwidth", "of limit", "engine's share"}};
  for (const Json& row : rows) {
    cells.push_back(Cells(row["name"], row));
    cells.back().push_back(fmt::format("{:.1f} %", row["engine_share"].get<double>() * 100));
    cells.push_back(Cells("  forward alone", row["forward_alone"]));
  }
  return fmt::format("{}\n{}; medians of {} round{}\n\n{}", Describe(bench.limits()), bench.About(), rounds,
                     rounds == 1 ? "" : "s", AlignColumns(cells));
}

// A line of stdin: "prefill TOKENS [SEED]" or "decode SEQUENCES [SEED]".
struct Question {
  bool prefill = false;
  int count = 0;
  std::uint64_t seed = 0;
  bool operator==(const Question&) const = default;
};

std::optional<Question> ParseQuestion(const std::string& line, std::uint64_t next_seed,
                                      const Options& options) {
  std::istringstream words(line);
  std::string kind, more;
  Question question{.seed = next_seed};
  if (!(words >> kind >> question.count)) return std::nullopt;
  question.prefill = kind == "prefill";
  if (!(words >> std::ws).eof() && !(words >> question.seed)) return std::nullopt;
  const int most = question.prefill ? options.prefills[0] : options.sequences[0];
  if ((!question.prefill && kind != "decode") || words >> more || question.count < 1 || question.count > most)
    return std::nullopt;
  return question;
}

// Measurements as stdin asks for them, so that another program can take turns with this one.
int RunPaced(EngineBench& bench, const Options& options, const char* command) {
  std::uint64_t next_seed = options.seed;
  std::printf("%s\n", DumpJson({{"machine", ToJson(bench.limits())}}).c_str());
  std::fflush(stdout);
  std::optional<Question> last;
  Timed alone;  // of the last question, as its work
  Work work;
  for (std::string line; std::getline(std::cin, line); ++next_seed) {
    if (line == "limits") {
      bench.MeasureLimitsAgain();
      std::printf("%s\n", DumpJson({{"machine", ToJson(bench.limits())}}).c_str());
      std::fflush(stdout);
      continue;
    }
    const auto question = ParseQuestion(line, next_seed, options);
    if (!question) {
      std::fprintf(stderr,
                   "elasticmoe %s: %s: expected \"limits\", \"prefill TOKENS [SEED]\" or \"decode SEQUENCES "
                   "[SEED]\", up to %d and %d\n",
                   command, line.c_str(), options.prefills[0], options.sequences[0]);
      return 2;
    }
    const bool prefill = question->prefill;
    const Sequences prompts = bench.Prompts(prefill ? 1 : question->count,
                                            prefill ? question->count : options.context, question->seed);
    const auto timed = prefill ? bench.PrefillEngine(prompts[0]) : bench.DecodeEngine(prompts, options.steps);
    if (!timed) return Complain(command, timed.error());
    if (question != last) {
      work = {};
      alone =
          prefill ? bench.PrefillAlone(prompts[0], work) : bench.DecodeAlone(prompts, options.steps, work);
    }
    last = question;
    std::printf("%s\n", DumpJson({{"seconds", timed->seconds},
                                  {"tokens", question->count * (prefill ? 1 : options.steps)},
                                  {"operations", work.operations},
                                  {"bytes", work.bytes},
                                  {"forward_alone_seconds", alone.seconds},
                                  {"prompts", prompts},
                                  {"generated", timed->generated}})
                            .c_str());
    std::fflush(stdout);
  }
  return 0;
}

int Run(Options options, const char* command) {
  InitLog("bench", "warn");
  EngineBench::Options start{.engine = options.engine};
  for (const int tokens : options.prefills) start.tokens_each = std::max(start.tokens_each, tokens + 1);
  for (const int count : options.sequences) start.sequences = std::max(start.sequences, count);
  if (!options.sequences.empty())
    start.tokens_each = std::max(start.tokens_each, options.context + options.steps + 1);
  auto bench = EngineBench::Start(start);
  if (!bench) return Complain(command, bench.error());
  if (options.paced) return RunPaced(**bench, options, command);

  const std::string_view format = core::NameOf(options.engine.options.weights);
  std::vector<Measured> all;
  const auto measure = [&](const std::string& name, double tokens, int steps, const Round& round) -> Status {
    Measured warm_up, measured{.name = name, .tokens = tokens, .steps = steps};
    EM_RETURN_IF_ERROR(round(options.seed, warm_up));
    for (int i = 1; i <= options.rounds; ++i)
      EM_RETURN_IF_ERROR(round(options.seed + static_cast<std::uint64_t>(i), measured));
    all.push_back(std::move(measured));
    (*bench)->MeasureLimitsAgain();
    return {};
  };
  Status status;
  for (std::size_t i = 0; i < options.prefills.size() && status; ++i) {
    const int tokens = options.prefills[i];
    status =
        measure(fmt::format("prefill_{}_{}", tokens, format), tokens, 1,
                [&](std::uint64_t seed, Measured& to) { return PrefillRound(**bench, tokens, seed, to); });
  }
  for (std::size_t i = 0; i < options.sequences.size() && status; ++i) {
    const int count = options.sequences[i];
    status = measure(
        fmt::format("decode_{}_{}", count, format), static_cast<double>(count) * options.steps, options.steps,
        [&](std::uint64_t seed, Measured& to) { return DecodeRound(**bench, count, options, seed, to); });
  }
  if (!status) return Complain(command, status.error());
  Json rows = Json::array();
  bool same_tokens = true;
  for (const Measured& measured : all) {
    rows.push_back(RowOf(measured, (*bench)->limits()));
    same_tokens &= measured.same_tokens;
  }
  const int code =
      Report(options.report, command, (*bench)->limits(), rows, Table(**bench, rows, options.rounds));
  if (!same_tokens)
    std::fprintf(stderr, "elasticmoe %s: the engine's tokens differ from those of the forward pass alone\n",
                 command);
  return same_tokens ? code : 1;
}

void AddOptions(CLI::App& sub, Options& options) {
  AddEngineFlags(sub, options.engine);
  sub.add_option("--rounds", options.rounds, "Rounds of each row; their median is shown")
      ->check(CLI::Range(1, 10'000))
      ->capture_default_str();
  sub.add_option("--seed", options.seed, "Of the prompts")->capture_default_str();
  AddReportFlags(sub, options.report);
}

constexpr char kReading[] =
    "\nof peak, of bandwidth: against what this machine did a moment before with the same threads, the "
    "kernels' "
    "dot\nproduct on registers and a plain read of memory. of limit: against the longer of the two times for "
    "this work.\nengine's share: of a step, what is not the forward pass (scheduler, exchange, other "
    "processes).";

}  // namespace

void RegisterBenchPrefill(CLI::App& bench, Action& action) {
  auto options = std::make_shared<Options>();
  options->prefills = {512};
  CLI::App* sub = bench.add_subcommand(
      "prefill", "Prompts through an engine without HTTP, and through the forward pass alone");
  sub->footer(std::string("Example:\n  elasticmoe bench prefill /tmp/made --tokens 128,512 --devices 2\n") +
              kReading);
  AddOptions(*sub, *options);
  sub->add_option("--tokens", options->prefills, "Prompt tokens, a row each")
      ->delimiter(',')
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  sub->callback([&action, options] { action = [options] { return Run(*options, "bench prefill"); }; });
}

void RegisterBenchDecode(CLI::App& bench, Action& action) {
  auto options = std::make_shared<Options>();
  options->sequences = {1, 4, 16, 32};
  CLI::App* sub = bench.add_subcommand(
      "decode", "Sequences decoded by an engine without HTTP, and by the forward pass alone");
  sub->footer(std::string("Example:\n  elasticmoe bench decode /tmp/made --sequences 1,32 --devices 2\n") +
              kReading);
  AddOptions(*sub, *options);
  sub->add_option("--sequences", options->sequences, "Sequences at a time, a row each")
      ->delimiter(',')
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  sub->add_option("--context", options->context, "Tokens of each sequence before")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  sub->add_option("--steps", options->steps, "Steps that are timed, a token a sequence each")
      ->check(CLI::Range(1, 100'000))
      ->capture_default_str();
  auto* paced = sub->add_flag(
      "--paced", options->paced,
      "Measure what lines on stdin ask for, \"prefill TOKENS [SEED]\", \"decode SEQUENCES [SEED]\" or "
      "\"limits\", and answer each with a line of JSON; a question asked again is timed again in the engine "
      "alone");
  sub->add_option("--paced-prefill", options->prefills, "The longest prompt of --paced (default: 512)")
      ->expected(1)
      ->check(CLI::Range(1, 1'000'000))
      ->needs(paced);
  sub->callback([&action, options] {
    if (options->paced && options->prefills.empty()) options->prefills = {512};
    action = [options] { return Run(*options, "bench decode"); };
  });
}

}  // namespace elasticmoe::cli
