// Stop strings in text that arrives in pieces. What could still become a stop string is held back, so that
// a client never sees a part of one. The result does not depend on how the text was cut. Pure.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace elasticmoe::server {

class StopMatcher {
 public:
  // REQUIRES: no empty string in `stops`. `include`: the stop string itself is given out too.
  StopMatcher(std::vector<std::string> stops, bool include);

  // The text that is certain now. The match that ends first counts; of those the longest. After a match
  // nothing comes any more.
  std::string Add(std::string_view text);
  // Like Add, but nothing in `text` counts as a match (min_tokens is not reached).
  std::string Pass(std::string_view text);
  // What was held back: the text is over.
  std::string Finish();

  bool Matched() const { return matched_ >= 0; }
  const std::string& Match() const {
    return stops_[static_cast<std::size_t>(matched_)];
  }  // REQUIRES: Matched()

 private:
  std::vector<std::string> stops_;
  bool include_;
  int matched_ = -1;
  std::string held_;
};

// Length of the longest end of `text` that is a proper beginning of `pattern`.
std::size_t PartialSuffix(std::string_view text, std::string_view pattern);

}  // namespace elasticmoe::server
