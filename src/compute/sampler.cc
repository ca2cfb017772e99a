#include "compute/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "base/rng.h"

namespace elasticmoe::compute {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Larger logit first; equal ones: the lower id. A total order, so that nothing depends on a sort's whim.
bool Better(std::pair<float, TokenId> a, std::pair<float, TokenId> b) {
  return a.first != b.first ? a.first > b.first : a.second < b.second;
}

TokenId ArgMax(std::span<const float> logits) {
  TokenId best = 0;
  for (std::size_t i = 1; i < logits.size(); ++i)
    if (logits[i] > logits[best]) best = static_cast<TokenId>(i);
  return best;
}

bool AnyNumber(std::span<const float> logits) {
  bool found = false;
  for (const float logit : logits) {
    if (std::isnan(logit)) return false;
    found |= logit > kMinusInfinity;
  }
  return found;
}

void ApplyPenalties(const SampleInput& input, std::span<float> logits) {
  const core::SamplingParams& params = *input.params;
  std::map<TokenId, int> generated;
  for (const TokenId token : input.generated) ++generated[token];
  if (params.repetition_penalty != 1.0F) {
    std::map<TokenId, int> seen = generated;
    for (const TokenId token : input.prompt) seen[token] = 1;
    for (const auto& [token, count] : seen)
      logits[token] = logits[token] > 0 ? logits[token] / params.repetition_penalty
                                        : logits[token] * params.repetition_penalty;
  }
  for (const auto& [token, count] : generated)
    logits[token] -= params.frequency_penalty * static_cast<float>(count) + params.presence_penalty;
}

// The token at `point` (in [0, 1)) of the distribution exp(logit - largest) over candidates in their order.
template <class Range, class LogitOf, class TokenOf>
TokenId Draw(const Range& candidates, float largest, double point, const LogitOf& logit,
             const TokenOf& token) {
  double total = 0;
  for (const auto& c : candidates) total += std::exp(static_cast<double>(logit(c)) - largest);
  double left = point * total;
  TokenId last = 0;
  for (const auto& c : candidates) {
    const double weight = std::exp(static_cast<double>(logit(c)) - largest);
    if (weight <= 0) continue;
    last = token(c);
    left -= weight;
    if (left < 0) break;
  }
  return last;
}

// Candidates that min_p, top_k and top_p leave, best first.
std::vector<std::pair<float, TokenId>> Filter(std::span<const float> logits,
                                              const core::SamplingParams& params, float largest) {
  std::vector<std::pair<float, TokenId>> candidates;
  const float floor = params.min_p > 0 ? largest + std::log(params.min_p) : kMinusInfinity;
  for (std::size_t i = 0; i < logits.size(); ++i)
    if (logits[i] >= floor && logits[i] > kMinusInfinity)
      candidates.emplace_back(logits[i], static_cast<TokenId>(i));
  if (params.top_k > 0 && static_cast<std::size_t>(params.top_k) < candidates.size()) {
    std::nth_element(candidates.begin(), candidates.begin() + params.top_k, candidates.end(), Better);
    candidates.resize(params.top_k);
  }
  double total = 0;
  for (const auto& [logit, token] : candidates) total += std::exp(static_cast<double>(logit) - largest);
  // Sorted only as far as top_p reaches.
  std::size_t sorted = 0;
  double reached = 0;
  const double wanted = params.top_p >= 1.0F ? std::numeric_limits<double>::infinity() : params.top_p * total;
  while (sorted < candidates.size()) {
    const std::size_t end = std::min(candidates.size(), std::max<std::size_t>(64, sorted * 4));
    std::partial_sort(candidates.begin() + sorted, candidates.begin() + end, candidates.end(), Better);
    for (; sorted < end; ++sorted) {
      reached += std::exp(static_cast<double>(candidates[sorted].first) - largest);
      if (reached >= wanted) {
        candidates.resize(sorted + 1);
        return candidates;
      }
    }
  }
  return candidates;
}

}  // namespace

core::TokenLogprob Score(std::span<const float> logits, TokenId token, int top) {
  const float largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit - largest));
  const double log_sum = std::log(sum) + largest;
  core::TokenLogprob result;
  result.token = token;
  result.logprob = static_cast<float>(logits[token] - log_sum);
  if (top <= 0) return result;
  std::vector<std::pair<float, TokenId>> candidates;
  for (std::size_t i = 0; i < logits.size(); ++i) candidates.emplace_back(logits[i], static_cast<TokenId>(i));
  const std::size_t count = std::min<std::size_t>(top, candidates.size());
  std::partial_sort(candidates.begin(), candidates.begin() + count, candidates.end(), Better);
  for (std::size_t i = 0; i < count; ++i)
    result.top.emplace_back(candidates[i].second, static_cast<float>(candidates[i].first - log_sum));
  return result;
}

core::TokenLogprob Sample(const SampleInput& input) {
  const core::SamplingParams& params = *input.params;
  if (!AnyNumber(input.logits)) return {0, std::numeric_limits<float>::quiet_NaN(), {}};

  // Logprobs are the model's own, so the raw logits are kept where they are asked for.
  std::vector<float> raw;
  if (params.logprobs >= 0) raw.assign(input.logits.begin(), input.logits.end());
  std::span<float> logits = input.logits;
  for (const auto& [token, bias] : params.logit_bias) logits[token] += bias;
  for (const TokenId token : input.banned) logits[token] = kMinusInfinity;
  if (params.NeedsHistory()) ApplyPenalties(input, logits);

  TokenId token = ArgMax(logits);
  if (params.temperature > 0) {
    const float inverse = 1.0F / params.temperature;
    for (float& logit : logits) logit *= inverse;
    const float largest = logits[token];
    const double point = UniformAt(params.seed, static_cast<std::uint64_t>(input.position));
    if (params.top_k <= 0 && params.top_p >= 1.0F && params.min_p <= 0) {
      const float* base = logits.data();
      token = Draw(
          logits, largest, point, [](const float& logit) { return logit; },
          [base](const float& logit) { return static_cast<TokenId>(&logit - base); });
    } else {
      const auto candidates = Filter(logits, params, largest);
      token = Draw(
          candidates, largest, point, [](const auto& c) { return c.first; },
          [](const auto& c) { return c.second; });
    }
  }
  if (params.logprobs >= 0) return Score(raw, token, params.logprobs);
  return {token, 0.0F, {}};
}

}  // namespace elasticmoe::compute
