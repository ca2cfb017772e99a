// The pre_tokenizer of tokenizer.json: cuts a text into the pieces that the model encodes one by one.
// Immutable after building, so thread-safe.
#pragma once

#include <deque>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "model/tokenizer/regex.h"
#include "model/tokenizer/tokenizer_json.h"

namespace elasticmoe::model {

// Pieces of one text. They point into it, or into `made` where a step changed them.
struct TextPieces {
  struct Piece {
    std::string_view text;
    bool at_start = false;  // nothing of the whole input stands before it
  };
  std::vector<Piece> pieces;
  std::deque<std::string> made;
};

class PreTokenizer {
 public:
  // From the value of "pre_tokenizer" (null = none). kUnimplemented names an unknown type and the known ones.
  static Expected<PreTokenizer> FromJson(const PlainJson& json);

  // Splits each of `pieces` further.
  void Apply(TextPieces& pieces, RegexScratch& scratch) const;

  // Pieces are meant in the byte alphabet (unicode.h) from here on; the pieces stay bytes themselves.
  bool ByteLevel() const { return byte_level_; }

 private:
  enum class Kind { kSplit, kPrefixSpace, kMetaspace };
  enum class Behavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };
  enum class Prepend { kAlways, kFirst, kNever };
  struct Step {
    Kind kind;
    std::vector<Regex> pattern;  // of a split: one
    Behavior behavior = Behavior::kIsolated;
    bool invert = false;
    std::string replacement;  // of Metaspace, for the space
    Prepend prepend = Prepend::kAlways;
  };
  struct Span {
    std::size_t begin, end;
    bool match;
  };

  Status AddJson(const PlainJson& json, int depth);
  Status AddSplit(Regex pattern, Behavior behavior, bool invert);
  Status AddMetaspace(const PlainJson& json);
  static void Split(const Step& step, const TextPieces::Piece& piece, RegexScratch& scratch,
                    std::vector<Span>& spans, std::vector<TextPieces::Piece>& out);

  std::vector<Step> steps_;
  bool byte_level_ = false;
};

}  // namespace elasticmoe::model
