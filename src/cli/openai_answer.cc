#include "cli/openai_answer.h"

#include <algorithm>
#include <cctype>
#include <limits>

namespace elasticmoe::cli {
namespace {

int Count(const Json& json, std::string_view key) {
  return static_cast<int>(std::clamp(NumberField(json, key), 0.0, 1e9));
}

std::optional<std::string> ErrorMessage(const Json& json) {
  const Json* error = FindField(json, "error");
  if (error == nullptr) return std::nullopt;
  if (error->is_string()) return error->get<std::string>();
  std::string message = StringField(*error, "message");
  return message.empty() ? DumpJson(*error) : message;
}

void ReadTokenIds(const Json& choice, std::vector<TokenId>& ids) {
  const Json* list = FindField(choice, "token_ids");
  if (list == nullptr || !list->is_array()) return;
  for (const Json& id : *list) {
    if (!id.is_number_integer()) continue;
    const auto value = id.get<std::int64_t>();
    if (value >= 0 && value <= std::numeric_limits<TokenId>::max())
      ids.push_back(static_cast<TokenId>(value));
  }
}

void ReadChoice(const Json& choice, AnswerPart& part) {
  part.has_choice = true;
  part.finish_reason = StringField(choice, "finish_reason");
  ReadTokenIds(choice, part.token_ids);
  part.text = StringField(choice, "text");
  for (const char* key : {"delta", "message"}) {
    const Json* message = FindField(choice, key);
    if (message == nullptr) continue;
    part.text = StringField(*message, "content");
    if (!part.text.empty()) continue;
    part.text = StringField(*message, "reasoning_content", StringField(*message, "reasoning"));
    part.is_reasoning = !part.text.empty();
  }
}

}  // namespace

const Json* FindField(const Json& json, std::string_view key) {
  if (!json.is_object()) return nullptr;
  const auto it = json.find(std::string(key));
  return it == json.end() || it->is_null() ? nullptr : &*it;
}

std::string StringField(const Json& json, std::string_view key, std::string fallback) {
  const Json* value = FindField(json, key);
  return value != nullptr && value->is_string() ? value->get<std::string>() : std::move(fallback);
}

double NumberField(const Json& json, std::string_view key, double fallback) {
  const Json* value = FindField(json, key);
  return value != nullptr && value->is_number() ? value->get<double>() : fallback;
}

Expected<AnswerPart> ParseAnswerPart(std::string_view data) {
  EM_ASSIGN_OR_RETURN(const Json json, ParseJson(data));
  if (!json.is_object())
    return Fail(ErrorCode::kInvalidArgument, "reading an answer: found '{}' (want a JSON object)",
                data.substr(0, 80));
  if (auto message = ErrorMessage(json)) return Fail(ErrorCode::kInternal, "{}", *message);
  AnswerPart part;
  if (const Json* choices = FindField(json, "choices");
      choices != nullptr && choices->is_array() && !choices->empty())
    ReadChoice((*choices)[0], part);
  if (const Json* usage = FindField(json, "usage"); usage != nullptr && usage->is_object())
    part.usage = AnswerUsage{Count(*usage, "prompt_tokens"), Count(*usage, "completion_tokens")};
  return part;
}

std::string ServerMessage(int status, std::string_view body) {
  if (const auto json = ParseJson(body)) {
    if (auto message = ErrorMessage(*json)) return fmt::format("{} (HTTP {})", *message, status);
    for (const char* key : {"message", "detail"})
      if (std::string message = StringField(*json, key); !message.empty())
        return fmt::format("{} (HTTP {})", message, status);
  }
  const std::string_view line =
      body.substr(0, std::min({body.find_first_of("\r\n"), body.size(), std::size_t{200}}));
  return line.empty() ? fmt::format("HTTP {}", status) : fmt::format("{} (HTTP {})", line, status);
}

bool IsPlainId(std::string_view id) {
  return !id.empty() && std::ranges::all_of(id, [](unsigned char c) {
    return std::isalnum(c) || c == '-' || c == '_' || c == '.';
  });
}

}  // namespace elasticmoe::cli
