#include "server/openai_response.h"

#include <cmath>

namespace elasticmoe::server {
namespace {

// JSON has no infinities: the field's stand-in for "impossible".
double Finite(float logprob) {
  return std::isfinite(logprob) ? static_cast<double>(logprob) : -9999.0;
}

int CharacterCount(std::string_view text) {
  int count = 0;
  for (unsigned char c : text) count += (c & 0xC0U) != 0x80U;
  return count;
}

Json Bytes(TokenId id, const TokenFormat& format) {
  if (format.tokenizer == nullptr) return nullptr;
  Json bytes = Json::array();
  for (unsigned char c : format.tokenizer->TokenBytes(id)) bytes.push_back(static_cast<int>(c));
  return bytes;
}

Json Frame(const AnswerHead& head, std::string_view object, Json choices) {
  return Json{{"id", head.id},
              {"object", object},
              {"created", head.created_s},
              {"model", head.model},
              {"system_fingerprint", nullptr},
              {"choices", std::move(choices)}};
}

}  // namespace

std::string TokenFormat::Text(TokenId id) const {
  if (as_ids || tokenizer == nullptr) return fmt::format("token_id:{}", id);
  return tokenizer->TokenText(id);
}

Json UsageJson(const UsageCount& usage) {
  return Json{{"prompt_tokens", usage.prompt_tokens},
              {"total_tokens", usage.prompt_tokens + usage.completion_tokens},
              {"completion_tokens", usage.completion_tokens},
              {"prompt_tokens_details", {{"cached_tokens", usage.cached_tokens}}}};
}

Json ChatLogprobs(std::span<const core::TokenLogprob> logprobs, const TokenFormat& format) {
  Json content = Json::array();
  for (const core::TokenLogprob& entry : logprobs) {
    Json top = Json::array();
    for (const auto& [id, logprob] : entry.top)
      top.push_back(
          Json{{"token", format.Text(id)}, {"logprob", Finite(logprob)}, {"bytes", Bytes(id, format)}});
    content.push_back(Json{{"token", format.Text(entry.token)},
                           {"logprob", Finite(entry.logprob)},
                           {"bytes", Bytes(entry.token, format)},
                           {"top_logprobs", std::move(top)}});
  }
  return Json{{"content", std::move(content)}};
}

Json CompletionLogprobs(std::optional<TokenId> first, std::span<const core::TokenLogprob> logprobs,
                        const TokenFormat& format, int& offset) {
  Json offsets = Json::array(), values = Json::array(), tokens = Json::array(), tops = Json::array();
  const auto add_token = [&](TokenId id) {
    std::string text = format.Text(id);
    offsets.push_back(offset);
    offset += CharacterCount(text);
    tokens.push_back(std::move(text));
  };
  if (first) {
    add_token(*first);
    values.push_back(nullptr);
    tops.push_back(nullptr);
  }
  for (const core::TokenLogprob& entry : logprobs) {
    add_token(entry.token);
    values.push_back(Finite(entry.logprob));
    Json top = Json::object();
    for (const auto& [id, logprob] : entry.top) {
      std::string text = format.Text(id);
      if (!top.contains(text)) top[text] = Finite(logprob);  // two ids may look alike: the likelier one stays
    }
    std::string own = format.Text(entry.token);
    if (!top.contains(own)) top[own] = Finite(entry.logprob);
    tops.push_back(std::move(top));
  }
  return Json{{"text_offset", std::move(offsets)},
              {"token_logprobs", std::move(values)},
              {"tokens", std::move(tokens)},
              {"top_logprobs", std::move(tops)}};
}

Json PromptLogprobs(std::span<const core::TokenLogprob> logprobs, const TokenFormat& format) {
  Json out = Json::array({nullptr});
  for (const core::TokenLogprob& entry : logprobs) {
    Json position = Json::object();
    const auto add = [&](TokenId id, float logprob, Json rank) {
      Json value = {{"logprob", Finite(logprob)}, {"rank", std::move(rank)}};
      value["decoded_token"] =
          format.tokenizer == nullptr ? Json(nullptr) : Json(format.tokenizer->TokenText(id));
      position[std::to_string(id)] = std::move(value);
    };
    bool listed = false;
    for (std::size_t i = 0; i < entry.top.size(); ++i) {
      add(entry.top[i].first, entry.top[i].second, static_cast<int>(i) + 1);
      listed = listed || entry.top[i].first == entry.token;
    }
    if (!listed) add(entry.token, entry.logprob, nullptr);  // beyond the top: its rank is not known
    out.push_back(std::move(position));
  }
  return out;
}

Json ToolCallJson(const ToolCall& call, const std::string& id) {
  return Json{
      {"id", id}, {"type", "function"}, {"function", {{"name", call.name}, {"arguments", call.arguments}}}};
}

Json ChatCompletion(const AnswerHead& head, Json choices) {
  return Frame(head, "chat.completion", std::move(choices));
}
Json ChatChunk(const AnswerHead& head, Json choices) {
  return Frame(head, "chat.completion.chunk", std::move(choices));
}
Json TextCompletion(const AnswerHead& head, Json choices) {
  return Frame(head, "text_completion", std::move(choices));
}

std::string SseData(const Json& json) {
  return "data: " + DumpJson(json) + "\n\n";
}

}  // namespace elasticmoe::server
