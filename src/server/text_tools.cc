#include "server/text_tools.h"

namespace elasticmoe::server {
namespace {

constexpr std::string_view kNoTokenizer =
    "this model has no tokenizer: it takes and gives token ids only (/v1/completions with prompt as an array "
    "of ids)";

std::string_view Trim(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r\n\v\f";
  const auto first = text.find_first_not_of(kSpace);
  if (first == text.npos) return {};
  return text.substr(first, text.find_last_not_of(kSpace) - first + 1);
}

}  // namespace

ApiResult<std::vector<TokenId>> EncodeText(const TextTools& text, std::string_view param,
                                           const std::string& prompt, bool add_special) {
  if (text.tokenizer == nullptr) return BadField(param, "{}: {}", param, kNoTokenizer);
  return text.tokenizer->Encode(prompt, add_special);
}

ApiResult<std::vector<TokenId>> EncodeChat(const TextTools& text, const ChatPrompt& chat, bool add_special,
                                           std::int64_t now_unix_s) {
  if (text.tokenizer == nullptr) return BadField("messages", "messages: {}", kNoTokenizer);
  if (!text.render)
    return BadField("messages",
                    "messages: this model has no chat template; use /v1/completions with a prompt");

  Json variables = {{"messages", chat.messages}};
  if (text.content_parts) {
    for (Json& message : variables["messages"]) {
      Json& content = message["content"];
      content = Json::array({Json{{"type", "text"}, {"text", content}}});
    }
  }
  variables["tools"] = chat.tools;
  variables["documents"] = chat.documents;
  variables["add_generation_prompt"] = chat.add_generation_prompt;
  variables["bos_token"] = text.tokenizer->BosToken();
  variables["eos_token"] = text.tokenizer->EosToken();
  for (const auto& [name, value] : chat.variables.items())
    if (name != "messages") variables[name] = value;

  auto rendered = text.render(variables, now_unix_s);
  if (!rendered)
    return BadField("messages", "messages: the chat template refused them: {}", rendered.error().message);
  if (chat.continue_final_message) {
    // As transformers: the text ends where the last message's content ends.
    const std::string& last = chat.messages.back()["content"].get_ref<const std::string&>();
    const std::string_view wanted = Trim(last);
    const auto at = rendered->rfind(wanted);
    if (wanted.empty() || at == rendered->npos)
      return BadField(
          "continue_final_message",
          "continue_final_message: the last message is empty or the chat template does not show its content");
    rendered->resize(at + wanted.size());
  }
  return text.tokenizer->Encode(*rendered, add_special);
}

}  // namespace elasticmoe::server
