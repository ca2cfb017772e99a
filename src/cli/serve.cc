// elasticmoe serve: the OpenAI server over an elastic engine.
#include <signal.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>

#include "base/log.h"
#include "cli/autoscale_flags.h"
#include "cli/command.h"
#include "cli/engine_flags.h"
#include "model/chat_template.h"
#include "model/inspect.h"
#include "model/tokenizer.h"
#include "server/api_server.h"
#include "server/autoscale_routes.h"
#include "server/scale_routes.h"

namespace elasticmoe::cli {
namespace {

struct Options {
  EngineFlags engine;
  AutoscaleFlags autoscale;
  server::ServerOptions server;
  std::string log_level = "info";
  std::string generation_config = "auto";
  std::string reasoning_parser = "auto";
  std::string tool_call_parser = "auto";
};

int Report(const Error& error) {
  std::fprintf(stderr, "elasticmoe: %s\n", error.message.c_str());
  return 1;
}

server::GenerationDefaults Defaults(const model::GenerationDefaults& from) {
  server::GenerationDefaults defaults;
  defaults.temperature = from.temperature.value_or(defaults.temperature);
  defaults.top_p = from.top_p.value_or(defaults.top_p);
  defaults.top_k = from.top_k.value_or(defaults.top_k);
  defaults.min_p = from.min_p.value_or(defaults.min_p);
  defaults.repetition_penalty = from.repetition_penalty.value_or(defaults.repetition_penalty);
  return defaults;
}

void Banner(const Options& options, const runtime::ElasticEngine& engine, int port, bool text) {
  const std::string url = fmt::format("http://{}:{}", options.server.http.host, port);
  const std::string& name = options.server.served_model_names.front();
  const runtime::EngineStats stats = engine.Stats();
  std::printf("\n  ElasticMoE %s  %s\n", options.server.version.c_str(), url.c_str());
  std::printf(
      "  model %s, %zu devices, %s weights, kernels %s, %lu KV blocks, context %d, %.0f %% huge pages%s\n\n",
      name.c_str(), stats.devices.size(), std::string(core::NameOf(engine.Spec().weights)).c_str(),
      engine.kernels().c_str(), static_cast<unsigned long>(stats.kv_blocks), engine.MaxModelLen(),
      engine.huge_share() * 100, engine.adopted() ? ", memory adopted" : "");
  if (text)
    std::printf(
        "  curl %s/v1/chat/completions -H 'content-type: application/json' \\\n"
        "    -d '{\"model\":\"%s\",\"messages\":[{\"role\":\"user\",\"content\":\"Tell me a story.\"}]}'\n\n",
        url.c_str(), name.c_str());
  else
    std::printf(
        "  The model has no tokenizer: it serves token ids only.\n"
        "  curl %s/v1/completions -H 'content-type: application/json' \\\n"
        "    -d '{\"model\":\"%s\",\"prompt\":[1,2,3],\"max_tokens\":8,\"return_token_ids\":true}'\n\n",
        url.c_str(), name.c_str());
  std::fflush(stdout);
}

int Serve(Options options) {
  InitLog("serve", options.log_level);
  options.engine.options.log_level = options.log_level;
  // Signals come as a descriptor, to this thread alone: blocked before any other thread is started.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  sigprocmask(SIG_BLOCK, &signals, nullptr);

  const auto& directory = options.engine.options.model;
  auto tokenizer = model::Tokenizer::Open(directory);
  if (!tokenizer) return Report(model::CheckServable(directory).error());
  std::optional<model::ChatTemplate> chat_template;
  if (*tokenizer && !(*tokenizer)->ChatTemplateSource().empty()) {
    auto parsed = model::ChatTemplate::Parse((*tokenizer)->ChatTemplateSource());
    if (!parsed) return Report(model::CheckServable(directory).error());
    chat_template = std::move(*parsed);
  }
  // Misspelt names are told before the weights are loaded; the family is known after.
  const std::string source = *tokenizer ? (*tokenizer)->ChatTemplateSource() : "";
  const auto choose = [&](std::string_view family) {
    return server::ChooseOutputFormat(options.reasoning_parser, options.tool_call_parser, family, source);
  };
  if (const auto known = choose(""); !known) return Report(known.error());
  // Memory is found again by the address after a crash; a port that is not known before is found by nobody.
  const server::HttpOptions& http = options.server.http;
  auto engine = StartReplicas(options.engine, http.port == 0 ? fmt::format("{}:0-{}", http.host, ::getpid())
                                                             : fmt::format("{}:{}", http.host, http.port));
  if (!engine) return Report(engine.error());
  auto autoscaler = MakeAutoscaler(options.autoscale, options.engine.max_devices, **engine);
  if (!autoscaler) return Report(autoscaler.error());

  if (options.server.served_model_names.empty()) {
    const auto path = std::filesystem::weakly_canonical(directory);
    options.server.served_model_names = {
        (path.extension() == ".gguf" ? path.stem() : path.filename()).string()};
  }
  options.server.model_root = directory.string();
  options.server.version = ELASTICMOE_VERSION;
  options.server.output = *choose((*engine)->Spec().family);
  options.server.healthy = [engine = engine->get()] { return engine->Replicas() > 0; };
  if (options.generation_config == "auto")
    options.server.defaults = Defaults((*engine)->Primary()->engine->checkpoint().generation);
  auto api = server::ApiServer::Start(options.server, **engine, tokenizer->get(),
                                      chat_template ? &*chat_template : nullptr);
  if (!api) return Report(api.error());
  server::AddScaleRoutes(**api, **engine);
  if (*autoscaler) {
    server::AddAutoscaleRoutes(**api, **autoscaler);
    (*autoscaler)->Run();
  } else {
    server::AddNoAutoscaleRoutes(**api);
  }
  Banner(options, *(*engine)->Primary()->engine, (*api)->Port(), *tokenizer != nullptr);

  // The first signal lets running requests finish, the second ends them.
  const int descriptor = ::signalfd(-1, &signals, SFD_CLOEXEC);
  signalfd_siginfo info;
  if (::read(descriptor, &info, sizeof(info)) != sizeof(info)) return 1;
  LogInfo("stopping: running requests finish; once more to stop at once");
  if (*autoscaler) (*autoscaler)->Hold("the server is stopping", 0);
  (*engine)->StopAccepting();
  (*api)->BeginStop();
  std::jthread second([&](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      const timespec timeout{0, 100'000'000};
      if (::sigtimedwait(&signals, nullptr, &timeout) > 0) {
        LogWarn("stopping at once");
        (*api)->StopNow();
        return;
      }
    }
  });
  (*api)->Wait();
  (*engine)->SetResizeObserver({});  // it is the server's
  return 0;
}

}  // namespace

void RegisterServe(CLI::App& app, Action& action) {
  auto options = std::make_shared<Options>();
  server::ServerOptions& s = options->server;
  s.http.port = 8000;
  CLI::App* sub = app.add_subcommand("serve", "Serve a model behind the OpenAI API");
  sub->footer(
      "Examples:\n"
      "  elasticmoe serve models/demo --devices 2\n"
      "  elasticmoe serve /models/Qwen3-30B-A3B --devices 4 --threads-per-device 8 --kv-memory 4GiB "
      "--api-key SECRET\n"
      "  elasticmoe serve models/demo --max-devices 4 --autoscale slo --slo-ttft 1000 --slo-tpot 50");
  AddEngineFlags(*sub, options->engine);
  AddAutoscaleFlags(*sub, options->autoscale);
  sub->add_option("--host", s.http.host, "Address to listen on")->capture_default_str();
  sub->add_option("--port", s.http.port, "Port; 0 takes a free one")
      ->check(CLI::Range(0, 65535))
      ->capture_default_str();
  sub->add_option("--served-model-name", s.served_model_names,
                  "Names that requests may use (default: the directory's)");
  sub->add_option("--api-key", s.api_keys, "Key that /v1 asks for; may be given several times")
      ->envname("ELASTICMOE_API_KEY");
  sub->add_option("--max-connections", s.http.max_connections, "More are answered 503")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  sub->add_option("--max-body-bytes", s.http.max_body_bytes, "Larger bodies are answered 413")
      ->transform(CLI::AsSizeValue(false));
  sub->add_option("--generation-config", options->generation_config,
                  "auto: sampling defaults from generation_config.json; none: OpenAI's")
      ->check(CLI::IsMember({"auto", "none"}))
      ->capture_default_str();
  sub->add_option("--reasoning-parser", options->reasoning_parser,
                  "How the model marks its reasoning: auto (by its template), none, think or harmony")
      ->capture_default_str();
  sub->add_option(
         "--tool-call-parser", options->tool_call_parser,
         "How it writes tool calls: auto, none, hermes, qwen3_coder, glm, mistral, deepseek or harmony")
      ->capture_default_str();
  sub->add_option("--log-level", options->log_level, "debug, info, warn or error")
      ->check(CLI::IsMember({"debug", "info", "warn", "error"}))
      ->capture_default_str();
  sub->callback([&action, options] { action = [options] { return Serve(*options); }; });
}

}  // namespace elasticmoe::cli
