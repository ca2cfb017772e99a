// Apart from the rest, so that what uses no chat template does not link its engine.
#include "model/chat_template.h"
#include "server/api_server.h"
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

Expected<std::unique_ptr<ApiServer>> ApiServer::Start(ServerOptions options, runtime::Engine& engine,
                                                      const model::Tokenizer* tokenizer,
                                                      const model::ChatTemplate* chat_template) {
  return Start(std::move(options), engine, MakeTextTools(tokenizer, chat_template));
}

}  // namespace elasticmoe::server
