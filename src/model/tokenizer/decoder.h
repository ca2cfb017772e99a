// The decoder of tokenizer.json: from token texts back to text. Runs as a stream: tokens in, text out as soon
// as no later token can change it. Decoding a whole sequence is the same stream, so the two cannot differ.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "model/tokenizer/normalizer.h"
#include "model/tokenizer/regex.h"
#include "model/tokenizer/tokenizer_json.h"

namespace elasticmoe::model {

// One step of a running decoder: pieces in, pieces out. Not thread-safe.
class DecodeStep {
 public:
  using Pieces = std::vector<std::string>;
  virtual ~DecodeStep() = default;
  virtual void Add(std::string piece, Pieces& out) = 0;
  virtual void Finish(Pieces&) {}
};

// Immutable after building, so thread-safe.
class Decoder {
 public:
  // From the value of "decoder" (null: tokens are joined by spaces). kUnimplemented names an unknown type or
  // order.
  static Expected<Decoder> FromJson(const PlainJson& json);

  class Stream {
   public:
    std::string Add(std::string_view token);
    std::string Finish();

   private:
    friend class Decoder;
    std::string Run(std::size_t first, DecodeStep::Pieces pieces);
    std::vector<std::unique_ptr<DecodeStep>> steps_;
  };
  Stream NewStream() const;  // REQUIRES: the decoder outlives the stream

  // The bytes of one token on its own; may be part of a character.
  std::string BytesOf(std::string_view token) const;

 private:
  enum class Kind { kJoinBySpace, kByteLevel, kReplace, kByteFallback, kStrip, kMetaspace };
  struct Step {
    Kind kind;
    std::vector<Regex> pattern;       // of Replace: one
    std::string content;              // of Replace, Strip, Metaspace
    std::size_t start = 0, stop = 0;  // of Strip: characters at most
    bool fused = false;               // the pieces that come are parts of one
    bool drops_first = false;         // of Metaspace
  };
  Status AddJson(const PlainJson& json, int depth, bool& fused);

  std::vector<Step> steps_;
};

}  // namespace elasticmoe::model
