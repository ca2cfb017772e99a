// tokenizer.json of Hugging Face, read and run in C++: byte-level BPE (Qwen, Llama-3, GPT-OSS, DeepSeek)
// and BPE with byte fallback (Llama-2, Mixtral). Equal to the `tokenizers` library, token for token.
// Immutable after loading, so thread-safe.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/ids.h"

namespace elasticmoe::model {

// Token ids in, text out as soon as it is certain; the pieces together are what Decode gives for the whole.
class TextStream {
 public:
  virtual ~TextStream() = default;
  virtual std::string Add(TokenId id) = 0;
  virtual std::string Finish() = 0;
};

class Tokenizer {
 public:
  // From the texts of tokenizer.json and tokenizer_config.json ("" = there is none). Errors
  // (kInvalidArgument, kUnimplemented) name the key, what was found and what is supported.
  static Expected<std::unique_ptr<Tokenizer>> FromJson(std::string_view tokenizer_json,
                                                       std::string_view tokenizer_config_json);
  // Of a Hugging Face directory or a .gguf file. nullptr where there is none (no tokenizer.json, no
  // tokenizer.ggml.tokens): the model then serves token ids only.
  static Expected<std::unique_ptr<Tokenizer>> Open(const std::filesystem::path& model);
  static Expected<std::unique_ptr<Tokenizer>> FromDirectory(const std::filesystem::path& directory);
  static Expected<std::unique_ptr<Tokenizer>> FromGguf(const std::filesystem::path& path);

  virtual ~Tokenizer() = default;

  // Text that is not UTF-8 is read with U+FFFD for each bad sequence. `add_special`: what the
  // post-processor and add_bos_token/add_eos_token add. Special tokens written in the text are recognised.
  virtual std::vector<TokenId> Encode(std::string_view text, bool add_special) const = 0;

  // Unknown ids are skipped. The result may hold U+FFFD where bytes are no UTF-8.
  virtual std::string Decode(std::span<const TokenId> ids, bool skip_special) const = 0;

  // What a StreamDecoder runs on. REQUIRES: the tokenizer outlives it.
  virtual std::unique_ptr<TextStream> NewTextStream(bool skip_special) const = 0;

  // Text of one token on its own as shown in logprobs, and its raw bytes (may be part of a character).
  virtual std::string TokenText(TokenId id) const = 0;
  virtual std::string TokenBytes(TokenId id) const = 0;

  virtual std::optional<TokenId> Find(std::string_view token) const = 0;  // exact entry or added token
  virtual bool IsSpecial(TokenId id) const = 0;
  virtual int Size() const = 0;  // highest id + 1

  virtual const std::string& BosToken() const = 0;  // "" where null
  virtual const std::string& EosToken() const = 0;
  virtual const std::string& ChatTemplateSource() const = 0;  // "" where there is none
};

// Decodes a growing token sequence piece by piece: never half a character, and the pieces together are
// what Decode gives for the whole. One per stream; not thread-safe. The tokenizer must outlive it.
class StreamDecoder {
 public:
  StreamDecoder(const Tokenizer& tokenizer, bool skip_special);
  std::string Add(TokenId id);  // the text that became certain
  std::string Finish();         // what was held back (incomplete bytes as U+FFFD)

 private:
  std::unique_ptr<TextStream> stream_;
};

}  // namespace elasticmoe::model
