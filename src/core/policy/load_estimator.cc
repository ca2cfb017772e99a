#include "core/policy/load_estimator.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>
#include <vector>

#include "base/check.h"

namespace elasticmoe::core {
namespace {

constexpr double kAgree = 3;                        // standard deviations
constexpr std::int64_t kSpanBins = 8, kSpans = 64;  // of dispersion: its own deviation is a fifth

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
  for (auto bin = bins_.rbegin(); bin != bins_.rend() && bin->index >= first; ++bin)
    if (bin->index <= last) count += bin->count;
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

double LoadEstimator::Dispersion(TimeNs now) const {
  const std::int64_t end = now / bin_ns_;
  std::array<double, kSpans> counts{};
  for (auto bin = bins_.rbegin(); bin != bins_.rend() && bin->index > end - kSpans * kSpanBins; ++bin)
    if (bin->index <= end)
      counts[static_cast<std::size_t>((end - bin->index) / kSpanBins)] += static_cast<double>(bin->count);
  double sum = counts[0], squares = 0;
  for (std::size_t i = 1; i < counts.size(); ++i) {
    sum += counts[i];
    squares += (counts[i] - counts[i - 1]) * (counts[i] - counts[i - 1]);
  }
  return sum <= 0 ? 1.0 : std::max(1.0, squares / (2 * sum) * kSpans / (kSpans - 1));
}

Load LoadEstimator::Lately(TimeNs now, TimeNs shortest_ns, TimeNs longest_ns, double sigmas) const {
  const std::int64_t end = now / bin_ns_;
  const std::int64_t shortest = std::max<std::int64_t>(1, shortest_ns / bin_ns_);
  const std::int64_t longest = std::max(shortest, longest_ns / bin_ns_);
  std::vector<std::pair<double, double>> shorter;  // seconds, arrivals
  double upper = 0;
  for (std::int64_t span = shortest; span <= longest; span *= 2) {
    const double seconds = static_cast<double>(span * bin_ns_) * 1e-9;
    const auto count = static_cast<double>(CountIn(end - span + 1, end));
    const double rate = count / seconds;
    const bool agrees = std::ranges::all_of(shorter, [&](const auto& one) {
      const double expected = rate * one.first;
      return std::abs(one.second - expected) <= kAgree * std::sqrt(std::max(1.0, expected));
    });
    if (!agrees) break;
    upper = rate + sigmas * std::sqrt(count) / seconds;
    shorter.emplace_back(seconds, count);
  }
  return WithRate(upper);
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
