// Regular expressions of tokenizer.json (written for Oniguruma) run by PCRE2's JIT. The constructs in which
// the two differ are rewritten or refused, so that matches are equal. Immutable after compiling, so
// thread-safe.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "base/error.h"

namespace elasticmoe::model {

// What a thread needs while it matches: match data and a stack for the JIT, made at the first match. One per
// call of Encode.
class RegexScratch {
 public:
  RegexScratch();
  ~RegexScratch();
  RegexScratch(const RegexScratch&) = delete;
  RegexScratch& operator=(const RegexScratch&) = delete;

 private:
  friend class Regex;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

class Regex {
 public:
  // kInvalidArgument (no regex, with the place) or kUnimplemented (a construct that PCRE2 reads otherwise).
  static Expected<Regex> Compile(std::string_view pattern);
  static Expected<Regex> Literal(std::string_view text);  // matches `text` itself

  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;
  ~Regex();

  struct Match {
    std::size_t begin, end;
  };

  // The first match that starts at or after `from`. A match that gives up at PCRE2's limits counts as none.
  // REQUIRES: `text` is UTF-8, `from` the start of a character or text.size().
  std::optional<Match> Find(std::string_view text, std::size_t from, RegexScratch& scratch) const;

 private:
  struct Code;
  explicit Regex(std::unique_ptr<Code> code);
  std::unique_ptr<Code> code_;
};

}  // namespace elasticmoe::model
