#include "server/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace elasticmoe::server {

std::size_t PartialSuffix(std::string_view text, std::string_view pattern) {
  for (std::size_t n = std::min(text.size(), pattern.size() - 1); n > 0; --n)
    if (text.ends_with(pattern.substr(0, n))) return n;
  return 0;
}

StopMatcher::StopMatcher(std::vector<std::string> stops, bool include)
    : stops_(std::move(stops)), include_(include) {}

std::string StopMatcher::Add(std::string_view text) {
  if (Matched()) return {};
  if (stops_.empty()) return std::string(text);
  held_ += text;
  std::size_t end = std::string::npos;
  for (std::size_t i = 0; i < stops_.size(); ++i) {
    const std::size_t at = held_.find(stops_[i]);
    if (at == held_.npos) continue;
    const std::size_t this_end = at + stops_[i].size();
    if (this_end < end || (this_end == end && stops_[i].size() > Match().size())) {
      end = this_end;
      matched_ = static_cast<int>(i);
    }
  }
  if (Matched()) {
    held_.resize(include_ ? end : end - Match().size());
    return std::exchange(held_, {});
  }
  std::size_t keep = 0;
  for (const std::string& stop : stops_) keep = std::max(keep, PartialSuffix(held_, stop));
  std::string certain = held_.substr(0, held_.size() - keep);
  held_.erase(0, certain.size());
  return certain;
}

std::string StopMatcher::Pass(std::string_view text) {
  if (Matched()) return {};
  held_ += text;
  return std::exchange(held_, {});
}

std::string StopMatcher::Finish() {
  return Matched() ? std::string() : std::exchange(held_, {});
}

}  // namespace elasticmoe::server
