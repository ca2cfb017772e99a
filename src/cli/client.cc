#include "cli/client.h"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>

#include "cli/openai_answer.h"

namespace elasticmoe::cli {
void AddServerFlags(CLI::App& app, ServerFlags& flags) {
  app.add_option("--url", flags.url, "Where the server is")->capture_default_str();
  app.add_option("--api-key", flags.api_key, "Bearer token")->envname("OPENAI_API_KEY");
}

Expected<Json> CallJson(HttpClient& client, HttpRequest request) {
  const std::string doing = fmt::format("{} {}{}", request.method, ToString(client.Target()), request.target);
  auto answer = client.Fetch(std::move(request));
  if (!answer) {
    if (answer.error().code == ErrorCode::kUnavailable)
      return Fail(ErrorCode::kUnavailable,
                  "{}; is a server running there? ('elasticmoe serve MODEL_DIR' starts one)",
                  answer.error().message);
    return Within(doing, std::move(answer.error()));
  }
  if (answer->status / 100 != 2) {
    const ErrorCode code = answer->status == 404       ? ErrorCode::kNotFound
                           : answer->status / 100 == 4 ? ErrorCode::kInvalidArgument
                                                       : ErrorCode::kUnavailable;
    return Fail(code, "{}: {}", doing, ServerMessage(answer->status, answer->body));
  }
  if (answer->body.empty()) return Json::object();
  auto json = ParseJson(answer->body);
  if (!json) return Within(doing, std::move(json.error()));
  return json;
}

Expected<std::vector<ModelInfo>> ListModels(HttpClient& client) {
  EM_ASSIGN_OR_RETURN(const Json json, CallJson(client, {.target = "/v1/models"}));
  std::vector<ModelInfo> models;
  const Json* data = FindField(json, "data");
  if (data != nullptr && data->is_array()) {
    for (const Json& entry : *data) {
      ModelInfo model{.id = StringField(entry, "id")};
      if (model.id.empty()) continue;
      const auto number = [](const Json& from, std::string_view key) {
        return static_cast<int>(std::clamp(NumberField(from, key), 0.0, 1e9));
      };
      model.max_model_len = number(entry, "max_model_len");
      model.vocab = number(entry, "vocab_size");
      if (const Json* meta = FindField(entry, "meta"); meta != nullptr && model.vocab == 0)
        model.vocab = number(*meta, "n_vocab");  // llama.cpp's server
      models.push_back(std::move(model));
    }
  }
  if (models.empty())
    return Fail(ErrorCode::kDataLoss, "GET {}/v1/models: it names no model", ToString(client.Target()));
  return models;
}

int Complain(const char* command, const Error& error) {
  std::fprintf(stderr, "elasticmoe %s: %s\n", command, error.message.c_str());
  return 1;
}

bool IsTerminal(int fd) {
  return ::isatty(fd) == 1;
}

}  // namespace elasticmoe::cli
