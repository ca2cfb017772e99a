// An API server over a scripted engine, a byte tokenizer and a small chat template, for tests.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "base/check.h"
#include "runtime/scripted_engine.h"
#include "server/api_server.h"
#include "server/testing/byte_tokenizer.h"

namespace elasticmoe::server {

// "role: content\n" a message, tools first, and "assistant: " as the generation prompt. Fails where a role is
// "bad".
inline TextTools ByteText(const ByteTokenizer& tokenizer) {
  return {
      .tokenizer = &tokenizer, .render = [](const Json& variables, std::int64_t) -> Expected<std::string> {
        std::string text;
        if (!variables["tools"].is_null()) text += DumpJson(variables["tools"]) + "\n";
        for (const Json& message : variables["messages"]) {
          if (message["role"] == "bad") return Fail(ErrorCode::kInvalidArgument, "roles must alternate");
          text += message["role"].get<std::string>() + ": " + message["content"].get<std::string>() + "\n";
        }
        if (variables["add_generation_prompt"].get<bool>()) text += "assistant: ";
        return text;
      }};
}

// Generates `text` byte by byte, then <eos>.
inline auto SayText(std::string text) {
  return [text = std::move(text)](const core::GenerationRequest&, int index) -> TokenId {
    const auto i = static_cast<std::size_t>(index);
    return i < text.size() ? static_cast<unsigned char>(text[i]) : kEos;
  };
}

inline runtime::ScriptedEngineOptions ByteEngine(std::string text) {
  runtime::ScriptedEngineOptions options;
  options.spec.vocab = kByteVocab;
  options.spec.eos_ids = {kEos};
  options.max_model_len = 512;
  options.next_token = SayText(std::move(text));
  return options;
}

struct ScriptedApi {
  explicit ScriptedApi(runtime::ScriptedEngineOptions engine_options, ServerOptions options = {},
                       bool with_text = true)
      : engine(std::move(engine_options)) {
    if (options.served_model_names.empty()) options.served_model_names = {"demo", "alias"};
    auto started =
        ApiServer::Start(std::move(options), engine, with_text ? ByteText(tokenizer) : TextTools{});
    EM_CHECK(started, "{}", started.error().message);
    server = *std::move(started);
  }

  ByteTokenizer tokenizer;
  runtime::ScriptedEngine engine;
  std::unique_ptr<ApiServer> server;
};

}  // namespace elasticmoe::server
