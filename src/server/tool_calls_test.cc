#include "server/tool_calls.h"

#include <gtest/gtest.h>

namespace elasticmoe::server {
namespace {

struct Outcome {
  std::string content;
  std::vector<std::string> calls;  // "name arguments"
  bool operator==(const Outcome&) const = default;
};

Outcome Feed(std::string_view text, std::size_t piece, bool parallel = true) {
  ToolCallParser parser(ToolFormat::kHermes, parallel, nullptr);
  Outcome out;
  const auto take = [&](const ToolCallParser::Output& part) {
    out.content += part.content;
    for (const ToolCall& call : part.calls) out.calls.push_back(call.name + " " + call.arguments);
  };
  for (std::size_t at = 0; at < text.size(); at += piece) take(parser.Add(text.substr(at, piece)));
  take(parser.Finish());
  return out;
}

class ToolCallCuts : public testing::TestWithParam<std::size_t> {};
INSTANTIATE_TEST_SUITE_P(Pieces, ToolCallCuts, testing::Values(1, 2, 3, 7, 1000));

TEST_P(ToolCallCuts, FindsCallsBetweenContent) {
  EXPECT_EQ(Feed("Let me look.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": "
                 "\"Paris\"}}\n</tool_call>\n"
                 "<tool_call>{\"name\":\"time\",\"arguments\":{}}</tool_call>\n",
                 GetParam()),
            (Outcome{"Let me look.", {R"(weather {"city":"Paris"})", "time {}"}}));
}

TEST_P(ToolCallCuts, LeavesPlainTextAlone) {
  EXPECT_EQ(Feed("a < b, <tool> \n x \n", GetParam()), (Outcome{"a < b, <tool> \n x \n", {}}));
}

TEST_P(ToolCallCuts, GivesBackWhatIsNoCall) {
  EXPECT_EQ(Feed("<tool_call>{broken</tool_call> end", GetParam()),
            (Outcome{"<tool_call>{broken</tool_call> end", {}}));
  EXPECT_EQ(Feed("x <tool_call>[1]", GetParam()), (Outcome{"x <tool_call>[1]", {}}));
}

TEST_P(ToolCallCuts, TakesACallWhoseClosingTagIsMissing) {
  EXPECT_EQ(Feed("<tool_call>{\"name\":\"f\",\"arguments\":\"{\\\"a\\\":1}\"}", GetParam()),
            (Outcome{"", {"f {\"a\":1}"}}));
}

TEST_P(ToolCallCuts, OnlyTheFirstCallCountsWhereCallsAreNotParallel) {
  EXPECT_EQ(Feed("<tool_call>{\"name\":\"a\"}</tool_call><tool_call>{\"name\":\"b\"}</tool_call>", GetParam(),
                 false),
            (Outcome{"", {"a {}"}}));
}

}  // namespace
}  // namespace elasticmoe::server
