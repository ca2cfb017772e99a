// The OpenAI API in front of an engine: /v1/chat/completions, /v1/completions, /v1/models, /tokenize,
// /detokenize, /health, /ping, /version, /load, /metrics, and what the caller adds. Thread-safe.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "runtime/engine.h"
#include "server/http_server.h"
#include "server/metrics.h"
#include "server/openai_request.h"
#include "server/output_parser.h"
#include "server/text_tools.h"

namespace elasticmoe::server {

struct ServerOptions {
  HttpOptions http;
  std::vector<std::string> served_model_names;  // not empty; the first is shown in answers
  std::string model_root;                       // shown in /v1/models
  std::string version = "0";
  std::vector<std::string> api_keys;  // empty = open. Guards /v1 and added routes, as vLLM does
  GenerationDefaults defaults;
  OutputFormat output;                   // how the model writes reasoning and tool calls in chats
  int max_streams = 1024;                // generations at a time, whole or streamed; 429 beyond
  int max_choices = 256;                 // prompts x n of one request
  std::size_t offload_bytes = 32 << 10;  // larger bodies are parsed and encoded on a helper thread
  std::function<bool()> healthy;         // false: /health answers 503; empty = always
};

class ApiServer {
 public:
  // Serves until stopped. `engine`, `tokenizer` and `chat_template` must outlive it; the last two may be
  // nullptr. Errors: those of HttpServer::Listen.
  static Expected<std::unique_ptr<ApiServer>> Start(ServerOptions options, runtime::Engine& engine,
                                                    const model::Tokenizer* tokenizer,
                                                    const model::ChatTemplate* chat_template);
  static Expected<std::unique_ptr<ApiServer>> Start(ServerOptions options, runtime::Engine& engine,
                                                    TextTools text);
  ~ApiServer();  // StopNow and Wait

  int Port() const;

  // Also while serving. `guarded`: needs an API key where there are any.
  void AddRoute(std::string method, std::string path, Handler handler, bool guarded = true);

  Metrics& metrics();
  // Adds lines to the metrics page (Prometheus' text format). Called at each scrape on an I/O thread.
  void AddMetrics(std::function<std::string()> lines);

  void BeginStop();  // running requests finish, others get 503; returns at once
  void StopNow();    // running requests are cancelled, connections closed; returns at once
  void Wait();       // until stopped
  void Stop() {
    BeginStop();
    Wait();
  }

 private:
  struct Impl;
  explicit ApiServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace elasticmoe::server
