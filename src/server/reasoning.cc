#include "server/reasoning.h"

#include "server/stop_matcher.h"

namespace elasticmoe::server {
namespace {

constexpr std::string_view kOpen = "<think>";
constexpr std::string_view kClose = "</think>";
constexpr std::string_view kSpace = " \t\r\n";

}  // namespace

void ThinkParser::Reasoning(std::string_view text, Output& out) {
  const auto last = text.find_last_not_of(kSpace);
  if (last == text.npos) {
    if (!trims_) space_ += text;
    return;
  }
  if (trims_) text.remove_prefix(text.find_first_not_of(kSpace));
  trims_ = false;
  const auto end = text.find_last_not_of(kSpace) + 1;
  out.reasoning += space_;
  out.reasoning += text.substr(0, end);
  space_ = text.substr(end);
}

ThinkParser::Output ThinkParser::Add(std::string_view text) {
  Output out;
  held_ += text;
  if (state_ == State::kStart) {
    const auto first = std::min(held_.find_first_not_of(kSpace), held_.size());
    const std::string_view rest = std::string_view(held_).substr(first);
    const bool tag = rest.starts_with(kOpen);
    if (!tag && kOpen.starts_with(rest)) return out;  // not known yet
    if (tag) held_.erase(0, first + kOpen.size());
    state_ = tag || open_ ? State::kReasoning : State::kContent;
    trims_ = state_ == State::kReasoning;
  }
  if (state_ == State::kReasoning) {
    const auto close = held_.find(kClose);
    if (close == held_.npos) {
      const std::size_t keep = PartialSuffix(held_, kClose);
      Reasoning(std::string_view(held_).substr(0, held_.size() - keep), out);
      held_.erase(0, held_.size() - keep);
      return out;
    }
    Reasoning(std::string_view(held_).substr(0, close), out);
    held_.erase(0, close + kClose.size());
    space_.clear();
    state_ = State::kContent;
    trims_ = true;
  }
  if (trims_) {
    const auto first = held_.find_first_not_of(kSpace);
    held_.erase(0, std::min(first, held_.size()));
    trims_ = held_.empty();
  }
  out.content += held_;
  held_.clear();
  return out;
}

ThinkParser::Output ThinkParser::Finish() {
  Output out;
  if (state_ == State::kReasoning || (state_ == State::kStart && open_))
    Reasoning(held_, out);
  else
    out.content += held_;
  held_.clear();
  return out;
}

}  // namespace elasticmoe::server
