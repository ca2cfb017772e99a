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
