// What a tokenizer has besides its model: added tokens, what is put around a text, the names in
// tokenizer_config.json, the chat template. Pure.
#pragma once

#include <deque>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/ids.h"
#include "model/tokenizer/added_tokens.h"
#include "model/tokenizer/bpe.h"
#include "model/tokenizer/tokenizer_json.h"

namespace elasticmoe::model {

struct TokenizerConfig {
  std::deque<AddedToken> added_tokens;  // a deque: others keep pointers into it
  std::vector<TokenId> prefix, suffix;  // around a text that is encoded with special tokens
  std::string bos_token, eos_token;     // "" = none
  std::string chat_template;            // "" = none
};

// `tokenizer`: tokenizer.json; `config`: tokenizer_config.json. An explicit add_bos_token or add_eos_token in
// the latter decides over what the post-processor of the former adds, as in transformers.
Expected<TokenizerConfig> ReadTokenizerConfig(const PlainJson& tokenizer, const PlainJson& config,
                                              const Bpe& bpe);

// The text of a tokenizer_config.json ("" = none) with its chat_template replaced.
Expected<std::string> WithChatTemplate(std::string_view config_json, std::string_view source);

}  // namespace elasticmoe::model
