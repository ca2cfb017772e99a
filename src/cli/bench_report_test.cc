#include "cli/bench_report.h"

#include <gtest/gtest.h>

namespace elasticmoe::cli {
namespace {

TEST(MachineLimits, TheLongerOfReadingAndComputingIsTheLimit) {
  const MachineLimits limits{.bytes_per_s = 10, .operations_per_s = 100};
  EXPECT_DOUBLE_EQ(2, limits.Seconds({.operations = 100, .bytes = 20}));
  EXPECT_DOUBLE_EQ(3, limits.Seconds({.operations = 300, .bytes = 20}));
}

TEST(MachineLimits, AnUnknownPeakLimitsNothing) {
  const MachineLimits limits{.bytes_per_s = 10};
  EXPECT_DOUBLE_EQ(2, limits.Seconds({.operations = 1e9, .bytes = 20}));
  EXPECT_TRUE(RatesOf({.operations = 1, .bytes = 1}, 1, limits)["of_peak"].is_null());
}

TEST(MachineLimits, RaiseKeepsTheBetterOfEach) {
  MachineLimits limits{.bytes_per_s = 10, .operations_per_s = 100};
  limits.Raise({.bytes_per_s = 20, .operations_per_s = 50});
  EXPECT_DOUBLE_EQ(20, limits.bytes_per_s);
  EXPECT_DOUBLE_EQ(100, limits.operations_per_s);
}

TEST(RatesOf, FractionsAreOfTheLimits) {
  const Json rates =
      RatesOf({.operations = 100, .bytes = 20}, 4, {.bytes_per_s = 10, .operations_per_s = 100});
  EXPECT_DOUBLE_EQ(4000, rates["ms"].get<double>());
  EXPECT_DOUBLE_EQ(0.25, rates["of_peak"].get<double>());
  EXPECT_DOUBLE_EQ(0.5, rates["of_bandwidth"].get<double>());
  EXPECT_DOUBLE_EQ(0.5, rates["limit_fraction"].get<double>());
}

TEST(AlignColumns, FirstToTheLeftOthersToTheRight) {
  EXPECT_EQ("        ms\n  a    1.5\n  bcd   20\n", AlignColumns({{"", "ms"}, {"a", "1.5"}, {"bcd", "20"}}));
}

TEST(Median, IsTheMiddleOrBetweenTheTwo) {
  EXPECT_DOUBLE_EQ(2, Median({3, 1, 2}));
  EXPECT_DOUBLE_EQ(2.5, Median({4, 1, 2, 3}));
}

}  // namespace
}  // namespace elasticmoe::cli
