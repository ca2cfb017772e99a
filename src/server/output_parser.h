// What a model writes, taken apart for the client: reasoning, content and tool calls. Chosen by flag or by
// the model's chat template and family. Pure.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/json.h"
#include "server/tool_formats.h"

namespace elasticmoe::server {

enum class ReasoningFormat { kNone, kThink, kHarmony };

struct OutputFormat {
  ReasoningFormat reasoning = ReasoningFormat::kNone;  // kHarmony: calls come that way, too
  bool has_tools = true;
  ToolFormat tools = ToolFormat::kHermes;

  // The parsers need the special tokens' text (with and without tools in the request).
  bool NeedsSpecialTokens(bool with_tools) const {
    return reasoning == ReasoningFormat::kHarmony || (with_tools && has_tools && TagsOf(tools).special);
  }
};

// Of the flags --reasoning-parser and --tool-call-parser: "auto", "none", a format, or a name that vLLM uses
// for it. `family`: config.json's model_type; `chat_template`: its source, "" = none. kInvalidArgument lists
// the names.
Expected<OutputFormat> ChooseOutputFormat(std::string_view reasoning_parser, std::string_view tool_parser,
                                          std::string_view family, std::string_view chat_template);
std::string_view NameOf(ReasoningFormat format);
std::string_view NameOfTools(const OutputFormat& format);

class OutputParser {
 public:
  struct Output {
    std::string reasoning;
    std::string content;
    std::vector<ToolCall> calls;
  };

  virtual ~OutputParser() = default;
  virtual Output Add(std::string_view text) = 0;  // what became certain
  virtual Output Finish() = 0;
  virtual int CallCount() const = 0;
};

struct OutputParserOptions {
  bool open_reasoning = false;  // the prompt ends within it
  Json tools = nullptr;         // of the request; null: calls are not looked for (but in kHarmony)
  bool parallel = true;
};

// nullptr where the text is content as it is.
std::unique_ptr<OutputParser> MakeOutputParser(const OutputFormat& format, OutputParserOptions options);

// Whether a generation behind this text begins within the reasoning.
bool OpensReasoning(const OutputFormat& format, std::string_view prompt_end);

}  // namespace elasticmoe::server
