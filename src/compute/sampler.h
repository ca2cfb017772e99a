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
// logits that are all -inf or NaN give token 0 with logprob NaN (the engine turns that into an error).
core::TokenLogprob Sample(const SampleInput& input);

// Logprob of `token` and the `top` most likely ones under raw logits [vocab], unchanged.
core::TokenLogprob Score(std::span<const float> logits, TokenId token, int top);

}  // namespace elasticmoe::compute
