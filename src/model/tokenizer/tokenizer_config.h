// What a tokenizer has besides its model: added tokens, what is put around a text, the names in
// tokenizer_config.json, the chat template. Pure.
#pragma once

#include <deque>
#include <filesystem>
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

// tokenizer_config.json of a directory (an empty object without one), with the template that has a file of
// its own (chat_template.jinja) in place of the one in it. Blocking I/O.
Expected<PlainJson> ReadTokenizerConfigFiles(const std::filesystem::path& directory);

}  // namespace elasticmoe::model
