// The tokenizer that a GGUF file carries, as the tokenizer.json and tokenizer_config.json it was made from:
// "gpt2" (byte-level BPE, split by the pattern that tokenizer.ggml.pre names) and "llama" (sentencepiece BPE
// with byte fallback). Both ways, for reading and for writing. Pure.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "base/error.h"
#include "model/gguf/gguf.h"
#include "model/gguf/writer.h"
#include "model/tokenizer/tokenizer_json.h"

namespace elasticmoe::model {

struct GgufTokenizer {
  TokenizerJson json;
  PlainJson config;  // names of tokens, add_bos_token, chat_template
};

// nullopt where the file has no vocabulary. kUnimplemented and kInvalidArgument name the key.
Expected<std::optional<GgufTokenizer>> ReadGgufTokenizer(const Gguf& gguf);

// The metadata of a tokenizer.json and tokenizer_config.json ("" = none), with `vocab` tokens: ids that stand
// for nothing are filled up. kUnimplemented where it is no byte-level BPE, or its pattern has no name in
// GGUF.
Status WriteGgufTokenizer(TokenizerJson json, const PlainJson& config, int vocab, GgufWriter& writer);

}  // namespace elasticmoe::model
