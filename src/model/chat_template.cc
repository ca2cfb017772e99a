#include "model/chat_template.h"

#include "model/jinja/interpreter.h"
#include "model/jinja/parser.h"

namespace elasticmoe::model {

struct ChatTemplate::Impl {
  jinja::Template source;
};

ChatTemplate::ChatTemplate(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
ChatTemplate::ChatTemplate(ChatTemplate&&) noexcept = default;
ChatTemplate& ChatTemplate::operator=(ChatTemplate&&) noexcept = default;
ChatTemplate::~ChatTemplate() = default;

Expected<ChatTemplate> ChatTemplate::Parse(std::string_view source) {
  auto parsed = jinja::Parse(source);
  if (!parsed) return Within("reading the chat template", std::move(parsed.error()));
  return ChatTemplate(std::make_unique<Impl>(Impl{*std::move(parsed)}));
}

Expected<std::string> ChatTemplate::Render(const Json& variables, std::int64_t now_unix_s) const {
  if (!variables.is_object())
    return Fail(ErrorCode::kInvalidArgument,
                "rendering the chat template: the variables are a {}, not an object", variables.type_name());
  return jinja::Run(impl_->source, variables, now_unix_s);
}

bool ChatTemplate::ReadsContentParts() const {
  return impl_->source.reads_content_parts;
}

}  // namespace elasticmoe::model
