#include "compute/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace elasticmoe::compute {
namespace {

constexpr double kTurn = 2 * std::numbers::pi;

// YaRN (arXiv 2309.00071): pairs that turn often over the original context keep their frequency, pairs that
// turn seldom are interpolated, between them a ramp over the pair's index.
void Yarn(const core::AttentionSpec& attention, std::vector<double>& frequencies) {
  const core::RopeSpec& rope = attention.rope;
  const int dim = attention.RopeDim();
  const auto pair_of = [&](double turns) {
    return dim * std::log(rope.original_positions / (turns * kTurn)) / (2 * std::log(attention.rope_theta));
  };
  double low = pair_of(rope.beta_fast), high = pair_of(rope.beta_slow);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1.0);
  if (low == high) high += 0.001;  // a step instead of a ramp
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    const double divided = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    frequencies[i] *= divided / rope.factor + (1 - divided);
  }
}

// Llama 3.1's rule: the same by wavelength, the ramp over turns.
void Llama3(const core::RopeSpec& rope, std::vector<double>& frequencies) {
  for (double& frequency : frequencies) {
    const double turns = rope.original_positions * frequency / kTurn;
    const double kept =
        std::clamp((turns - rope.low_frequency) / (rope.high_frequency - rope.low_frequency), 0.0, 1.0);
    frequency *= (1 - kept) / rope.factor + kept;
  }
}

}  // namespace

std::vector<float> RopeFrequencies(const core::AttentionSpec& attention) {
  const int dim = attention.RopeDim();
  std::vector<double> frequencies(dim / 2);
  for (std::size_t i = 0; i < frequencies.size(); ++i)
    frequencies[i] = std::pow(attention.rope_theta, -2.0 * static_cast<double>(i) / dim);
  switch (attention.rope.scaling) {
    case core::RopeSpec::Scaling::kNone:
      break;
    case core::RopeSpec::Scaling::kLinear:
      for (double& frequency : frequencies) frequency /= attention.rope.factor;
      break;
    case core::RopeSpec::Scaling::kYarn:
      Yarn(attention, frequencies);
      break;
    case core::RopeSpec::Scaling::kLlama3:
      Llama3(attention.rope, frequencies);
      break;
  }
  return {frequencies.begin(), frequencies.end()};
}

Rope::Rope(const core::AttentionSpec& attention)
    : interleaved_(attention.rope.interleaved),
      amplitude_(static_cast<float>(attention.rope.amplitude)),
      frequencies_(RopeFrequencies(attention)) {}

void Rope::Grow(int positions, int limit) {
  const std::size_t half = frequencies_.size();
  int position = static_cast<int>(cos_.size() / half);
  if (position >= positions) return;
  const int end = std::min(limit, (positions + 1023) / 1024 * 1024);
  cos_.resize(end * half);
  sin_.resize(end * half);
  for (; position < end; ++position) {
    for (std::size_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(position) * frequencies_[i];
      cos_[position * half + i] = std::cos(angle) * amplitude_;
      sin_[position * half + i] = std::sin(angle) * amplitude_;
    }
  }
}

void Rope::Turn(float* x, int position) const {
  const int half = static_cast<int>(frequencies_.size());
  const float* cosines = &cos_[std::size_t(position) * half];
  const float* sines = &sin_[std::size_t(position) * half];
  const int step = interleaved_ ? 2 : 1, apart = interleaved_ ? 1 : half;
  for (int i = 0; i < half; ++i) {
    const float a = x[i * step];
    const float b = x[i * step + apart];
    x[i * step] = a * cosines[i] - b * sines[i];
    x[i * step + apart] = b * cosines[i] + a * sines[i];
  }
}

}  // namespace elasticmoe::compute
