#include "server/output_parser.h"

#include <array>
#include <optional>
#include <utility>

#include "server/harmony.h"
#include "server/reasoning.h"
#include "server/tool_calls.h"

namespace elasticmoe::server {
namespace {

template <class Format>
using Names = std::pair<std::string_view, Format>;

// The first name of a format is ours, the others are vLLM's.
constexpr std::array<Names<ReasoningFormat>, 8> kReasoning = {{{"none", ReasoningFormat::kNone},
                                                               {"think", ReasoningFormat::kThink},
                                                               {"qwen3", ReasoningFormat::kThink},
                                                               {"deepseek_r1", ReasoningFormat::kThink},
                                                               {"glm45", ReasoningFormat::kThink},
                                                               {"harmony", ReasoningFormat::kHarmony},
                                                               {"openai_gptoss", ReasoningFormat::kHarmony},
                                                               {"gpt_oss", ReasoningFormat::kHarmony}}};
constexpr std::array<Names<ToolFormat>, 8> kTools = {{{"hermes", ToolFormat::kHermes},
                                                      {"qwen3_coder", ToolFormat::kQwenCoder},
                                                      {"glm", ToolFormat::kGlm},
                                                      {"glm45", ToolFormat::kGlm},
                                                      {"mistral", ToolFormat::kMistral},
                                                      {"deepseek", ToolFormat::kDeepseek},
                                                      {"deepseek_v3", ToolFormat::kDeepseek},
                                                      {"deepseek_v31", ToolFormat::kDeepseek}}};
constexpr std::string_view kHarmonyTools = "harmony";

template <class Table>
auto Find(const Table& table, std::string_view name) {
  std::optional<decltype(table[0].second)> found;
  for (const auto& [known, format] : table)
    if (known == name) found.emplace(format);
  return found;
}

template <class Table>
std::string List(const Table& table) {
  std::string names = "auto";
  for (const auto& row : table) names += fmt::format(", {}", row.first);
  return names;
}

ReasoningFormat GuessReasoning(std::string_view family, std::string_view chat_template) {
  if (family == "gpt_oss" || chat_template.find("<|channel|>") != chat_template.npos)
    return ReasoningFormat::kHarmony;
  return chat_template.find("<think>") != chat_template.npos ||
                 chat_template.find("</think>") != chat_template.npos
             ? ReasoningFormat::kThink
             : ReasoningFormat::kNone;
}

ToolFormat GuessTools(std::string_view family, std::string_view chat_template) {
  const auto has = [&](std::string_view text) { return chat_template.find(text) != chat_template.npos; };
  if (has("<arg_key>")) return ToolFormat::kGlm;
  if (has("<function=")) return ToolFormat::kQwenCoder;
  if (has("<tool_call>")) return ToolFormat::kHermes;
  if (has("[TOOL_CALLS]")) return ToolFormat::kMistral;
  if (has("<｜tool▁call▁begin｜>") || has("<｜tool▁calls▁begin｜>")) return ToolFormat::kDeepseek;
  if (family == "mixtral") return ToolFormat::kMistral;
  if (family.starts_with("deepseek")) return ToolFormat::kDeepseek;
  if (family.starts_with("glm4")) return ToolFormat::kGlm;
  return ToolFormat::kHermes;
}

class ThinkAndTools final : public OutputParser {
 public:
  ThinkAndTools(std::optional<ThinkParser> think, std::optional<ToolCallParser> tools)
      : think_(std::move(think)), tools_(std::move(tools)) {}

  Output Add(std::string_view text) override {
    Output out;
    Take(think_ ? think_->Add(text) : ThinkParser::Output{{}, std::string(text)}, out);
    return out;
  }

  Output Finish() override {
    Output out;
    if (think_) Take(think_->Finish(), out);
    if (tools_) TakeCalls(tools_->Finish(), out);
    return out;
  }

  int CallCount() const override { return tools_ ? tools_->CallCount() : 0; }

 private:
  void Take(ThinkParser::Output part, Output& out) {
    out.reasoning += part.reasoning;
    if (tools_)
      TakeCalls(tools_->Add(part.content), out);
    else
      out.content += part.content;
  }
  static void TakeCalls(ToolCallParser::Output part, Output& out) {
    out.content += part.content;
    for (ToolCall& call : part.calls) out.calls.push_back(std::move(call));
  }

  std::optional<ThinkParser> think_;
  std::optional<ToolCallParser> tools_;
};

class Harmony final : public OutputParser {
 public:
  explicit Harmony(bool parallel) : parser_(parallel) {}
  Output Add(std::string_view text) override { return Of(parser_.Add(text)); }
  Output Finish() override { return Of(parser_.Finish()); }
  int CallCount() const override { return parser_.CallCount(); }

 private:
  static Output Of(HarmonyParser::Output out) {
    return {std::move(out.reasoning), std::move(out.content), std::move(out.calls)};
  }
  HarmonyParser parser_;
};

}  // namespace

Expected<OutputFormat> ChooseOutputFormat(std::string_view reasoning_parser, std::string_view tool_parser,
                                          std::string_view family, std::string_view chat_template) {
  OutputFormat out;
  if (reasoning_parser == "auto") {
    out.reasoning = GuessReasoning(family, chat_template);
  } else if (const auto found = Find(kReasoning, reasoning_parser)) {
    out.reasoning = *found;
  } else {
    return Fail(ErrorCode::kInvalidArgument, "--reasoning-parser: {} is none of {}", reasoning_parser,
                List(kReasoning));
  }
  out.has_tools = tool_parser != "none";
  // Whoever asks for harmony's calls needs its channels.
  if (tool_parser == kHarmonyTools || tool_parser == "openai") {
    out.reasoning = ReasoningFormat::kHarmony;
  } else if (tool_parser == "auto") {
    out.tools = GuessTools(family, chat_template);
  } else if (const auto found = Find(kTools, tool_parser)) {
    out.tools = *found;
  } else if (out.has_tools) {
    return Fail(ErrorCode::kInvalidArgument, "--tool-call-parser: {} is none of {}, {}, openai, none",
                tool_parser, List(kTools), kHarmonyTools);
  }
  return out;
}

std::string_view NameOf(ReasoningFormat format) {
  for (const auto& [name, known] : kReasoning)
    if (known == format) return name;
  return "none";
}

std::string_view NameOfTools(const OutputFormat& format) {
  if (!format.has_tools) return "none";
  if (format.reasoning == ReasoningFormat::kHarmony) return kHarmonyTools;
  for (const auto& [name, known] : kTools)
    if (known == format.tools) return name;
  return "none";
}

std::unique_ptr<OutputParser> MakeOutputParser(const OutputFormat& format, OutputParserOptions options) {
  if (format.reasoning == ReasoningFormat::kHarmony) return std::make_unique<Harmony>(options.parallel);
  std::optional<ThinkParser> think;
  std::optional<ToolCallParser> tools;
  if (format.reasoning == ReasoningFormat::kThink) think.emplace(options.open_reasoning);
  if (format.has_tools && !options.tools.is_null())
    tools.emplace(format.tools, options.parallel, std::move(options.tools));
  if (!think && !tools) return nullptr;
  return std::make_unique<ThinkAndTools>(std::move(think), std::move(tools));
}

bool OpensReasoning(const OutputFormat& format, std::string_view prompt_end) {
  if (format.reasoning != ReasoningFormat::kThink) return false;
  const auto last = prompt_end.find_last_not_of(" \t\r\n");
  return last != prompt_end.npos && prompt_end.substr(0, last + 1).ends_with("<think>");
}

}  // namespace elasticmoe::server
