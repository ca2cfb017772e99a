// What the commands that talk to a running server share: its options, its answers, and one way to say what is
// wrong.
#pragma once

#include <string>
#include <vector>

#include "base/json.h"
#include "cli/http_client.h"

namespace CLI {
class App;
}

namespace elasticmoe::cli {

struct ServerFlags {
  std::string url = "http://127.0.0.1:8000";
  std::string api_key;  // the flag, else OPENAI_API_KEY of the environment
};

void AddServerFlags(CLI::App& app, ServerFlags& flags);

// The answer's JSON. Errors: of the connection (with what to do), and of the server with its own message:
// kNotFound for 404, kInvalidArgument for other 4xx, kUnavailable for 5xx.
Expected<Json> CallJson(HttpClient& client, HttpRequest request);

struct ModelInfo {
  std::string id;
  int max_model_len = 0;  // 0 = the server does not say
  int vocab = 0;
};

// GET /v1/models: at least one.
Expected<std::vector<ModelInfo>> ListModels(HttpClient& client);

// "elasticmoe COMMAND: message" on stderr; returns the exit code 1.
int Complain(const char* command, const Error& error);

bool IsTerminal(int fd);

}  // namespace elasticmoe::cli
