// What the server needs of text: the tokenizer and the chat template, either of which a model may lack.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/json.h"
#include "model/tokenizer.h"
#include "server/api_error.h"
#include "server/openai_request.h"

namespace elasticmoe::model {
class ChatTemplate;
}

namespace elasticmoe::server {

struct TextTools {
  const model::Tokenizer* tokenizer = nullptr;  // nullptr: token ids only
  // Renders the chat template with these variables at that time; empty: the model has none.
  std::function<Expected<std::string>(const Json& variables, std::int64_t now_unix_s)> render = {};
  bool content_parts = false;  // the template walks over message.content itself
};

// Both may be nullptr; they must outlive the result.
TextTools MakeTextTools(const model::Tokenizer* tokenizer, const model::ChatTemplate* chat_template);

// Token ids of a text. 400 naming `param` where there is no tokenizer.
ApiResult<std::vector<TokenId>> EncodeText(const TextTools& text, std::string_view param,
                                           const std::string& prompt, bool add_special);

// Token ids of a conversation: rendered, cut for continue_final_message, encoded. Thread-safe.
ApiResult<std::vector<TokenId>> EncodeChat(const TextTools& text, const ChatPrompt& chat, bool add_special,
                                           std::int64_t now_unix_s);

}  // namespace elasticmoe::server
