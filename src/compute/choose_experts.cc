#include "compute/choose_experts.h"

#include <algorithm>
#include <limits>

#include "compute/exp.h"

namespace elasticmoe::compute {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

// logits -> scores, but for the division by what is returned.
float Scores(const core::MoeSpec& moe, std::span<float> logits) {
  if (moe.scores == core::MoeSpec::Scores::kSigmoid) {
    for (float& logit : logits) logit = 1.0F / (1.0F + Exp(-logit));
    return 1.0F;
  }
  const float largest = *std::max_element(logits.begin(), logits.end());
  float sum = 0;
  for (float& logit : logits) {
    logit = Exp(logit - largest);
    sum += logit;
  }
  return sum;
}

// The largest of values from `begin` on; equal ones: the first.
int Best(std::span<const float> values) {
  int best = 0;
  for (int i = 1; i < static_cast<int>(values.size()); ++i)
    if (values[i] > values[best]) best = i;
  return best;
}

// Leaves the experts of the best groups in the choice.
void KeepGroups(const core::MoeSpec& moe, std::span<float> choice, std::span<float> groups) {
  const int size = moe.experts / moe.groups;
  for (int g = 0; g < moe.groups; ++g) {
    float first = kNever, second = kNever;
    for (int e = g * size; e < (g + 1) * size; ++e) {
      second = std::max(second, std::min(first, choice[e]));
      first = std::max(first, choice[e]);
    }
    const bool two = moe.group_score == core::MoeSpec::GroupScore::kTopTwoSum && size > 1;
    groups[g] = two ? first + second : first;
  }
  for (int j = 0; j < moe.chosen_groups; ++j) groups[Best(groups)] = kNever;
  for (int g = 0; g < moe.groups; ++g)
    if (groups[g] != kNever)
      std::fill_n(choice.begin() + g * size, size, moe.left_out_as_zero ? 0.0F : kNever);
}

void ChooseAny(const core::MoeSpec& moe, const float* thresholds, std::span<const float> cosines,
               std::span<float> choice, std::int32_t* experts, float* mix) {
  int count = 0;
  for (int e = 0; e < moe.experts; ++e) {
    const bool passes = cosines[e] > thresholds[e];
    choice[e] = passes ? cosines[e] : kNever;
    count += passes;
  }
  if (count == 0) {
    const int best = Best(cosines);
    choice[best] = cosines[best];
    count = 1;
  }
  count = std::min(count, moe.top_k);
  for (int j = 0; j < moe.top_k; ++j) {
    const int best = Best(choice.first(moe.experts));
    experts[j] = j < count ? best : -1;
    mix[j] = j < count ? 1.0F / static_cast<float>(count) : 0.0F;
    choice[best] = kNever;
  }
}

}  // namespace

void ChooseExperts(const core::MoeSpec& moe, const float* correction, std::span<float> logits,
                   std::span<float> choice, std::int32_t* experts, float* mix) {
  if (moe.top_any) return ChooseAny(moe, correction, logits, choice, experts, mix);
  const float sum = Scores(moe, logits);
  const std::span<float> scores = choice.first(moe.experts);
  for (int e = 0; e < moe.experts; ++e)
    scores[e] = correction != nullptr ? logits[e] / sum + correction[e] : logits[e];
  if (moe.chosen_groups < moe.groups) KeepGroups(moe, scores, choice.subspan(moe.experts, moe.groups));
  float chosen = 0;
  for (int j = 0; j < moe.top_k; ++j) {
    const int best = Best(scores);
    experts[j] = best;
    mix[j] = logits[best] / sum;
    chosen += mix[j];
    scores[best] = kNever;
  }
  if (moe.renormalize && moe.top_k > 0)
    for (int j = 0; j < moe.top_k; ++j) mix[j] /= chosen;
  if (moe.scaling != 1.0F)
    for (int j = 0; j < moe.top_k; ++j) mix[j] *= moe.scaling;
}

}  // namespace elasticmoe::compute
