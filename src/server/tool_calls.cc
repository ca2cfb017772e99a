#include "server/tool_calls.h"

#include "server/stop_matcher.h"

namespace elasticmoe::server {
namespace {

constexpr std::string_view kOpen = "<tool_call>";
constexpr std::string_view kClose = "</tool_call>";
constexpr std::string_view kSpace = " \t\r\n";

}  // namespace

void ToolCallParser::Content(std::string_view text, Output& out) {
  const auto last = text.find_last_not_of(kSpace);
  if (last == text.npos) {
    space_ += text;
    return;
  }
  out.content += space_;
  out.content += text.substr(0, last + 1);
  space_ = text.substr(last + 1);
}

bool ToolCallParser::Call(std::string_view text, Output& out) {
  auto parsed = ParseJson(text);
  if (!parsed || !parsed->is_object()) return false;
  const auto name = parsed->find("name");
  if (name == parsed->end() || !name->is_string()) return false;
  auto arguments = parsed->find("arguments");
  if (arguments == parsed->end()) arguments = parsed->find("parameters");
  ToolCall call{.name = name->get<std::string>(), .arguments = "{}"};
  if (arguments != parsed->end())
    call.arguments = arguments->is_string() ? arguments->get<std::string>() : DumpJson(*arguments);
  space_.clear();
  if (parallel_ || count_ == 0) {
    out.calls.push_back(std::move(call));
    ++count_;
  }
  return true;
}

ToolCallParser::Output ToolCallParser::Add(std::string_view text) {
  Output out;
  held_ += text;
  for (;;) {
    if (!inside_) {
      const auto open = held_.find(kOpen);
      if (open == held_.npos) {
        const std::size_t keep = PartialSuffix(held_, kOpen);
        Content(std::string_view(held_).substr(0, held_.size() - keep), out);
        held_.erase(0, held_.size() - keep);
        return out;
      }
      Content(std::string_view(held_).substr(0, open), out);
      held_.erase(0, open + kOpen.size());
      inside_ = true;
    }
    const auto close = held_.find(kClose);
    if (close == held_.npos) return out;
    if (!Call(std::string_view(held_).substr(0, close), out))
      Content(std::string(kOpen) + held_.substr(0, close + kClose.size()), out);
    held_.erase(0, close + kClose.size());
    inside_ = false;
  }
}

ToolCallParser::Output ToolCallParser::Finish() {
  Output out;
  if (inside_) {
    // A stop id may come in place of the closing tag.
    if (!Call(held_, out)) Content(std::string(kOpen) + held_, out);
  } else {
    Content(held_, out);
  }
  held_.clear();
  if (count_ == 0) out.content += space_;
  space_.clear();
  return out;
}

}  // namespace elasticmoe::server
