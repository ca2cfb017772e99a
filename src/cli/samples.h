// A distribution kept as its samples: percentiles are exact until `limit` samples, beyond that they are those
// of a uniform sample of that size (reservoir, by seed). Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/json.h"
#include "base/rng.h"

namespace elasticmoe::cli {

class Samples {
 public:
  explicit Samples(std::size_t limit = 4'000'000, std::uint64_t seed = 1) : limit_(limit), rng_(seed) {}

  void Add(double value);

  std::uint64_t Count() const { return count_; }
  // These three are exact whatever the count. REQUIRES: Count() > 0.
  double Mean() const { return sum_ / static_cast<double>(count_); }
  double Min() const { return min_; }
  double Max() const { return max_; }
  // Linear between the two nearest ranks (numpy's default). `percent` in [0, 100]. Sorts. REQUIRES: Count() >
  // 0.
  double Percentile(double percent);

  // {mean, min, p50, p90, p95, p99, max}; all null where there are no samples.
  Json ToJson();

 private:
  std::size_t limit_;
  Rng rng_;
  std::vector<double> values_;
  bool sorted_ = true;
  std::uint64_t count_ = 0;
  double sum_ = 0, min_ = 0, max_ = 0;
};

}  // namespace elasticmoe::cli
