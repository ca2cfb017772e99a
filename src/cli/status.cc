// elasticmoe status: what a running server does, once or as a screen that stays.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <optional>

#include "cli/client.h"
#include "cli/command.h"
#include "cli/interrupt.h"
#include "cli/openai_answer.h"
#include "cli/status_view.h"

namespace elasticmoe::cli {
namespace {

constexpr char kCommand[] = "status";
constexpr TimeNs kTimeoutNs = 5'000'000'000;

struct Options {
  ServerFlags server;
  bool watch = false, json = false;
  double interval_s = 1;
};

// Fails only where no server answers at all.
Expected<ServerState> Read(EventLoop& loop, HttpClient& client, const Options& options) {
  ServerState state;
  state.url = options.server.url;
  const auto get = [](std::string target) {
    return HttpRequest{.target = std::move(target), .timeout_ns = kTimeoutNs};
  };
  auto health = CallJson(client, get("/health"));
  state.at_ns = loop.Now();
  // Any answer is a server's; some say "ok" in plain text.
  if (health || health.error().code == ErrorCode::kInvalidArgument)
    state.health = "ok";
  else if (health.error().message.find("(HTTP ") != std::string::npos ||
           health.error().message.find(": HTTP ") != std::string::npos)
    state.health = health.error().code == ErrorCode::kNotFound ? "unknown" : "not healthy";
  else
    return tl::unexpected<Error>(std::move(health.error()));
  if (auto version = CallJson(client, get("/version"))) state.version = StringField(*version, "version");
  if (auto models = ListModels(client)) {
    state.models = *std::move(models);
  } else if (models.error().code == ErrorCode::kInvalidArgument) {
    return tl::unexpected<Error>(std::move(models.error()));  // 401: nothing else will be shown either
  }
  if (auto page = client.Fetch(get("/metrics")); page && page->status == 200)
    if (auto metrics = ParsePrometheusText(page->body)) state.metrics = *std::move(metrics);
  if (auto cluster = CallJson(client, get("/v1/cluster"))) state.cluster = *std::move(cluster);
  if (auto autoscale = CallJson(client, get("/v1/autoscale"))) state.autoscale = *std::move(autoscale);
  // The cluster names the operation that runs; what it does is told elsewhere.
  if (const std::string id = StringField(state.cluster, "operation"); IsPlainId(id))
    if (auto operation = CallJson(client, get("/v1/scale/" + id)))
      state.cluster["operation"] = *std::move(operation);
  return state;
}

std::string Shown(const ServerState& state, const std::optional<ServerState>& before,
                  const Options& options) {
  return options.json ? StatusJson(state).dump(options.watch ? -1 : 2) + "\n" : RenderStatus(state, before);
}

// The screen in one write: each line replaces the one that was there, so nothing flickers.
void Redraw(const std::string& text) {
  std::string out = "\x1b[H";
  for (const char c : text) {
    if (c == '\n') out += "\x1b[K";
    out += c;
  }
  out += "\x1b[J";
  std::fwrite(out.data(), 1, out.size(), stdout);
  std::fflush(stdout);
}

int Watch(EventLoop& loop, HttpClient& client, const Options& options) {
  Interrupts interrupts;
  bool leave = false;
  loop.OnReadable(interrupts.fd(), [&] {
    leave = interrupts.Take() || leave;
    loop.Stop();
  });
  const bool screen = IsTerminal(STDOUT_FILENO) && !options.json;
  if (screen) std::fputs("\x1b[?1049h\x1b[?25l", stdout);  // the other screen, no cursor
  std::optional<ServerState> before;
  while (!leave) {
    auto state = Read(loop, client, options);
    // A server that is gone may come back: that is what one watches for.
    const std::string text = state ? Shown(*state, before, options) : state.error().message + "\n";
    if (screen) {
      Redraw(text + "\nCtrl-C leaves.\n");
    } else {
      std::fputs((text + (options.json ? "" : "\n")).c_str(), stdout);
      std::fflush(stdout);
    }
    if (state) before = *std::move(state);
    bool due = false;
    Timer timer(loop);
    timer.At(loop.Now() + static_cast<TimeNs>(options.interval_s * 1e9), [&] {
      due = true;
      loop.Stop();
    });
    while (!due && !leave) loop.Run();
  }
  if (screen) std::fputs("\x1b[?25h\x1b[?1049l", stdout);
  return 0;
}

int Run(const Options& options) {
  auto url = ParseUrl(options.server.url);
  if (!url) return Complain(kCommand, url.error());
  EventLoop loop;
  HttpClient client(loop, *std::move(url),
                    {.api_key = options.server.api_key, .connect_timeout_ns = kTimeoutNs});
  if (options.watch) return Watch(loop, client, options);
  auto state = Read(loop, client, options);
  if (!state) return Complain(kCommand, state.error());
  std::fputs(Shown(*state, std::nullopt, options).c_str(), stdout);
  return state->health == "not healthy" ? 1 : 0;
}

}  // namespace

void RegisterStatus(CLI::App& app, Action& action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = app.add_subcommand("status", "Show what a running server does");
  sub->footer(
      "Examples:\n  elasticmoe status\n  elasticmoe status --watch --interval 0.5\n  elasticmoe status "
      "--json\n\nExit status: 0 a server answers, 1 none does or it is not healthy.");
  AddServerFlags(*sub, options->server);
  sub->add_flag("--watch", options->watch, "Keep showing it until Ctrl-C");
  sub->add_option("--interval", options->interval_s, "Seconds between looks")
      ->check(CLI::Range(0.05, 3600.0))
      ->capture_default_str();
  sub->add_flag("--json", options->json, "For programs; one object a line with --watch");
  sub->callback([&action, options] { action = [options] { return Run(*options); }; });
}

}  // namespace elasticmoe::cli
