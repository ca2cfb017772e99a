// A generation request as the engine sees it, and what comes back: token ids, no text. Pure values.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/ids.h"

namespace elasticmoe::core {

inline constexpr int kMaxTopLogprobs = 20;  // OpenAI's limit of top_logprobs

// Defaults change nothing: plain sampling from the softmax. Order of application, as in vLLM:
// logit_bias, min_tokens' bans, penalties, temperature, min_p, top_k, top_p.
struct SamplingParams {
  float temperature = 1.0F;  // 0 = greedy (ties: the lower id)
  int top_k = 0;             // 0 = off
  float top_p = 1.0F;
  float min_p = 0.0F;
  float presence_penalty = 0.0F;    // over generated tokens
  float frequency_penalty = 0.0F;   // over generated tokens
  float repetition_penalty = 1.0F;  // over prompt and generated tokens
  std::uint64_t seed = 0;           // the token at position p depends on (seed, p), never on the batch
  int logprobs = -1;                // alternatives reported per token; -1 = no logprobs at all
  std::vector<std::pair<TokenId, float>> logit_bias;

  bool NeedsHistory() const {
    return presence_penalty != 0.0F || frequency_penalty != 0.0F || repetition_penalty != 1.0F;
  }
};

struct GenerationRequest {
  RequestId id;
  std::vector<TokenId> prompt;  // not empty, every id in [0, vocab)
  SamplingParams sampling;
  int max_tokens = 16;  // >= 0; 0 only scores the prompt
  int min_tokens = 0;   // end-of-sequence and stop ids are banned until then
  bool ignore_eos = false;
  std::vector<TokenId> stop_token_ids;
  int prompt_logprobs = -1;  // alternatives per prompt token; -1 = prompt is not scored
  int priority = 0;          // lower is served first
};

struct RequestLimits {
  int vocab = 0;          // token ids are in [0, vocab)
  int max_model_len = 0;  // tokens of a sequence, prompt and generated
};

// What can be said of a request without an engine's state: kInvalidArgument "FIELD: ..." for an empty prompt,
// an id out of the vocabulary, a negative max_tokens, a prompt that leaves no room for one token where some
// are wanted. More max_tokens than the context holds are no error: they are cut.
Status CheckRequest(const GenerationRequest& request, const RequestLimits& limits);

// Of the model's own distribution (log_softmax of the raw logits).
struct TokenLogprob {
  TokenId token = 0;
  float logprob = 0.0F;
  std::vector<std::pair<TokenId, float>> top;  // most likely first, `logprobs` of them
};

enum class FinishReason {
  kStop,    // end-of-sequence or a stop id; `stop_token` says which
  kLength,  // max_tokens or the context is reached
  kAbort,   // cancelled by the client or the server
  kError,
};

// One event a step a request. The last one has `finish`.
struct TokenEvent {
  RequestId request;
  std::vector<TokenId> tokens;                // new ones, in order (one a step, none in a pure finish)
  std::vector<TokenLogprob> logprobs;         // one a token where asked for
  std::vector<TokenLogprob> prompt_logprobs;  // of prompt[1..], complete, with the first event
  std::optional<FinishReason> finish;
  std::optional<TokenId> stop_token;  // set with kStop; the token is in `tokens` too
  int cached_prompt_tokens = 0;       // prompt tokens found in the prefix cache
  std::string error;                  // with kError
  TimeNs queue_ns = -1;               // with the first event: from Submit to its first step; -1 = not known
};

}  // namespace elasticmoe::core
