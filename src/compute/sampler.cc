#include "compute/sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/rng.h"
#include "compute/exp.h"

namespace elasticmoe::compute {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLeastTemperature = 1e-5F;  // as in vLLM; below, only the best token has any weight
constexpr std::size_t kBlock = 1024;        // logits summed or scanned as one
constexpr std::size_t kLanes = kExpLanes;

struct Candidate {
  float weight;  // e^((logit - largest) / temperature), in (0, 1]
  TokenId token;
};

// Heavier first; equal ones: the lower id. A total order, so that nothing depends on a sort's whim.
bool Better(const Candidate& a, const Candidate& b) {
  return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
}

struct Best {
  TokenId token = 0;
  float logit = -kInfinity;
  bool valid = false;  // neither NaN nor +inf among the logits, and something above -inf
};

// ---- Loops over the vocabulary, in lanes that do not depend on the instruction set, so that its results do
// not either. Written once, compiled twice: for all machines and for those with AVX2.

// Exponents: the difference first, which is 0 for the best token whatever the temperature.
struct Scale {
  float largest, inverse;
  [[gnu::always_inline]] float operator()(float logit) const { return (logit - largest) * inverse; }
};

// The largest of `logits` and, in `nan`, whether any is NaN.
[[gnu::always_inline]] inline float LargestBody(std::span<const float> logits, bool& nan) {
  FloatLanes largest = FloatLanes{} - kInfinity;
  IntLanes nans{};
  std::size_t i = 0;
  for (; i + kLanes <= logits.size(); i += kLanes) {
    FloatLanes some;
    std::memcpy(&some, &logits[i], sizeof(some));
    largest = some > largest ? some : largest;
    nans |= some != some;
  }
  for (std::size_t lane = 0; i < logits.size(); ++i, ++lane) {
    largest[lane] = std::max(largest[lane], logits[i]);
    nans[lane] |= std::isnan(logits[i]);
  }
  float most = largest[0];
  nan = nans[0] != 0;
  for (std::size_t lane = 1; lane < kLanes; ++lane) {
    most = std::max(most, largest[lane]);
    nan |= nans[lane] != 0;
  }
  return most;
}

// Sum of e^scale(logit).
[[gnu::always_inline]] inline double SumBody(std::span<const float> logits, Scale scale) {
  FloatLanes sums{};
  std::size_t i = 0;
  for (; i + kLanes <= logits.size(); i += kLanes) {
    FloatLanes some, weights;
    std::memcpy(&some, &logits[i], sizeof(some));
    Exp((some - scale.largest) * scale.inverse, weights);
    sums += weights;
  }
  for (std::size_t lane = 0; i < logits.size(); ++i, ++lane) sums[lane] += Exp(scale(logits[i]));
  double sum = 0;
  for (std::size_t lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  return sum;
}

// The first of `begin`, `begin` + kLanes, ... from where on any of kLanes neighbours has scale(logit) >=
// floor; fewer than kLanes are left where none has.
[[gnu::always_inline]] inline std::size_t NextAboveBody(std::span<const float> logits, Scale scale,
                                                        float floor, std::size_t begin) {
  for (; begin + kLanes <= logits.size(); begin += kLanes) {
    FloatLanes some;
    std::memcpy(&some, &logits[begin], sizeof(some));
    const IntLanes above = (some - scale.largest) * scale.inverse >= floor;
    std::int64_t halves[kLanes / 2];
    std::memcpy(halves, &above, sizeof(halves));
    std::int64_t any = 0;
    for (const std::int64_t half : halves) any |= half;
    if (any != 0) break;
  }
  return begin;
}

struct VocabularyLoops {
  float (*largest)(std::span<const float> logits, bool& nan);
  double (*sum)(std::span<const float> logits, Scale scale);
  std::size_t (*next_above)(std::span<const float> logits, Scale scale, float floor, std::size_t begin);
};

#if defined(__x86_64__)
[[gnu::target("avx2")]] float LargestAvx2(std::span<const float> logits, bool& nan) {
  return LargestBody(logits, nan);
}
[[gnu::target("avx2")]] double SumAvx2(std::span<const float> logits, Scale scale) {
  return SumBody(logits, scale);
}
[[gnu::target("avx2")]] std::size_t NextAboveAvx2(std::span<const float> logits, Scale scale, float floor,
                                                  std::size_t begin) {
  return NextAboveBody(logits, scale, floor, begin);
}
#endif

const VocabularyLoops& Loops() {
  static const VocabularyLoops loops = []() -> VocabularyLoops {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) return {LargestAvx2, SumAvx2, NextAboveAvx2};
#endif
    return {[](std::span<const float> logits, bool& nan) { return LargestBody(logits, nan); },
            [](std::span<const float> logits, Scale scale) { return SumBody(logits, scale); },
            [](std::span<const float> logits, Scale scale, float floor, std::size_t begin) {
              return NextAboveBody(logits, scale, floor, begin);
            }};
  }();
  return loops;
}

Best FindBest(std::span<const float> logits) {
  Best best;
  bool nan = false;
  best.logit = Loops().largest(logits, nan);
  best.valid = std::isfinite(best.logit) && !nan;
  if (best.valid)
    best.token = static_cast<TokenId>(std::find(logits.begin(), logits.end(), best.logit) - logits.begin());
  return best;
}

// Weights of all tokens relative to the best one, without keeping them.
class Distribution {
 public:
  Distribution(std::span<const float> logits, float largest, float inverse_temperature)
      : logits_(logits), scale_{largest, inverse_temperature} {}

  double BlockSum(std::size_t begin) const {
    return Loops().sum(logits_.subspan(begin, std::min(kBlock, logits_.size() - begin)), scale_);
  }

  double Total() const {
    double total = 0;
    for (std::size_t begin = 0; begin < logits_.size(); begin += kBlock) total += BlockSum(begin);
    return total;
  }

  // The token at `point` (in [0, 1)) of the distribution, tokens in the order of their ids.
  TokenId Draw(double point) const {
    std::vector<double> sums;
    double total = 0;
    for (std::size_t begin = 0; begin < logits_.size(); begin += kBlock)
      total += sums.emplace_back(BlockSum(begin));
    double left = point * total;
    std::size_t last = 0;  // the last block of any weight, for a `left` that rounding has kept too large
    for (std::size_t block = 0; block < sums.size(); ++block) {
      if (sums[block] <= 0) continue;
      if (left < sums[block]) return DrawFrom(block * kBlock, left);
      left -= sums[block];
      last = block;
    }
    return DrawFrom(last * kBlock, sums[last]);
  }

  // Tokens with an exponent >= floor and any weight, in the order of their ids.
  void Gather(float floor, std::vector<Candidate>& out) const {
    out.clear();
    for (std::size_t i = 0; i < logits_.size();) {
      i = Loops().next_above(logits_, scale_, floor, i);
      for (const std::size_t end = std::min(i + kLanes, logits_.size()); i < end; ++i) {
        const float scaled = scale_(logits_[i]);
        if (!(scaled >= floor)) continue;
        if (const float weight = Exp(scaled); weight > 0) out.push_back({weight, static_cast<TokenId>(i)});
      }
    }
  }

 private:
  TokenId DrawFrom(std::size_t begin, double left) const {
    std::size_t last = begin;
    for (std::size_t i = begin; i < std::min(begin + kBlock, logits_.size()); ++i) {
      const float weight = Exp(scale_(logits_[i]));
      if (weight <= 0) continue;
      last = i;
      left -= weight;
      if (left < 0) break;
    }
    return static_cast<TokenId>(last);
  }

  std::span<const float> logits_;
  Scale scale_;
};

double Sum(std::span<const Candidate> candidates) {
  double sum = 0;
  for (const Candidate& candidate : candidates) sum += candidate.weight;
  return sum;
}

// Keeps the fewest that hold `wanted` of the weight, in their order: halves of the best are weighed until one
// is left to say yes or no to. No sort: a flat distribution keeps most of the vocabulary.
void KeepTopP(double wanted, std::vector<Candidate>& candidates) {
  std::vector<Candidate> order = candidates;
  std::size_t begin = 0, end = order.size();  // the last one kept is in [begin, end), if any is left out
  while (end - begin > 1) {
    const std::size_t middle = begin + (end - begin) / 2;
    std::nth_element(order.begin() + begin, order.begin() + middle, order.begin() + end, Better);
    const double better = Sum(std::span(order).subspan(begin, middle - begin));
    if (better >= wanted) {
      end = middle;
    } else {
      begin = middle;
      wanted -= better;
    }
  }
  if (order.empty()) return;
  const Candidate last = order[begin];
  std::erase_if(candidates, [&](const Candidate& one) { return Better(last, one); });
}

// What min_p, then top_k, then top_p leave. The head of the distribution is nearly always enough to tell, so
// the rest is looked at only when it is not.
std::vector<Candidate> Filter(const Distribution& distribution, const core::SamplingParams& params) {
  const bool min_p = params.min_p > 0;
  const std::size_t top_k = params.top_k > 0 ? static_cast<std::size_t>(params.top_k) : 0;
  const float last_floor = min_p ? std::log(params.min_p) : -kInfinity;
  const double total = !min_p && top_k == 0 ? distribution.Total() : 0;
  std::vector<Candidate> candidates;
  for (const float floor : {-1.0F, -2.0F, -4.0F, -8.0F, -16.0F, last_floor}) {
    if (floor < last_floor) continue;
    distribution.Gather(floor, candidates);
    if (floor == last_floor) break;
    if (top_k > 0 ? candidates.size() >= top_k : !min_p && Sum(candidates) >= params.top_p * total) break;
  }
  if (top_k > 0 && top_k < candidates.size()) {
    std::nth_element(candidates.begin(), candidates.begin() + params.top_k, candidates.end(), Better);
    candidates.resize(top_k);
    std::sort(candidates.begin(), candidates.end(), Better);
  }
  if (params.top_p < 1.0F) KeepTopP(params.top_p * (total > 0 ? total : Sum(candidates)), candidates);
  return candidates;
}

TokenId Draw(std::span<const Candidate> candidates, double point) {
  double left = point * Sum(candidates);
  for (const Candidate& candidate : candidates) {
    left -= candidate.weight;
    if (left < 0) return candidate.token;
  }
  return candidates.back().token;
}

// Each id once, sorted.
std::vector<TokenId> Sorted(std::span<const TokenId> tokens) {
  std::vector<TokenId> sorted(tokens.begin(), tokens.end());
  std::sort(sorted.begin(), sorted.end());
  return sorted;
}

// Returns whether anything may have changed.
bool Adjust(const SampleInput& input) {
  const core::SamplingParams& params = *input.params;
  const std::span<float> logits = input.logits;
  const auto in_vocab = [&](TokenId token) {
    return token >= 0 && static_cast<std::size_t>(token) < logits.size();
  };
  for (const auto& [token, bias] : params.logit_bias)
    if (in_vocab(token)) logits[token] += bias;
  for (const TokenId token : input.banned)
    if (in_vocab(token)) logits[token] = -kInfinity;
  if (!params.NeedsHistory()) return !params.logit_bias.empty() || !input.banned.empty();
  const std::vector<TokenId> generated = Sorted(input.generated);
  if (params.repetition_penalty != 1.0F) {
    std::vector<TokenId> seen = Sorted(input.prompt);
    seen.insert(seen.end(), generated.begin(), generated.end());
    std::sort(seen.begin(), seen.end());
    seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
    for (const TokenId token : seen) {
      if (!in_vocab(token)) continue;
      float& logit = logits[token];
      logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
    }
  }
  for (std::size_t i = 0; i < generated.size();) {
    std::size_t end = i;
    while (end < generated.size() && generated[end] == generated[i]) ++end;
    if (in_vocab(generated[i]))
      logits[generated[i]] -=
          params.frequency_penalty * static_cast<float>(end - i) + params.presence_penalty;
    i = end;
  }
  return true;
}

}  // namespace

core::TokenLogprob Score(std::span<const float> logits, TokenId token, int top) {
  const Best best = FindBest(logits);
  core::TokenLogprob result{token, std::numeric_limits<float>::quiet_NaN(), {}};
  if (!best.valid) return result;
  const double log_sum = best.logit + std::log(Distribution(logits, best.logit, 1.0F).Total());
  result.logprob = static_cast<float>(logits[token] - log_sum);
  const std::size_t count = std::min(logits.size(), static_cast<std::size_t>(std::max(0, top)));
  if (count == 0) return result;
  // The best so far in order; what comes later must be larger to enter, so ties stay with the lower id.
  std::vector<std::pair<float, TokenId>> found;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (found.size() == count && !(logits[i] > found.back().first)) continue;
    if (found.size() == count) found.pop_back();
    const auto place =
        std::find_if(found.begin(), found.end(), [&](const auto& other) { return other.first < logits[i]; });
    found.insert(place, {logits[i], static_cast<TokenId>(i)});
  }
  for (const auto& [logit, id] : found) result.top.emplace_back(id, static_cast<float>(logit - log_sum));
  return result;
}

core::TokenLogprob Sample(const SampleInput& input) {
  const core::SamplingParams& params = *input.params;
  const core::TokenLogprob nothing{0, std::numeric_limits<float>::quiet_NaN(), {}};
  Best best = FindBest(input.logits);
  if (!best.valid) return nothing;

  // Logprobs are the model's own, so the raw logits are kept where they are asked for.
  std::vector<float> raw;
  if (params.logprobs >= 0) raw.assign(input.logits.begin(), input.logits.end());
  if (Adjust(input)) best = FindBest(input.logits);
  if (!best.valid) return nothing;

  TokenId token = best.token;
  if (params.temperature >= kLeastTemperature) {
    const Distribution distribution(input.logits, best.logit, 1.0F / params.temperature);
    const double point = UniformAt(params.seed, static_cast<std::uint64_t>(input.position));
    const bool whole = params.top_k <= 0 && params.top_p >= 1.0F && params.min_p <= 0;
    token = whole ? distribution.Draw(point) : Draw(Filter(distribution, params), point);
  }
  if (params.logprobs >= 0) return Score(raw, token, params.logprobs);
  return {token, 0.0F, {}};
}

}  // namespace elasticmoe::compute
