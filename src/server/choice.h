// One choice of an answer: token events in, text out. Decodes, stops at stop strings, keeps counts. No I/O;
// not thread-safe.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/json.h"
#include "core/request.h"
#include "model/tokenizer.h"
#include "server/openai_request.h"
#include "server/stop_matcher.h"

namespace elasticmoe::server {

class Choice {
 public:
  // What one event added.
  struct Delta {
    std::string text;
    std::vector<TokenId> tokens;
    std::vector<core::TokenLogprob> logprobs;
  };

  // `tokenizer`: nullptr where the model has none; the text is then always empty. It must outlive this.
  Choice(const model::Tokenizer* tokenizer, const SamplingRequest& request);

  // REQUIRES: !Finished(). Events after a stop string matched are to be dropped.
  Delta Add(const core::TokenEvent& event);

  bool Finished() const { return !finish_reason_.empty(); }
  // The choice is over though the engine may still run it: a stop string was found.
  bool StoppedByText() const { return stop_ && stop_->Matched(); }
  const std::string& FinishReason() const {
    return finish_reason_;
  }                                                        // "stop", "length", "abort", "error", "" = not yet
  const Json& StopReason() const { return stop_reason_; }  // the stop string, the stop id, or null
  const std::string& ErrorText() const { return error_; }  // of "error"
  int TokenCount() const { return token_count_; }

 private:
  std::vector<TokenId> stop_token_ids_;
  bool include_stop_;
  int min_tokens_;
  std::unique_ptr<model::StreamDecoder> decoder_;
  std::unique_ptr<StopMatcher> stop_;
  int token_count_ = 0;
  std::string finish_reason_;
  Json stop_reason_ = nullptr;
  std::string error_;
};

}  // namespace elasticmoe::server
