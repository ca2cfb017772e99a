#include "model/chat_template.h"
#include "server/text_tools.h"

namespace elasticmoe::server {

TextTools MakeTextTools(const model::Tokenizer* tokenizer, const model::ChatTemplate* chat_template) {
  TextTools text{.tokenizer = tokenizer};
  if (chat_template != nullptr) {
    text.content_parts = chat_template->ReadsContentParts();
    text.render = [chat_template](const Json& variables, std::int64_t now_unix_s) {
      return chat_template->Render(variables, now_unix_s);
    };
  }
  return text;
}

}  // namespace elasticmoe::server
