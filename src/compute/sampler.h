// From logits to a token. A pure function of its arguments: no state, no batch, no clock.
#pragma once

#include <span>
#include <utility>
#include <vector>

#include "core/request.h"

namespace elasticmoe::compute {

struct SampleInput {
  std::span<float> logits;  // [vocab], overwritten
  const core::SamplingParams* params = nullptr;
  std::span<const TokenId> banned;  // may not be chosen (min_tokens)
  std::span<const TokenId> prompt;  // for penalties; may be empty where !NeedsHistory()
  std::span<const TokenId> generated;
  int position = 0;  // of the token being chosen, in its sequence
};

// The token and, where params->logprobs >= 0, its logprob and alternatives under the raw logits.
// Token 0 with logprob NaN, which the engine turns into an error, where there is nothing to choose from: a
// logit is NaN or +inf, or none is above -inf (before or after bias and bans). Temperatures below 1e-5 are
// greedy. Ids out of the vocabulary (in bias, bans, history) are passed over. Cost at 150k tokens: 0.1-0.5
// ms; no sort of the vocabulary.
core::TokenLogprob Sample(const SampleInput& input);

// Logprob of `token` and the `top` most likely ones (ties: the lower id) under raw logits [vocab], unchanged.
// REQUIRES: token in the vocabulary.
core::TokenLogprob Score(std::span<const float> logits, TokenId token, int top);

}  // namespace elasticmoe::compute
