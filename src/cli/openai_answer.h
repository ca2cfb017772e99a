// What an OpenAI server says, as typed values: a chunk of a stream and a whole answer are read by one
// function, of /v1/completions and of /v1/chat/completions. Pure; foreign bytes may be anything.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/ids.h"
#include "base/json.h"

namespace elasticmoe::cli {

struct AnswerUsage {
  int prompt_tokens = 0;
  int completion_tokens = 0;
};

// Of the first choice alone.
struct AnswerPart {
  bool has_choice = false;  // false in the chunk that carries only the usage
  std::string text;         // content, or reasoning where there is no content
  bool is_reasoning = false;
  std::vector<TokenId> token_ids;  // where the server was asked to return them
  std::string finish_reason;       // "" until the last chunk
  std::optional<AnswerUsage> usage;
};

// kInvalidArgument: not JSON, or not an object. kInternal: the server's own error object, its message as it
// came.
Expected<AnswerPart> ParseAnswerPart(std::string_view data);

// What an answer with an error status says: the message of OpenAI's (or FastAPI's) error object, else the
// first line of the body, else the status alone.
std::string ServerMessage(int status, std::string_view body);

// Reads of JSON that may have any shape: nullptr or the fallback where `key` is missing or of another type.
const Json* FindField(const Json& json, std::string_view key);
std::string StringField(const Json& json, std::string_view key, std::string fallback = "");
double NumberField(const Json& json, std::string_view key, double fallback = 0);

// Whether a server's id of an operation may become a part of a path.
bool IsPlainId(std::string_view id);

}  // namespace elasticmoe::cli
