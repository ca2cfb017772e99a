// The normalizer of tokenizer.json: what happens to a text before it is split. Immutable after building.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "model/tokenizer/regex.h"
#include "model/tokenizer/tokenizer_json.h"
#include "model/tokenizer/unicode.h"

namespace elasticmoe::model {

// The "pattern" of a Split or Replace: {"String": ...} or {"Regex": ...}. `key` is where it stands, for
// errors.
Expected<Regex> ReadPattern(const PlainJson& owner, std::string_view key);

// `text` with every match of `pattern` replaced by `content`.
std::string ReplaceAll(std::string_view text, const Regex& pattern, std::string_view content,
                       RegexScratch& scratch);

class Normalizer {
 public:
  // From the value of "normalizer" (null = none). kUnimplemented names an unknown type and the known ones.
  static Expected<Normalizer> FromJson(const PlainJson& json);

  bool Empty() const { return steps_.empty(); }
  std::string Apply(std::string_view text, RegexScratch& scratch) const;  // REQUIRES: `text` is UTF-8

 private:
  enum class Kind { kForm, kPrepend, kReplace, kStrip };
  struct Step {
    Kind kind;
    NormalForm form = NormalForm::kNfc;
    std::string content;               // of Prepend and Replace
    std::vector<Regex> pattern;        // of Replace: one
    bool left = false, right = false;  // of Strip
  };
  Status AddJson(const PlainJson& json, int depth);

  std::vector<Step> steps_;
};

}  // namespace elasticmoe::model
