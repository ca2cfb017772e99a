#include <gtest/gtest.h>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/rng.h"

namespace elasticmoe {
namespace {

TEST(Json, NamesThePlaceOfASyntaxError) {
  auto value = ParseJson("{\"a\": 1,}");
  ASSERT_FALSE(value);
  EXPECT_EQ(value.error().code, ErrorCode::kInvalidArgument);
  EXPECT_NE(value.error().message.find("line 1"), std::string::npos) << value.error().message;
}

TEST(Json, RefusesDeepNestingBeforeParsing) {
  EXPECT_FALSE(ParseJson(std::string(100'000, '[')));
  EXPECT_TRUE(ParseJson("[\"[[[[[[\"]", 1));
}

TEST(Json, TheLastOfRepeatedKeysCountsAtTheFirstPlace) {
  EXPECT_EQ(DumpJson(*ParseJson("{\"b\":1,\"a\":[2],\"b\":{\"c\":3,\"c\":4},\"d\":5}")),
            "{\"b\":{\"c\":4},\"a\":[2],\"d\":5}");
}

TEST(Json, ReadsEveryKindOfValue) {
  const std::string text = "[null,true,-3,18446744073709551615,0.5,\"x\\u00e9\",[],{},[[{\"a\":[{}]}]]]";
  EXPECT_EQ(DumpJson(*ParseJson(text)),
            "[null,true,-3,18446744073709551615,0.5,\"x\xc3\xa9\",[],{},[[{\"a\":[{}]}]]]");
  EXPECT_EQ(*ParseJson(" 7 "), 7);
  EXPECT_FALSE(ParseJson(""));
  EXPECT_FALSE(ParseJson("1 2"));
  EXPECT_FALSE(ParseJson("[1e999]"));
}

// With a search per key this would be 2e10 comparisons.
TEST(Json, ManyKeysAreNotQuadratic) {
  std::string text = "{";
  for (int i = 0; i < 200'000; ++i) text += fmt::format("{}\"{}\":{}", i == 0 ? "" : ",", i, i);
  auto value = ParseJson(text + "}");
  ASSERT_TRUE(value);
  EXPECT_EQ(value->size(), 200'000U);
}

TEST(Json, KeepsKeyOrderAndReplacesInvalidUtf8) {
  EXPECT_EQ(DumpJson(*ParseJson("{\"b\":1,\"a\":2}")), "{\"b\":1,\"a\":2}");
  EXPECT_EQ(DumpJson(Json("\xff")), "\"\xef\xbf\xbd\"");
}

TEST(Rng, ValueDependsOnSeedAndCounterAlone) {
  Rng a(7);
  a.Next();
  EXPECT_EQ(a.Next(), RandomAt(7, 1));
  EXPECT_NE(RandomAt(7, 1), RandomAt(8, 1));
  EXPECT_LT(UniformAt(7, 1), 1.0);
}

TEST(File, ReportsAMissingFileByName) {
  auto text = ReadFile("/nonexistent/config.json");
  ASSERT_FALSE(text);
  EXPECT_EQ(text.error().code, ErrorCode::kNotFound);
  EXPECT_NE(text.error().message.find("/nonexistent/config.json"), std::string::npos);
}

}  // namespace
}  // namespace elasticmoe
