#include "server/tool_calls.h"

#include <algorithm>

#include "server/stop_matcher.h"

namespace elasticmoe::server {
namespace {

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

bool ToolCallParser::Calls(std::string_view text, Output& out) {
  auto calls = ReadToolCalls(format_, text, tools_);
  if (calls.empty()) return false;
  space_.clear();
  for (ToolCall& call : calls) {
    if (!parallel_ && count_ > 0) break;
    out.calls.push_back(std::move(call));
    ++count_;
  }
  return true;
}

bool ToolCallParser::NextTag(Output& out) {
  std::size_t at = held_.npos, keep = 0;
  std::string_view tag;
  const auto look = [&](std::string_view candidate) {
    if (candidate.empty()) return;
    if (const auto found = held_.find(candidate); found < at) {
      at = found;
      tag = candidate;
    }
    keep = std::max(keep, PartialSuffix(held_, candidate));
  };
  look(tags_.open);
  for (const std::string_view silent : tags_.silent) look(silent);
  if (at == held_.npos) {
    Content(std::string_view(held_).substr(0, held_.size() - keep), out);
    held_.erase(0, held_.size() - keep);
    return false;
  }
  Content(std::string_view(held_).substr(0, at), out);
  held_.erase(0, at + tag.size());
  inside_ = tag == tags_.open;
  return true;
}

ToolCallParser::Output ToolCallParser::Add(std::string_view text) {
  Output out;
  held_ += text;
  for (;;) {
    if (!inside_) {
      if (!NextTag(out)) return out;
      continue;
    }
    // A call without a closing tag ends where the next begins.
    const std::string_view end = tags_.close.empty() ? tags_.open : tags_.close;
    const auto close = held_.find(end);
    if (close == held_.npos) return out;
    const std::size_t taken = tags_.close.empty() ? close : close + end.size();
    if (!Calls(std::string_view(held_).substr(0, close), out))
      Content(std::string(tags_.open) + held_.substr(0, taken), out);
    held_.erase(0, taken);
    inside_ = false;
  }
}

ToolCallParser::Output ToolCallParser::Finish() {
  Output out;
  if (inside_) {
    // A stop id may come in place of the closing tag.
    if (!Calls(held_, out)) Content(std::string(tags_.open) + held_, out);
  } else {
    Content(held_, out);
  }
  held_.clear();
  if (count_ == 0) out.content += space_;
  space_.clear();
  return out;
}

}  // namespace elasticmoe::server
