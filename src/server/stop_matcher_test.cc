#include "server/stop_matcher.h"

#include <gtest/gtest.h>

#include "base/rng.h"

namespace elasticmoe::server {
namespace {

struct Outcome {
  std::string text;
  std::string match;
  bool operator==(const Outcome&) const = default;
};

Outcome Feed(const std::vector<std::string>& pieces, const std::vector<std::string>& stops,
             bool include = false) {
  StopMatcher matcher(stops, include);
  Outcome out;
  for (const auto& piece : pieces) out.text += matcher.Add(piece);
  out.text += matcher.Finish();
  if (matcher.Matched()) out.match = matcher.Match();
  return out;
}

TEST(StopMatcher, CutsBeforeTheStopString) {
  EXPECT_EQ(Feed({"hello wor", "ld END more"}, {"END"}), (Outcome{"hello world ", "END"}));
  EXPECT_EQ(Feed({"hello END"}, {"END"}, true), (Outcome{"hello END", "END"}));
  EXPECT_EQ(Feed({"no stop here"}, {"END"}), (Outcome{"no stop here", ""}));
}

TEST(StopMatcher, HoldsBackOnlyWhatMayBecomeAStop) {
  StopMatcher matcher({"\n\nUser:"}, false);
  EXPECT_EQ(matcher.Add("text\n"), "text");
  EXPECT_EQ(matcher.Add("more"), "\nmore");
  EXPECT_EQ(matcher.Add("\n\nUse"), "");
  EXPECT_EQ(matcher.Add("d"), "\n\nUsed");
  EXPECT_EQ(matcher.Add("\n\n"), "");
  EXPECT_EQ(matcher.Finish(), "\n\n");
}

TEST(StopMatcher, GivesNothingAfterAMatch) {
  StopMatcher matcher({"X"}, false);
  EXPECT_EQ(matcher.Add("aXb"), "a");
  EXPECT_EQ(matcher.Add("c"), "");
  EXPECT_EQ(matcher.Finish(), "");
}

TEST(StopMatcher, DoesNotMatchWhatPassed) {
  StopMatcher matcher({"END"}, false);
  EXPECT_EQ(matcher.Pass("END"), "END");
  EXPECT_EQ(matcher.Add("!"), "!");
  EXPECT_FALSE(matcher.Matched());
}

TEST(StopMatcher, TheOneThatEndsFirstCountsAndOfThoseTheLongest) {
  EXPECT_EQ(Feed({"xabcd"}, {"abcd", "bc"}), (Outcome{"xa", "bc"}));
  EXPECT_EQ(Feed({"xabc"}, {"bc", "abc", "c"}), (Outcome{"x", "abc"}));
}

TEST(StopMatcher, DoesNotDependOnHowTheTextIsCut) {
  const std::uint64_t seed = 7;
  SCOPED_TRACE(seed);
  Rng rng(seed);
  const auto word = [&](std::uint64_t max) {
    std::string text;
    for (std::uint64_t n = 1 + rng.Below(max); n > 0; --n) text += static_cast<char>('a' + rng.Below(3));
    return text;
  };
  int matches = 0;
  for (int round = 0; round < 2000; ++round) {
    std::vector<std::string> stops;
    for (std::uint64_t n = 1 + rng.Below(3); n > 0; --n) stops.push_back(word(5) + word(2));
    const std::string text = word(24);
    std::vector<std::string> pieces, bytes;
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t n = 1 + rng.Below(5);
      pieces.push_back(text.substr(at, n));
      at += n;
    }
    for (char c : text) bytes.emplace_back(1, c);
    const bool include = rng.Below(2) == 1;
    const Outcome whole = Feed({text}, stops, include);
    EXPECT_EQ(Feed(pieces, stops, include), whole) << text;
    EXPECT_EQ(Feed(bytes, stops, include), whole) << text;
    EXPECT_TRUE(text.starts_with(whole.text));
    matches += !whole.match.empty();
  }
  EXPECT_GT(matches, 200);
}

}  // namespace
}  // namespace elasticmoe::server
