// Chat templates: the subset of Jinja2 that Hugging Face checkpoints use, set up as in transformers
// (trim_blocks, lstrip_blocks, sandboxed, tojson without HTML escaping). Parsed once, rendered often;
// rendering is thread-safe and bounded in steps, depth and output size.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "base/error.h"
#include "base/json.h"

namespace elasticmoe::model {

class ChatTemplate {
 public:
  // kInvalidArgument: "line N: ..." where the source is no valid or no supported template.
  static Expected<ChatTemplate> Parse(std::string_view source);

  ChatTemplate(ChatTemplate&&) noexcept;
  ChatTemplate& operator=(ChatTemplate&&) noexcept;
  ~ChatTemplate();

  // `variables` is an object: messages, tools, add_generation_prompt, bos_token, eos_token, ... Errors:
  // kInvalidArgument with the template's own words where it calls raise_exception, or what went wrong and the
  // line. `now_unix_s`: what strftime_now shows.
  Expected<std::string> Render(const Json& variables, std::int64_t now_unix_s) const;

  // True if the template walks over message.content itself (so parts must not be joined to a string first).
  bool ReadsContentParts() const;

 private:
  struct Impl;
  explicit ChatTemplate(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace elasticmoe::model
