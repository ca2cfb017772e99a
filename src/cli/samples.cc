#include "cli/samples.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"

namespace elasticmoe::cli {

void Samples::Add(double value) {
  min_ = count_ == 0 ? value : std::min(min_, value);
  max_ = count_ == 0 ? value : std::max(max_, value);
  sum_ += value;
  ++count_;
  if (values_.size() < limit_) {
    values_.push_back(value);
  } else if (const std::uint64_t at = rng_.Below(count_); at < limit_) {
    values_[at] = value;
  } else {
    return;
  }
  sorted_ = false;
}

double Samples::Percentile(double percent) {
  EM_CHECK(count_ > 0 && percent >= 0 && percent <= 100, "count={} percent={}", count_, percent);
  if (!sorted_) std::ranges::sort(values_);
  sorted_ = true;
  if (percent == 100) return max_;
  const double rank = percent / 100 * static_cast<double>(values_.size() - 1);
  const auto below = static_cast<std::size_t>(rank);
  const std::size_t above = std::min(below + 1, values_.size() - 1);
  return values_[below] + (values_[above] - values_[below]) * (rank - std::floor(rank));
}

Json Samples::ToJson() {
  Json out = Json::object();
  const bool any = count_ > 0;
  out["mean"] = any ? Json(Mean()) : Json();
  out["min"] = any ? Json(Min()) : Json();
  for (const int percent : {50, 90, 95, 99})
    out[fmt::format("p{}", percent)] = any ? Json(Percentile(percent)) : Json();
  out["max"] = any ? Json(Max()) : Json();
  return out;
}

}  // namespace elasticmoe::cli
