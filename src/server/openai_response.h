// Answers of the OpenAI API as JSON, whole and as chunks of a stream. Pure.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/json.h"
#include "core/request.h"
#include "model/tokenizer.h"
#include "server/tool_formats.h"

namespace elasticmoe::server {

struct AnswerHead {
  std::string id;  // "chatcmpl-..." or "cmpl-..."
  std::string model;
  std::int64_t created_s = 0;
};

struct UsageCount {
  int prompt_tokens = 0;
  int completion_tokens = 0;
  int cached_tokens = 0;
};

// What a client sees of tokens in logprobs.
struct TokenFormat {
  const model::Tokenizer* tokenizer = nullptr;  // nullptr: ids only
  bool as_ids = false;                          // "token_id:123" instead of text

  std::string Text(TokenId id) const;
};

Json UsageJson(const UsageCount& usage);

// {"content": [{token, logprob, bytes, top_logprobs}]}
Json ChatLogprobs(std::span<const core::TokenLogprob> logprobs, const TokenFormat& format);

// {"text_offset", "token_logprobs", "tokens", "top_logprobs"}. `first`: a prompt's first token, which has no
// logprob. `offset`: characters of the text so far, moved on.
Json CompletionLogprobs(std::optional<TokenId> first, std::span<const core::TokenLogprob> logprobs,
                        const TokenFormat& format, int& offset);

// vLLM's prompt_logprobs: [null, {"id": {logprob, rank, decoded_token}}, ...]
Json PromptLogprobs(std::span<const core::TokenLogprob> logprobs, const TokenFormat& format);

Json ToolCallJson(const ToolCall& call, const std::string& id);

// The frame of an answer: id, object, created, model, choices.
Json ChatCompletion(const AnswerHead& head, Json choices);
Json ChatChunk(const AnswerHead& head, Json choices);
Json TextCompletion(const AnswerHead& head, Json choices);  // also the frame of its chunks

std::string SseData(const Json& json);  // "data: {...}\n\n"
inline constexpr std::string_view kSseDone = "data: [DONE]\n\n";

}  // namespace elasticmoe::server
