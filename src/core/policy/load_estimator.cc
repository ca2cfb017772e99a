#include "core/policy/load_estimator.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"

namespace elasticmoe::core {
namespace {

void Fade(double& mean, double value, std::uint64_t count) {
  mean += (value - mean) / static_cast<double>(std::min<std::uint64_t>(count, 256));
}

}  // namespace

LoadEstimator::LoadEstimator(TimeNs bin_ns, TimeNs keep_ns) : bin_ns_(bin_ns), keep_ns_(keep_ns) {
  EM_CHECK(bin_ns > 0 && keep_ns >= bin_ns, "bin {} ns, keep {} ns", bin_ns, keep_ns);
}

void LoadEstimator::Arrived(TimeNs at, int prompt_tokens) {
  Advance(at);
  last_arrival_ = std::max(last_arrival_, at);
  const std::int64_t index = at / bin_ns_;
  if (bins_.empty() || bins_.back().index < index) bins_.push_back({index, 0});
  ++bins_.back().count;  // an arrival reported late counts now
  ++prompts_;
  Fade(prompt_, prompt_tokens, prompts_);
  Fade(prompt_square_, static_cast<double>(prompt_tokens) * prompt_tokens, prompts_);
}

void LoadEstimator::Finished(int output_tokens) {
  ++outputs_;
  Fade(output_, output_tokens, outputs_);
}

void LoadEstimator::Advance(TimeNs now) {
  if (first_ < 0) first_ = now;
  while (!bins_.empty() && bins_.front().index * bin_ns_ < now - keep_ns_) bins_.pop_front();
}

std::uint64_t LoadEstimator::CountIn(std::int64_t first, std::int64_t last) const {
  std::uint64_t count = 0;
  for (const Bin& bin : bins_)
    if (bin.index >= first && bin.index <= last) count += bin.count;
  return count;
}

Load LoadEstimator::WithRate(double requests_s) const {
  Load load{requests_s, prompt_, output_, prompt_square_};
  // Before the first request ends its length is not known; as long as the prompt is a guess that the first
  // end mends.
  if (outputs_ == 0) load.output_tokens = prompt_;
  return load;
}

Load LoadEstimator::Upper(TimeNs now, TimeNs window_ns, double sigmas) const {
  return Highest(now, window_ns, 0, sigmas);
}

Load LoadEstimator::Rising(TimeNs now, TimeNs window_ns, double sigmas) const {
  Load load = Upper(now, window_ns, sigmas);
  const std::int64_t end = now / bin_ns_;
  const std::int64_t width = std::max<std::int64_t>(1, window_ns / bin_ns_);
  for (const std::int64_t part : {width / 2, width / 4, width / 8}) {
    if (part < 1) continue;
    const auto count = static_cast<double>(CountIn(end - part + 1, end));
    const double bins = static_cast<double>(part);
    const auto rest = static_cast<double>(CountIn(end - width + 1, end - part));
    const double rest_bins = static_cast<double>(width - part);
    const double deviation = std::sqrt(count / (bins * bins) + rest / (rest_bins * rest_bins));
    if (count / bins - rest / rest_bins > 3 * deviation)
      load.requests_s = std::max(load.requests_s, (count + sigmas * std::sqrt(count)) /
                                                      (bins * static_cast<double>(bin_ns_) * 1e-9));
  }
  return load;
}

Load LoadEstimator::Highest(TimeNs now, TimeNs window_ns, TimeNs since_ns, double sigmas) const {
  if (first_ < 0) return WithRate(0);
  const std::int64_t width = std::max<std::int64_t>(1, std::min(window_ns, keep_ns_) / bin_ns_);
  const std::int64_t end = now / bin_ns_;
  const std::int64_t ends = std::min(since_ns, keep_ns_) / bin_ns_;
  std::uint64_t most = 0;
  // Windows that end with an arrival are enough: another holds no more than one of them.
  std::uint64_t held = 0;
  auto oldest = bins_.begin();
  for (const Bin& bin : bins_) {
    if (bin.index > end) break;
    held += bin.count;
    for (; oldest->index <= bin.index - width; ++oldest) held -= oldest->count;
    if (bin.index >= end - ends) most = std::max(most, held);
  }
  most = std::max(most, CountIn(end - width + 1, end));
  const double count = static_cast<double>(most);
  return WithRate((count + sigmas * std::sqrt(count)) / (static_cast<double>(width * bin_ns_) * 1e-9));
}

TimeNs LoadEstimator::SinceLastArrival(TimeNs now) const {
  return now - std::max(last_arrival_, std::max<TimeNs>(first_, 0));
}

}  // namespace elasticmoe::core
