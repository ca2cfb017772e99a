#include "server/harmony.h"

#include <algorithm>
#include <array>

#include "base/json.h"
#include "server/stop_matcher.h"

namespace elasticmoe::server {
namespace {

constexpr std::string_view kChannel = "<|channel|>";
constexpr std::string_view kMessage = "<|message|>";
constexpr std::string_view kStart = "<|start|>";
// The last two begin the next message.
constexpr std::array<std::string_view, 5> kEnds = {"<|end|>", "<|call|>", "<|return|>", kStart, kChannel};
// How a header begins: anything else is text without one. The first header follows a prompt that ends in
// "<|start|>assistant".
constexpr std::array<std::string_view, 5> kHeaderStarts = {kChannel, kStart, kMessage, "assistant", "to="};
constexpr std::string_view kFunctions = "functions.";
constexpr std::string_view kSpace = " \t\r\n";

std::string_view TrimFront(std::string_view text) {
  return text.substr(std::min(text.find_first_not_of(kSpace), text.size()));
}

// The word behind `key`, up to white space or a tag; "" where there is none.
std::string_view WordAfter(std::string_view text, std::string_view key) {
  const auto at = text.find(key);
  if (at == text.npos) return {};
  text.remove_prefix(at + key.size());
  return text.substr(0, std::min(text.find_first_of(" \t\r\n<"), text.size()));
}

}  // namespace

void HarmonyParser::ReadHeader(std::string_view header) {
  const std::string_view channel = WordAfter(header, kChannel);
  const std::string_view recipient = WordAfter(header, "to=");
  if (recipient.starts_with(kFunctions)) {
    kind_ = Kind::kCall;
    name_ = recipient.substr(kFunctions.size());
    arguments_.clear();
    return;
  }
  // What goes to a tool of the model's own is none of the client's calls.
  kind_ = channel == "analysis" || !recipient.empty() ? Kind::kReasoning : Kind::kContent;
}

void HarmonyParser::Body(std::string_view text, Output& out) {
  switch (kind_) {
    case Kind::kReasoning:
      out.reasoning += text;
      return;
    case Kind::kContent:
      out.content += text;
      return;
    case Kind::kCall:
      arguments_ += text;
      return;
  }
}

void HarmonyParser::EndMessage(Output& out) {
  if (kind_ != Kind::kCall) return;
  kind_ = Kind::kContent;
  if (arguments_.find_first_not_of(kSpace) == arguments_.npos) arguments_ = "{}";
  const auto parsed = ParseJson(arguments_);
  if (!parsed || !parsed->is_object()) {
    out.content += arguments_;
    return;
  }
  if (!parallel_ && count_ > 0) return;
  out.calls.push_back({std::move(name_), DumpJson(*parsed)});
  ++count_;
}

// Whether there is more to do with what is held.
bool HarmonyParser::StepHeader() {
  const auto message = held_.find(kMessage);
  const std::string_view front = TrimFront(held_);
  const bool header = std::ranges::any_of(kHeaderStarts, [&](std::string_view start) {
    return front.starts_with(start) || start.starts_with(front);
  });
  if (!header) {  // text without a header
    kind_ = Kind::kContent;
    state_ = State::kBody;
    return true;
  }
  if (message == held_.npos) return false;
  ReadHeader(std::string_view(held_).substr(0, message));
  held_.erase(0, message + kMessage.size());
  state_ = State::kBody;
  return true;
}

bool HarmonyParser::StepBody(Output& out) {
  std::size_t at = held_.npos, keep = 0;
  std::string_view tag;
  for (const std::string_view end : kEnds) {
    if (const auto found = held_.find(end); found < at) {
      at = found;
      tag = end;
    }
    keep = std::max(keep, PartialSuffix(held_, end));
  }
  if (at == held_.npos) {
    Body(std::string_view(held_).substr(0, held_.size() - keep), out);
    held_.erase(0, held_.size() - keep);
    return false;
  }
  Body(std::string_view(held_).substr(0, at), out);
  held_.erase(0, tag == kStart || tag == kChannel ? at : at + tag.size());
  EndMessage(out);
  state_ = State::kHeader;
  return !held_.empty();
}

HarmonyParser::Output HarmonyParser::Add(std::string_view text) {
  Output out;
  held_ += text;
  while (!held_.empty() && (state_ == State::kHeader ? StepHeader() : StepBody(out))) {
  }
  return out;
}

HarmonyParser::Output HarmonyParser::Finish() {
  Output out;
  if (state_ == State::kBody) {
    Body(held_, out);
    EndMessage(out);
  } else if (held_.find("<|") == held_.npos) {
    out.content += held_;  // the beginning of a text that looks like a header's
  }
  held_.clear();
  state_ = State::kHeader;
  return out;
}

}  // namespace elasticmoe::server
