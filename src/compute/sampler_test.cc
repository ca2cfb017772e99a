#include "compute/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>
#include <set>

#include "base/rng.h"
#include "compute/exp.h"

namespace elasticmoe::compute {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<float> RandomLogits(std::uint64_t seed, int count, double size = 8) {
  Rng rng(seed);
  std::vector<float> logits(count);
  for (float& logit : logits) logit = static_cast<float>(size * (rng.Uniform() + rng.Uniform() - 1));
  return logits;
}

TokenId Pick(std::vector<float> logits, const core::SamplingParams& params, int position = 0) {
  return Sample({.logits = logits, .params = &params, .position = position}).token;
}

// Exact probabilities after temperature.
std::vector<double> Softmax(const std::vector<float>& logits, double temperature) {
  std::vector<double> p;
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += p.emplace_back(std::exp((logit - largest) / temperature));
  for (double& value : p) value /= sum;
  return p;
}

// Ids, most likely first.
std::vector<TokenId> Order(const std::vector<double>& p) {
  std::vector<TokenId> order(p.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](TokenId a, TokenId b) { return p[a] > p[b]; });
  return order;
}

// What is drawn in `draws` positions.
std::map<TokenId, int> Histogram(const std::vector<float>& logits, const core::SamplingParams& params,
                                 int draws) {
  std::map<TokenId, int> histogram;
  for (int position = 0; position < draws; ++position) ++histogram[Pick(logits, params, position)];
  return histogram;
}

// Every count within 5 standard deviations of its expectation (p < 1e-6 each), none where p = 0.
void ExpectDistribution(const std::vector<double>& p, const std::map<TokenId, int>& histogram, int draws) {
  for (std::size_t token = 0; token < p.size(); ++token) {
    const auto found = histogram.find(static_cast<TokenId>(token));
    const double count = found == histogram.end() ? 0 : found->second;
    EXPECT_NEAR(p[token] * draws, count, 5 * std::sqrt(p[token] * (1 - p[token]) * draws) + 1e-3)
        << "token " << token;
  }
}

TEST(Exp, IsWithinTwoUlp) {
  for (float x = -86.9F; x < 87.9F; x += 0.0137F)
    ASSERT_NEAR(1, Exp(x) / std::exp(double{x}), 2 * 0x1p-23) << x;
  EXPECT_EQ(1.0F, Exp(0.0F));
  EXPECT_EQ(0.0F, Exp(-kInfinity));
  EXPECT_EQ(0.0F, Exp(std::numeric_limits<float>::quiet_NaN()));
  EXPECT_TRUE(std::isfinite(Exp(kInfinity)));
}

TEST(Exp, LanesHaveTheBitsOfOne) {
  const float nan = std::numeric_limits<float>::quiet_NaN(),
              infinity = std::numeric_limits<float>::infinity();
  std::vector<float> all{0.0F, -0.0F, -87.0F, -87.1F, 88.0F, 88.1F, 1e-30F, nan, infinity, -infinity};
  for (float x = -90.0F; x < 90.0F; x += 0.037F) all.push_back(x);
  all.resize(all.size() / kExpLanes * kExpLanes);
  for (std::size_t i = 0; i < all.size(); i += kExpLanes) {
    FloatLanes in, out;
    std::memcpy(&in, &all[i], sizeof(in));
    Exp(in, out);
    for (int lane = 0; lane < kExpLanes; ++lane)
      EXPECT_EQ(std::bit_cast<std::uint32_t>(float{out[lane]}),
                std::bit_cast<std::uint32_t>(Exp(all[i + lane])))
          << all[i + lane];
  }
}

TEST(Sample, GreedyTakesTheBestAndTheLowerIdOfEquals) {
  const core::SamplingParams greedy{.temperature = 0};
  for (const int size : {1, 5, 16, 33, 1000, 5000}) {
    for (int seed = 0; seed < 20; ++seed) {
      std::vector<float> logits = RandomLogits(seed, size);
      EXPECT_EQ(std::max_element(logits.begin(), logits.end()) - logits.begin(), Pick(logits, greedy));
      const int other = static_cast<int>(RandomAt(seed, 1) % size);
      const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
      logits[other] = logits[best];
      EXPECT_EQ(std::min<std::ptrdiff_t>(best, other), Pick(logits, greedy));
    }
  }
}

TEST(Sample, TinyTemperaturesAreGreedyAndNeverOverflow) {
  const std::vector<float> logits = {-3e38F, 100, 3e38F, 2.9e38F, -kInfinity};
  for (const float temperature : {0.0F, 1e-30F, 1e-6F, 1e-4F})
    EXPECT_EQ(2, Pick(logits, {.temperature = temperature})) << temperature;
  const std::vector<float> close = {1.0F, 1.001F, 0.9F};
  EXPECT_EQ(1, Pick(close, {.temperature = 2e-5F}));
}

TEST(Sample, FollowsTheSoftmaxAtEveryTemperature) {
  constexpr int kDraws = 40000;
  const std::vector<float> logits = RandomLogits(1, 40, 3);
  for (const float temperature : {0.5F, 1.0F, 2.0F})
    ExpectDistribution(Softmax(logits, temperature),
                       Histogram(logits, {.temperature = temperature, .seed = 77}, kDraws), kDraws);
}

TEST(Sample, FiltersLeaveTheRenormalizedRest) {
  constexpr int kDraws = 40000;
  const std::vector<float> logits = RandomLogits(2, 40, 3);
  const std::vector<double> p = Softmax(logits, 0.8);
  const std::vector<TokenId> order = Order(p);
  struct Case {
    core::SamplingParams params;
    std::size_t kept;
  };
  const auto kept_by_p = [&](double wanted, std::size_t among) {
    double total = 0, sum = 0;
    for (std::size_t i = 0; i < among; ++i) total += p[order[i]];
    std::size_t kept = 0;
    while (kept < among && sum < wanted * total) sum += p[order[kept++]];
    return kept;
  };
  std::size_t by_min_p = 0;
  for (const double value : p) by_min_p += value >= 0.1 * p[order[0]];
  for (const Case& c :
       {Case{{.temperature = 0.8F, .top_k = 5, .seed = 3}, 5},
        Case{{.temperature = 0.8F, .top_p = 0.7F, .seed = 4}, kept_by_p(0.7, 40)},
        Case{{.temperature = 0.8F, .min_p = 0.1F, .seed = 5}, by_min_p},
        Case{{.temperature = 0.8F, .top_k = 10, .top_p = 0.9F, .seed = 6}, kept_by_p(0.9, 10)}}) {
    std::vector<double> rest(p.size());
    double sum = 0;
    for (std::size_t i = 0; i < c.kept; ++i) sum += p[order[i]];
    for (std::size_t i = 0; i < c.kept; ++i) rest[order[i]] = p[order[i]] / sum;
    EXPECT_LT(c.kept, 40u);
    ExpectDistribution(rest, Histogram(logits, c.params, kDraws), kDraws);
  }
}

// On large vocabularies, flat and peaked, where the head of the distribution is enough and where it is not.
TEST(Sample, NeverLeavesTheSupportOfItsFilters) {
  Rng rng(4);
  for (int round = 0; round < 60; ++round) {
    const int size = 1 + static_cast<int>(rng.Below(6000));
    const double spread = std::exp2(static_cast<double>(rng.Below(9)) - 2);
    const std::vector<float> logits = RandomLogits(rng.Next(), size, spread);
    core::SamplingParams params;
    params.temperature = static_cast<float>(0.3 + rng.Uniform());
    params.seed = rng.Next();
    if (rng.Below(2) != 0) params.top_k = 1 + static_cast<int>(rng.Below(rng.Below(2) != 0 ? 10 : size + 5));
    if (rng.Below(2) != 0) params.top_p = static_cast<float>(rng.Uniform());
    if (rng.Below(2) != 0) params.min_p = static_cast<float>(std::exp2(-20 * rng.Uniform()));
    const std::vector<double> p = Softmax(logits, params.temperature);
    const std::vector<TokenId> order = Order(p);
    // The plain definition, in vLLM's order, with some room for rounding at the edges.
    std::size_t kept = 0;
    while (kept < order.size() && p[order[kept]] >= params.min_p * p[order[0]] * (1 - 1e-5)) ++kept;
    if (params.top_k > 0) kept = std::min<std::size_t>(kept, params.top_k);
    double total = 0, sum = 0;
    for (std::size_t i = 0; i < kept; ++i) total += p[order[i]];
    std::size_t by_p = 0;
    while (by_p < kept && sum < (params.top_p + 1e-5) * total) sum += p[order[by_p++]];
    const double least = p[order[std::min(kept, by_p) - 1]] * (1 - 1e-5);
    for (int position = 0; position < 20; ++position) {
      const TokenId token = Pick(logits, params, position);
      ASSERT_GE(p[token], least) << "round " << round << " size=" << size << " top_k=" << params.top_k
                                 << " top_p=" << params.top_p << " min_p=" << params.min_p;
    }
  }
}

TEST(Sample, FiltersThatKeepAllChangeNothing) {
  const std::vector<float> logits = RandomLogits(5, 3000, 2);
  const int draws = 3000;
  const auto all = Histogram(logits, {.top_k = 3000, .seed = 1}, draws);
  // Another order of drawing, the same distribution: of the ten likeliest tokens.
  const std::vector<double> p = Softmax(logits, 1);
  double share = 0, want = 0;
  for (int i = 0; i < 300; ++i) {
    const TokenId token = Order(p)[i];
    want += p[token];
    const auto found = all.find(token);
    share += found == all.end() ? 0 : found->second;
  }
  EXPECT_NEAR(want * draws, share, 5 * std::sqrt(want * (1 - want) * draws));
}

TEST(Sample, DependsOnSeedAndPositionOnly) {
  const std::vector<float> logits = RandomLogits(6, 500, 2);
  std::set<TokenId> by_position, by_seed;
  for (int i = 0; i < 50; ++i) {
    EXPECT_EQ(Pick(logits, {.seed = 9}, i), Pick(logits, {.seed = 9}, i));
    by_position.insert(Pick(logits, {.seed = 9}, i));
    by_seed.insert(Pick(logits, {.seed = static_cast<std::uint64_t>(i)}, 3));
  }
  EXPECT_GT(by_position.size(), 30u);
  EXPECT_GT(by_seed.size(), 30u);
}

// vLLM: repetition over prompt and generated, once a token and by sign; frequency and presence over generated
// only.
TEST(Sample, PenaltiesFollowVllm) {
  core::SamplingParams params{
      .temperature = 0, .presence_penalty = 0.5F, .frequency_penalty = 0.25F, .repetition_penalty = 2.0F};
  std::vector<float> logits = {4, 4, 4, -4, 4, -4};
  const std::vector<TokenId> prompt = {0, 0, 3, 99, -1}, generated = {1, 1, 1, 3, 5};
  Sample({.logits = logits, .params = &params, .prompt = prompt, .generated = generated});
  const std::vector<float> want = {2, 2 - 0.75F - 0.5F, 4, -8 - 0.25F - 0.5F, 4, -8 - 0.25F - 0.5F};
  EXPECT_EQ(want, logits);
  // No history, no change.
  logits = {1, 2};
  Sample({.logits = logits, .params = &params});
  EXPECT_EQ((std::vector<float>{1, 2}), logits);
}

TEST(Sample, BiasComesBeforeBansAndBansAreFinal) {
  core::SamplingParams params{.temperature = 0,
                              .logit_bias = {{1, 100.0F}, {2, 50.0F}, {7, 1.0F}, {-3, 1.0F}}};
  const std::vector<float> logits = {0, 0, 0, 0};
  EXPECT_EQ(1, Pick(logits, params));
  std::vector<float> work = logits;
  const TokenId banned[] = {1, 12};
  EXPECT_EQ(2, Sample({.logits = work, .params = &params, .banned = banned}).token);
  // A ban that bias cannot lift, at any temperature.
  params.temperature = 1;
  for (int position = 0; position < 100; ++position) {
    work = logits;
    EXPECT_NE(1, Sample({.logits = work, .params = &params, .banned = banned, .position = position}).token);
  }
}

TEST(Sample, LogprobsAreOfTheRawDistribution) {
  const std::vector<float> logits = RandomLogits(8, 300, 4);
  const std::vector<double> p = Softmax(logits, 1);
  const std::vector<TokenId> order = Order(p);
  core::SamplingParams params{.temperature = 0.5F,
                              .top_k = 3,
                              .repetition_penalty = 1.5F,
                              .logprobs = 5,
                              .logit_bias = {{order[40], 100.0F}}};
  std::vector<float> work = logits;
  const std::vector<TokenId> history = {order[0], order[1]};
  const core::TokenLogprob got = Sample({.logits = work, .params = &params, .prompt = history});
  EXPECT_EQ(order[40], got.token);
  EXPECT_NEAR(std::log(p[order[40]]), got.logprob, 1e-5);
  ASSERT_EQ(5u, got.top.size());
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(order[i], got.top[i].first);
    EXPECT_NEAR(std::log(p[order[i]]), got.top[i].second, 1e-5);
  }
}

TEST(Score, ListsTheMostLikelyInOrderTiesByIdAndAtMostTheVocabulary) {
  const std::vector<float> logits = {1, 3, 3, -kInfinity, 2};
  const core::TokenLogprob got = Score(logits, 3, 20);
  EXPECT_EQ(-kInfinity, got.logprob);
  std::vector<TokenId> ids;
  for (const auto& [token, logprob] : got.top) ids.push_back(token);
  EXPECT_EQ((std::vector<TokenId>{1, 2, 4, 0, 3}), ids);
  EXPECT_TRUE(Score(logits, 1, 0).top.empty());
  EXPECT_TRUE(Score(logits, 1, -1).top.empty());
  double sum = 0;
  for (TokenId token = 0; token < 5; ++token) sum += std::exp(Score(logits, token, 0).logprob);
  EXPECT_NEAR(1, sum, 1e-6);
}

TEST(Sample, NothingToChooseFromIsNaNOfTokenZero) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const float temperature : {0.0F, 1.0F}) {
    for (const int place : {0, 3, 17, 30}) {
      for (const float bad : {nan, kInfinity}) {
        std::vector<float> logits = RandomLogits(9, 31);
        logits[place] = bad;
        const core::SamplingParams params{.temperature = temperature};
        const core::TokenLogprob got = Sample({.logits = logits, .params = &params});
        EXPECT_EQ(0, got.token);
        EXPECT_TRUE(std::isnan(got.logprob)) << place;
      }
    }
    std::vector<float> nothing(20, -kInfinity);
    const core::SamplingParams params{.temperature = temperature, .top_p = 0.5F, .logprobs = 3};
    EXPECT_TRUE(std::isnan(Sample({.logits = nothing, .params = &params}).logprob));
    std::vector<float> all_banned = {1, 2};
    const TokenId banned[] = {0, 1};
    EXPECT_TRUE(std::isnan(Sample({.logits = all_banned, .params = &params, .banned = banned}).logprob));
  }
  std::vector<float> logits = {1, nan};
  EXPECT_TRUE(std::isnan(Score(logits, 0, 2).logprob));
}

}  // namespace
}  // namespace elasticmoe::compute
