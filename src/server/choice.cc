#include "server/choice.h"

#include <algorithm>

#include "base/check.h"

namespace elasticmoe::server {

Choice::Choice(const model::Tokenizer* tokenizer, const SamplingRequest& request)
    : stop_token_ids_(request.stop_token_ids),
      include_stop_(request.include_stop_str_in_output),
      min_tokens_(request.min_tokens) {
  if (tokenizer == nullptr) return;
  decoder_ = std::make_unique<model::StreamDecoder>(*tokenizer, request.skip_special_tokens);
  stop_ = std::make_unique<StopMatcher>(request.stop, request.include_stop_str_in_output);
}

Choice::Delta Choice::Add(const core::TokenEvent& event) {
  EM_CHECK(!Finished());
  Delta delta;
  for (std::size_t i = 0; i < event.tokens.size() && !StoppedByText(); ++i) {
    const TokenId id = event.tokens[i];
    delta.tokens.push_back(id);
    if (i < event.logprobs.size()) delta.logprobs.push_back(event.logprobs[i]);
    ++token_count_;
    // The token that ends a generation is not part of its text.
    const bool is_stop = event.stop_token && i + 1 == event.tokens.size() && !include_stop_;
    if (decoder_ == nullptr || is_stop) continue;
    const std::string text = decoder_->Add(id);
    delta.text += token_count_ > min_tokens_ ? stop_->Add(text) : stop_->Pass(text);
  }
  if (event.finish && decoder_ != nullptr && !StoppedByText()) {
    delta.text += stop_->Add(decoder_->Finish());
    delta.text += stop_->Finish();
  }
  if (StoppedByText()) {
    finish_reason_ = "stop";
    stop_reason_ = stop_->Match();
  } else if (event.finish) {
    switch (*event.finish) {
      case core::FinishReason::kStop:
        finish_reason_ = "stop";
        if (event.stop_token &&
            std::ranges::find(stop_token_ids_, *event.stop_token) != stop_token_ids_.end())
          stop_reason_ = *event.stop_token;
        break;
      case core::FinishReason::kLength:
        finish_reason_ = "length";
        break;
      case core::FinishReason::kAbort:
        finish_reason_ = "abort";
        break;
      case core::FinishReason::kError:
        finish_reason_ = "error";
        error_ = event.error;
        break;
    }
  }
  return delta;
}

}  // namespace elasticmoe::server
