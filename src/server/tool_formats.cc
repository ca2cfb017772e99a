#include "server/tool_formats.h"

#include <optional>

namespace elasticmoe::server {
namespace {

constexpr std::string_view kSpace = " \t\r\n";

std::string_view Trim(std::string_view text) {
  const auto first = text.find_first_not_of(kSpace);
  if (first == text.npos) return {};
  return text.substr(first, text.find_last_not_of(kSpace) - first + 1);
}

// What lies between `open` and `close`, and takes both away with it; nullopt where they are not there.
std::optional<std::string_view> Between(std::string_view& text, std::string_view open,
                                        std::string_view close) {
  const auto begin = text.find(open);
  if (begin == text.npos) return std::nullopt;
  const auto end = text.find(close, begin + open.size());
  if (end == text.npos) return std::nullopt;
  const std::string_view inside = text.substr(begin + open.size(), end - begin - open.size());
  text.remove_prefix(end + close.size());
  return inside;
}

// {"name": ..., "arguments": {...}}; models also say "parameters", or give the arguments as text.
std::optional<ToolCall> FromJson(const Json& json) {
  if (!json.is_object()) return std::nullopt;
  const auto name = json.find("name");
  if (name == json.end() || !name->is_string()) return std::nullopt;
  auto arguments = json.find("arguments");
  if (arguments == json.end()) arguments = json.find("parameters");
  ToolCall call{.name = name->get<std::string>(), .arguments = "{}"};
  if (arguments != json.end())
    call.arguments = arguments->is_string() ? arguments->get<std::string>() : DumpJson(*arguments);
  return call;
}

std::vector<ToolCall> ReadHermes(std::string_view text) {
  const auto parsed = ParseJson(text);
  if (!parsed) return {};
  const auto call = FromJson(*parsed);
  return call ? std::vector{*call} : std::vector<ToolCall>();
}

// Whether a tool's schema says that an argument is text; false where it says nothing.
bool IsText(const Json& tools, std::string_view tool, std::string_view argument) {
  if (!tools.is_array()) return false;
  for (const Json& entry : tools) {
    const auto function = entry.is_object() ? entry.find("function") : entry.end();
    if (!entry.is_object() || function == entry.end() || !function->is_object()) continue;
    const auto name = function->find("name");
    if (name == function->end() || *name != tool) continue;
    const Json* at = &*function;
    for (const std::string& key :
         {std::string("parameters"), std::string("properties"), std::string(argument), std::string("type")}) {
      const auto next = at->is_object() ? at->find(key) : at->end();
      if (!at->is_object() || next == at->end()) return false;
      at = &*next;
    }
    return *at == "string";
  }
  return false;
}

// A bare value: JSON unless the schema wants text or it is none.
Json BareValue(const Json& tools, std::string_view tool, std::string_view key, std::string_view text) {
  if (!IsText(tools, tool, key))
    if (auto json = ParseJson(text)) return *std::move(json);
  return std::string(text);
}

std::vector<ToolCall> ReadGlm(std::string_view text, const Json& tools) {
  const std::string name(Trim(text.substr(0, text.find("<arg_key>"))));
  if (name.empty() || name.find_first_of("<>{}\n") != name.npos) return {};
  text.remove_prefix(std::min(text.find("<arg_key>"), text.size()));
  Json arguments = Json::object();
  while (!Trim(text).empty()) {
    const auto key = Between(text, "<arg_key>", "</arg_key>");
    const auto value = key ? Between(text, "<arg_value>", "</arg_value>") : std::nullopt;
    if (!value) return {};
    arguments[std::string(Trim(*key))] = BareValue(tools, name, Trim(*key), *value);
  }
  return {{name, DumpJson(arguments)}};
}

// Values stand on lines of their own.
std::string_view WithoutOuterNewlines(std::string_view value) {
  if (value.starts_with('\n')) value.remove_prefix(1);
  if (value.ends_with('\n')) value.remove_suffix(1);
  return value;
}

std::vector<ToolCall> ReadQwenCoder(std::string_view text, const Json& tools) {
  const auto head = Between(text, "<function=", ">");
  if (!head) return {};
  const std::string name(Trim(*head));
  if (name.empty()) return {};
  const auto end = text.rfind("</function>");
  if (end != text.npos) text = text.substr(0, end);
  Json arguments = Json::object();
  while (!Trim(text).empty()) {
    const auto key = Between(text, "<parameter=", ">");
    if (!key) return {};
    // The closing tag may be missing before the next parameter.
    const auto next = std::min({text.find("</parameter>"), text.find("<parameter="), text.size()});
    const std::string_view value = text.substr(0, next);
    text.remove_prefix(next);
    if (text.starts_with("</parameter>")) text.remove_prefix(std::string_view("</parameter>").size());
    arguments[std::string(Trim(*key))] = BareValue(tools, name, Trim(*key), WithoutOuterNewlines(value));
  }
  return {{name, DumpJson(arguments)}};
}

std::vector<ToolCall> ReadMistral(std::string_view text) {
  text = Trim(text);
  if (const auto args = text.find("[ARGS]"); args != text.npos && !text.starts_with('[')) {
    const std::string_view head = text.substr(0, text.find("[CALL_ID]"));
    const std::string_view name = Trim(head.substr(0, std::min(args, head.size())));
    const auto arguments = ParseJson(text.substr(args + std::string_view("[ARGS]").size()));
    if (name.empty() || !arguments || !arguments->is_object()) return {};
    return {{std::string(name), DumpJson(*arguments)}};
  }
  const auto parsed = ParseJson(text);
  if (!parsed) return {};
  std::vector<ToolCall> calls;
  const auto add = [&](const Json& json) {
    auto call = FromJson(json);
    if (call) calls.push_back(*std::move(call));
    return call.has_value();
  };
  if (!parsed->is_array()) {
    add(*parsed);
    return calls;
  }
  for (const Json& json : *parsed)
    if (!add(json)) return {};
  return calls;
}

std::vector<ToolCall> ReadDeepseek(std::string_view text) {
  constexpr std::string_view kSeparator = "<｜tool▁sep｜>";
  const auto at = text.find(kSeparator);
  if (at == text.npos) return {};
  std::string_view name = Trim(text.substr(0, at));
  std::string_view arguments = Trim(text.substr(at + kSeparator.size()));
  if (name == "function") {
    constexpr std::string_view kFence = "```";
    const auto open = arguments.find(kFence);
    if (open == arguments.npos) return {};
    name = Trim(arguments.substr(0, open));
    arguments.remove_prefix(open + kFence.size());
    if (arguments.starts_with("json")) arguments.remove_prefix(4);
    if (const auto close = arguments.rfind(kFence); close != arguments.npos)
      arguments = arguments.substr(0, close);
  }
  const auto parsed = ParseJson(Trim(arguments));
  if (name.empty() || !parsed || !parsed->is_object()) return {};
  return {{std::string(name), DumpJson(*parsed)}};
}

}  // namespace

const ToolTags& TagsOf(ToolFormat format) {
  static constexpr ToolTags kToolCall = {"<tool_call>", "</tool_call>", {}, false};
  static constexpr ToolTags kMistral = {"[TOOL_CALLS]", "", {}, true};
  static constexpr ToolTags kDeepseek = {"<｜tool▁call▁begin｜>",
                                         "<｜tool▁call▁end｜>",
                                         {"<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"},
                                         true};
  switch (format) {
    case ToolFormat::kMistral:
      return kMistral;
    case ToolFormat::kDeepseek:
      return kDeepseek;
    default:
      return kToolCall;
  }
}

std::vector<ToolCall> ReadToolCalls(ToolFormat format, std::string_view text, const Json& tools) {
  switch (format) {
    case ToolFormat::kHermes:
      return ReadHermes(text);
    case ToolFormat::kQwenCoder:
      return ReadQwenCoder(text, tools);
    case ToolFormat::kGlm:
      return ReadGlm(text, tools);
    case ToolFormat::kMistral:
      return ReadMistral(text);
    case ToolFormat::kDeepseek:
      return ReadDeepseek(text);
  }
  return {};
}

}  // namespace elasticmoe::server
