#include "runtime/coordinator/resize_trace.h"

#include <gtest/gtest.h>

#include <set>

namespace elasticmoe::runtime {
namespace {

TEST(ResizeTrace, IsAChromeTraceOfTheOperation) {
  ResizeTrace trace;
  trace.Add({"lost", "engine", 1, 2});  // no operation yet
  trace.Begin("one");
  trace.Add({"prepare", "memory", 5'000, 9'000, {{"stage", 0}}});
  trace.Add({"commit", "engine", 9'000, 12'500});
  trace.Add({"first token", "device 1", 13'000, 13'000});
  const auto json = trace.Find("one");
  ASSERT_TRUE(json);
  std::set<std::pair<int, std::string>> lanes;
  int spans = 0, moments = 0;
  for (const Json& event : json->at("traceEvents")) {
    const std::string ph = event.at("ph").get<std::string>();
    EXPECT_TRUE(event.at("pid").is_number_integer() && event.at("tid").is_number_integer());
    if (ph == "M") {
      if (event.at("name") == "thread_name")
        lanes.emplace(event.at("tid").get<int>(), event.at("args").at("name").get<std::string>());
      continue;
    }
    EXPECT_GE(event.at("ts").get<double>(), 0.0);
    if (ph == "X") ++spans;
    if (ph == "i") ++moments;
    if (event.at("name") == "commit") {
      EXPECT_DOUBLE_EQ(event.at("ts").get<double>(), 4.0);
      EXPECT_DOUBLE_EQ(event.at("dur").get<double>(), 3.5);
    }
  }
  EXPECT_EQ(spans, 2);
  EXPECT_EQ(moments, 1);
  EXPECT_EQ(lanes.size(), 3u);
  EXPECT_FALSE(trace.Find("two"));
}

TEST(ResizeTrace, KeepsTheLastOperations) {
  ResizeTrace trace;
  for (int i = 0; i < 100; ++i) trace.Begin(std::to_string(i));
  EXPECT_FALSE(trace.Find("0"));
  EXPECT_TRUE(trace.Find("99"));
}

}  // namespace
}  // namespace elasticmoe::runtime
