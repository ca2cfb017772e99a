// elasticmoe scale: ask a running server for another number of devices and follow the operation to its end.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>

#include "base/file.h"
#include "base/rng.h"
#include "cli/client.h"
#include "cli/command.h"
#include "cli/interrupt.h"
#include "cli/openai_answer.h"
#include "cli/status_view.h"

namespace elasticmoe::cli {
namespace {

constexpr char kCommand[] = "scale";
constexpr TimeNs kPollNs = 50'000'000;

struct Options {
  ServerFlags server;
  int devices = 0;
  std::vector<int> remove;
  std::string strategy, trace;
  double deadline_s = 0;
  bool no_wait = false, json = false;
};

// A random UUID (RFC 9562, version 4): asking again with it cannot start a second operation.
std::string NewUuid() {
  std::random_device device;
  const auto word = [&] { return (std::uint64_t{device()} << 32) | device(); };
  const std::uint64_t high = (word() & ~0xF000ULL) | 0x4000ULL;
  const std::uint64_t low = (word() & ~(3ULL << 62)) | (2ULL << 62);
  return fmt::format("{:08x}-{:04x}-{:04x}-{:04x}-{:012x}", high >> 32, (high >> 16) & 0xFFFF, high & 0xFFFF,
                     low >> 48, low & 0xFFFFFFFFFFFFULL);
}

bool IsEnd(const std::string& state) {
  return state == "done" || state == "aborted" || state == "failed" || state == "cancelled";
}

std::string Bar(double progress) {
  constexpr int kWidth = 24;
  const int full = static_cast<int>(std::clamp(progress, 0.0, 1.0) * kWidth);
  std::string bar;
  for (int i = 0; i < kWidth; ++i) bar += i < full ? '=' : i == full ? '>' : ' ';
  return bar;
}

class Following {
 public:
  Following(EventLoop& loop, HttpClient& client, const Options& options)
      : loop_(loop), client_(client), options_(options), live_(IsTerminal(STDERR_FILENO) && !options.json) {}

  // The operation's last state as the server tells it.
  Expected<Json> Follow(const std::string& id) {
    Interrupts interrupts;
    const std::string target = "/v1/scale/" + id;
    loop_.OnReadable(interrupts.fd(), [&] {
      if (interrupts.Take()) ++presses_;
      loop_.Stop();
    });
    bool cancelled = false;
    for (;;) {
      if (presses_ > 0 && !std::exchange(cancelled, true)) {
        EndLine();
        std::fputs("cancelling; Ctrl-C again leaves it to the server\n", stderr);
        auto answer = CallJson(client_, {.method = "DELETE", .target = target});
        if (!answer) Complain(kCommand, answer.error());
      }
      if (presses_ > 1) return Fail(ErrorCode::kCancelled, "left operation {} to the server", id);
      auto operation = CallJson(client_, {.target = target});
      if (!operation) {
        EndLine();
        return operation;
      }
      Show(*operation);
      if (IsEnd(StringField(*operation, "state"))) {
        EndLine();
        return operation;
      }
      Pause();
    }
  }

 private:
  void Pause() {
    bool due = false;
    Timer timer(loop_);
    timer.At(loop_.Now() + kPollNs, [&] {
      due = true;
      loop_.Stop();
    });
    const int before = presses_;
    while (!due && presses_ == before) loop_.Run();
  }

  void Show(const Json& operation) {
    const std::string state = StringField(operation, "state", "?"), phase = StringField(operation, "phase");
    const std::string what = phase.empty() || phase == state ? state : state + ": " + phase;
    const double progress = NumberField(operation, "progress", state == "done" ? 1 : 0);
    if (live_) {
      std::fprintf(stderr, "\r[%s] %3.0f %%  %s\x1b[K", Bar(progress).c_str(),
                   100 * std::clamp(progress, 0.0, 1.0), what.c_str());
      std::fflush(stderr);
      shown_ = true;
    } else if (!options_.json && what != last_) {
      std::fprintf(stderr, "%s\n", what.c_str());
    }
    last_ = what;
  }

  void EndLine() {
    if (std::exchange(shown_, false)) std::fputs("\n", stderr);
  }

  EventLoop& loop_;
  HttpClient& client_;
  const Options& options_;
  const bool live_;
  bool shown_ = false;
  std::string last_;
  int presses_ = 0;
};

// "scaling_latency_ms": 12.3 -> "scaling latency   12.30 ms"
std::string ReportLine(std::string key, const Json& value) {
  std::string unit, text;
  if (key.ends_with("_ms")) {
    unit = " ms";
    key.resize(key.size() - 3);
  }
  const bool is_bytes = key.starts_with("bytes_") || key.ends_with("_bytes");
  if (key.ends_with("_bytes")) key.resize(key.size() - 6);
  std::ranges::replace(key, '_', ' ');
  if (value.is_number() && is_bytes)
    text = HumanBytes(value.get<double>());
  else if (value.is_number_float())
    text = fmt::format("{:.2f}", value.get<double>());
  else
    text = value.is_string() ? value.get<std::string>() : DumpJson(value);
  return fmt::format("  {:<24}{:>14}{}\n", key, text, unit);
}

int Close(const Json& operation, const Options& options) {
  const std::string state = StringField(operation, "state");
  if (options.json) {
    std::puts(operation.dump(2).c_str());
    return state == "done" ? 0 : 1;
  }
  const Json* report = FindField(operation, "report");
  if (report != nullptr && report->is_object())
    for (const auto& [key, value] : report->items())
      if (value.is_primitive() && !value.is_null())  // e.g. no token of a new device yet
        std::fputs(ReportLine(key, value).c_str(), stdout);
  if (state == "done") {
    std::printf("now on %d device%s\n", options.devices, options.devices == 1 ? "" : "s");
    return 0;
  }
  const Json* error = FindField(operation, "error");
  const std::string why = error == nullptr     ? "the server does not say why"
                          : error->is_string() ? error->get<std::string>()
                                               : StringField(*error, "message", DumpJson(*error));
  return Complain(kCommand, {ErrorCode::kInternal, fmt::format("{}: {}", state, why)});
}

// The operation as a file for https://ui.perfetto.dev.
Status SaveTrace(HttpClient& client, const std::string& id, const std::string& file) {
  EM_ASSIGN_OR_RETURN(const Json trace, CallJson(client, {.target = "/v1/scale/" + id + "/trace"}));
  return WriteFile(file, DumpJson(trace));
}

int Run(const Options& options) {
  auto url = ParseUrl(options.server.url);
  if (!url) return Complain(kCommand, url.error());
  EventLoop loop;
  HttpClient client(loop, *std::move(url), {.api_key = options.server.api_key});
  const std::string operation_id = NewUuid();
  Json body = {{"devices", options.devices}, {"operation_id", operation_id}};
  if (!options.remove.empty()) body["remove"] = options.remove;
  if (!options.strategy.empty()) body["strategy"] = options.strategy;
  if (options.deadline_s > 0) body["deadline_s"] = options.deadline_s;
  auto accepted = CallJson(client, {.method = "POST", .target = "/v1/scale", .body = DumpJson(body)});
  if (!accepted) return Complain(kCommand, accepted.error());
  const std::string id = StringField(*accepted, "id", operation_id);
  if (!IsPlainId(id))
    return Complain(kCommand, {ErrorCode::kDataLoss,
                               fmt::format("the server names the operation '{}', which is no id", id)});
  if (IsEnd(StringField(*accepted, "state"))) return Close(*accepted, options);  // already so
  if (options.no_wait) {
    std::puts(options.json ? accepted->dump(2).c_str() : id.c_str());
    return 0;
  }
  Following following(loop, client, options);
  const auto operation = following.Follow(id);
  if (!operation) {
    Complain(kCommand, operation.error());
    return operation.error().code == ErrorCode::kCancelled ? 130 : 1;
  }
  if (!options.trace.empty())
    if (Status saved = SaveTrace(client, id, options.trace); !saved) return Complain(kCommand, saved.error());
  return Close(*operation, options);
}

}  // namespace

void RegisterScale(CLI::App& app, Action& action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = app.add_subcommand("scale", "Give a running server another number of devices");
  sub->footer(
      "Examples:\n"
      "  elasticmoe scale 4\n"
      "  elasticmoe scale 2 --remove 1,3          these two leave\n"
      "  elasticmoe scale 3 --no-wait             print the operation's id and leave\n"
      "  elasticmoe scale 4 --trace resize.json   what happened when, for https://ui.perfetto.dev\n"
      "\nCtrl-C cancels the operation; the server then stays as it was after its last commit.\n"
      "Exit status: 0 done (with --no-wait: accepted), 1 refused, failed or cancelled, 130 left to the "
      "server.");
  AddServerFlags(*sub, options->server);
  sub->add_option("devices", options->devices, "How many; 0 lets the server sleep until a request comes")
      ->required()
      ->check(CLI::Range(0, 65536));
  sub->add_option("--remove", options->remove, "Devices that leave, separated by commas")
      ->delimiter(',')
      ->check(CLI::NonNegativeNumber);
  sub->add_option("--strategy", options->strategy,
                  "elastic (the server's default), drain, cold-restart, extravagant, colocated, horizontal");
  sub->add_option("--deadline", options->deadline_s, "Seconds after which it is rolled back")
      ->check(CLI::Range(0.001, 1e6));
  sub->add_option("--trace", options->trace,
                  "Save what happened when as a trace; https://ui.perfetto.dev shows it");
  sub->add_flag("--no-wait", options->no_wait);
  sub->add_flag("--json", options->json, "The operation's last state as JSON");
  sub->callback([&action, options] { action = [options] { return Run(*options); }; });
}

}  // namespace elasticmoe::cli
