// Bodies of the OpenAI API as typed values: JSON in, a checked request out, no tokenizer and no engine.
// Unknown fields are ignored; fields that would change the answer and that we cannot honour are refused by
// name. Pure.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/json.h"
#include "core/request.h"
#include "server/api_error.h"

namespace elasticmoe::server {

// What a request that says nothing gets: generation_config.json, else OpenAI's defaults.
struct GenerationDefaults {
  float temperature = 1.0F;
  float top_p = 1.0F;
  int top_k = 0;
  float min_p = 0.0F;
  float repetition_penalty = 1.0F;

  // Reads temperature, top_p, top_k, min_p and repetition_penalty; the rest is not about sampling.
  static Expected<GenerationDefaults> FromJson(const Json& generation_config);
};

struct RequestLimits {
  int vocab = 0;          // ids must be below
  int max_choices = 256;  // prompts x n
  GenerationDefaults defaults = {};
};

// Fields that chat and plain completions share.
struct SamplingRequest {
  std::string model;              // "" = whatever is served
  core::SamplingParams sampling;  // seed: see seed_given; logprobs: what a choice shows, -1 = none
  bool seed_given = false;
  int n = 1;
  std::optional<int> max_tokens;
  int min_tokens = 0;
  bool ignore_eos = false;
  std::vector<std::string> stop;
  std::vector<TokenId> stop_token_ids;
  bool include_stop_str_in_output = false;
  bool skip_special_tokens = true;
  bool add_special_tokens = true;
  int prompt_logprobs = -1;
  int truncate_prompt_tokens = 0;  // keep that many last tokens; 0 = off, -1 = the context
  int priority = 0;
  bool stream = false;
  bool include_usage = false;
  bool continuous_usage = false;
  bool return_token_ids = false;
  bool return_tokens_as_token_ids = false;
};

// What a chat template is rendered with.
struct ChatPrompt {
  Json messages = Json::array();
  Json tools = nullptr;  // array, or null where there are none or tool_choice is "none"
  Json documents = nullptr;
  Json variables = Json::object();  // chat_template_kwargs and reasoning_effort
  bool add_generation_prompt = true;
  bool continue_final_message = false;
};

struct ChatRequest : SamplingRequest {
  ChatPrompt chat;
  bool parallel_tool_calls = true;
};

using Prompt = std::variant<std::string, std::vector<TokenId>>;

struct CompletionRequest : SamplingRequest {
  std::vector<Prompt> prompts;
  bool echo = false;
};

struct TokenizeRequest {
  std::string model;
  std::variant<std::string, ChatPrompt> input;
  bool add_special_tokens = true;
  bool return_token_strs = false;
};

struct DetokenizeRequest {
  std::string model;
  std::vector<TokenId> tokens;
};

ApiResult<Json> ParseBody(std::string_view body);  // an object
ApiResult<ChatRequest> ParseChatRequest(const Json& body, const RequestLimits& limits);
ApiResult<CompletionRequest> ParseCompletionRequest(const Json& body, const RequestLimits& limits);
ApiResult<TokenizeRequest> ParseTokenizeRequest(const Json& body);
ApiResult<DetokenizeRequest> ParseDetokenizeRequest(const Json& body, const RequestLimits& limits);

}  // namespace elasticmoe::server
