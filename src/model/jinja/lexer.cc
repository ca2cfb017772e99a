#include "model/jinja/lexer.h"

#include <unicode/uchar.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <utility>

#include "model/jinja/text.h"
#include "model/tokenizer/unicode.h"

namespace elasticmoe::model::jinja {
namespace {

// All line ends become \n; one at the very end goes.
std::string NormalizeLines(std::string_view source) {
  std::string out;
  out.reserve(source.size());
  for (std::size_t i = 0; i < source.size(); ++i) {
    if (source[i] != '\r') {
      out += source[i];
      continue;
    }
    out += '\n';
    if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
  }
  if (out.ends_with('\n')) out.pop_back();
  return out;
}

bool IsDigit(char c) {
  return c >= '0' && c <= '9';
}

// Length of digits with single underscores between them at the start of `text`.
std::size_t DigitRun(std::string_view text) {
  std::size_t n = 0;
  while (n < text.size() &&
         (IsDigit(text[n]) || (text[n] == '_' && n > 0 && n + 1 < text.size() && IsDigit(text[n + 1]))))
    ++n;
  return n;
}

// The text that a string literal's inside stands for (Python's unicode-escape).
std::string Unescape(std::string_view text) {
  std::string out;
  char32_t high = 0;  // a high surrogate that waits for its low one
  const auto put = [&](char32_t code) {
    if (high != 0 && code >= 0xDC00 && code < 0xE000) {
      AppendUtf8(out, 0x10000 + ((std::exchange(high, 0) - 0xD800) << 10) + (code - 0xDC00));
      return;
    }
    if (std::exchange(high, 0) != 0) out += kReplacementCharacter;
    if (code >= 0xD800 && code < 0xDC00)
      high = code;
    else if ((code >= 0xDC00 && code < 0xE000) || code > 0x10FFFF)
      out += kReplacementCharacter;
    else
      AppendUtf8(out, code);
  };
  for (std::size_t i = 0; i < text.size();) {
    if (text[i] != '\\' || i + 1 >= text.size()) {
      const Utf8Step step = StepUtf8(text, i);
      put(step.code);
      i += static_cast<std::size_t>(step.bytes);
      continue;
    }
    const char c = text[i + 1];
    i += 2;
    constexpr std::string_view kNames = "abfnrtv\\'\"";
    constexpr std::string_view kCodes = "\a\b\f\n\r\t\v\\'\"";
    if (const auto at = kNames.find(c); at != kNames.npos) {
      put(static_cast<unsigned char>(kCodes[at]));
    } else if (c >= '0' && c <= '7') {
      char32_t code = static_cast<char32_t>(c - '0');
      for (int n = 0; n < 2 && i < text.size() && text[i] >= '0' && text[i] <= '7'; ++n, ++i)
        code = code * 8 + static_cast<char32_t>(text[i] - '0');
      put(code);
    } else if (c == 'x' || c == 'u' || c == 'U') {
      const std::size_t count = c == 'x' ? 2 : c == 'u' ? 4 : 8;
      const auto code = i + count <= text.size()
                            ? ParseInteger(fmt::format("0x{}", text.substr(i, count)), 16)
                            : std::nullopt;
      if (code) {
        put(static_cast<char32_t>(*code));
        i += count;
      } else {
        put('\\');
        put(static_cast<unsigned char>(c));
      }
    } else if (c != '\n') {  // a line end that is escaped goes; all else stays as it is
      put('\\');
      --i;
    }
  }
  if (high != 0) out += kReplacementCharacter;
  return out;
}

class Lexer {
 public:
  explicit Lexer(std::string source) : source_(std::move(source)) {}

  Expected<std::vector<Token>> Run() {
    while (at_ < source_.size()) EM_RETURN_IF_ERROR(Outside());
    Add(Token::Kind::kEnd, "");
    return std::move(tokens_);
  }

 private:
  std::string_view Rest() const { return std::string_view(source_).substr(at_); }
  char Peek(std::size_t ahead = 0) const {
    return at_ + ahead < source_.size() ? source_[at_ + ahead] : '\0';
  }
  void Add(Token::Kind kind, std::string_view text) {
    tokens_.push_back({kind, line_, std::string(text), Value()});
  }
  tl::unexpected<Error> Bad(std::string_view what) const {
    return Fail(ErrorCode::kInvalidArgument, "line {}: {}", line_, what);
  }

  void Advance(std::size_t bytes) {
    const auto begin = source_.begin() + static_cast<std::ptrdiff_t>(at_);
    line_ += static_cast<int>(std::count(begin, begin + static_cast<std::ptrdiff_t>(bytes), '\n'));
    at_ += bytes;
  }

  void SkipSpace() {
    while (at_ < source_.size()) {
      const Utf8Step step = StepUtf8(source_, at_);
      if (!IsSpace(step.code)) return;
      Advance(static_cast<std::size_t>(step.bytes));
    }
  }

  // Text up to a tag whose sign is `sign`; a block or comment (`strips`) takes the blanks before it on its
  // line along.
  void AddData(std::string_view text, char sign, bool strips) {
    std::string_view kept = text;
    if (sign == '-') {
      kept = Strip(text, std::nullopt, false, true);
    } else if (sign != '+' && strips) {
      const auto line_end = text.rfind('\n');
      const std::size_t line = line_end == text.npos ? 0 : line_end + 1;
      if ((line > 0 || line_starting_) && Strip(text.substr(line), std::nullopt, true, false).empty())
        kept = text.substr(0, line);
    }
    if (!kept.empty()) Add(Token::Kind::kData, kept);
    Advance(text.size());
  }

  // The sign and end of a tag are read by the caller; a '-' takes all white space behind, a block's end one
  // \n.
  void AfterEnd(char sign, bool trims) {
    const std::size_t before = at_;
    if (sign == '-')
      SkipSpace();
    else if (trims && sign != '+' && Peek() == '\n')
      Advance(1);
    line_starting_ = at_ > before && source_[at_ - 1] == '\n';
  }

  Status Outside() {
    std::size_t tag = at_;
    while (true) {
      tag = source_.find('{', tag);
      if (tag == source_.npos || tag + 1 >= source_.size()) {
        Add(Token::Kind::kData, Rest());
        Advance(source_.size() - at_);
        return {};
      }
      if (source_[tag + 1] == '{' || source_[tag + 1] == '%' || source_[tag + 1] == '#') break;
      ++tag;
    }
    const char kind = source_[tag + 1];
    char sign = tag + 2 < source_.size() ? source_[tag + 2] : '\0';
    if (sign != '-' && sign != '+') sign = '\0';
    AddData(Rest().substr(0, tag - at_), sign, kind != '{');
    line_starting_ = false;
    if (kind == '%' && StartsRaw()) return Raw();
    Advance(sign ? 3 : 2);
    if (kind == '#') return Comment();
    return Inside(kind == '{');
  }

  Status Comment() {
    const auto end = source_.find("#}", at_);
    if (end == source_.npos) return Bad("a comment has no end");
    const char sign =
        end > at_ && (source_[end - 1] == '-' || source_[end - 1] == '+') ? source_[end - 1] : '\0';
    Advance(end + 2 - at_);
    AfterEnd(sign, true);
    return {};
  }

  // Reads "{%- word -%}" at `at`: the bytes it takes and its signs; 0 if it is something else.
  struct WordTag {
    std::size_t bytes = 0;
    char begin_sign = '\0', end_sign = '\0';
  };
  WordTag ReadWordTag(std::size_t at, std::string_view word) const {
    WordTag tag;
    std::size_t i = at;
    const auto space = [&] {
      while (i < source_.size() && IsSpace(StepUtf8(source_, i).code)) i += CharBytes(source_, i);
    };
    if (source_.compare(i, 2, "{%") != 0) return tag;
    i += 2;
    if (i < source_.size() && (source_[i] == '-' || source_[i] == '+')) tag.begin_sign = source_[i++];
    space();
    if (source_.compare(i, word.size(), word) != 0) return tag;
    i += word.size();
    space();
    if (i < source_.size() && (source_[i] == '-' || source_[i] == '+')) tag.end_sign = source_[i++];
    if (source_.compare(i, 2, "%}") != 0) return tag;
    tag.bytes = i + 2 - at;
    return tag;
  }

  bool StartsRaw() const {
    const WordTag tag = ReadWordTag(at_, "raw");
    return tag.bytes > 0 && tag.end_sign != '+';
  }

  Status Raw() {
    const WordTag begin = ReadWordTag(at_, "raw");
    Advance(begin.bytes);
    AfterEnd(begin.end_sign, false);
    for (std::size_t end = source_.find("{%", at_); end != source_.npos; end = source_.find("{%", end + 2)) {
      const WordTag tag = ReadWordTag(end, "endraw");
      if (tag.bytes == 0) continue;
      AddData(Rest().substr(0, end - at_), tag.begin_sign, true);
      Advance(tag.bytes);
      AfterEnd(tag.end_sign, true);
      return {};
    }
    return Bad("a raw block has no end");
  }

  Status Inside(bool print) {
    Add(print ? Token::Kind::kPrintBegin : Token::Kind::kBlockBegin, "");
    const std::string_view end = print ? "}}" : "%}";
    std::string open;  // brackets still to be closed
    while (true) {
      SkipSpace();
      if (at_ >= source_.size()) return Bad(print ? "{{ has no end" : "{% has no end");
      if (open.empty()) {
        const bool has_sign = Peek() == '-' || (Peek() == '+' && !print);
        if (Rest().substr(has_sign ? 1 : 0).starts_with(end)) {
          const char sign = has_sign ? Peek() : '\0';
          Add(print ? Token::Kind::kPrintEnd : Token::Kind::kBlockEnd, "");
          Advance(has_sign ? 3 : 2);
          AfterEnd(sign, !print);
          return {};
        }
      }
      EM_RETURN_IF_ERROR(Word(open));
    }
  }

  Status Word(std::string& open) {
    const char c = Peek();
    if (IsDigit(c)) return Number();
    if (c == '"' || c == '\'') return Literal(c);
    const char32_t code = StepUtf8(source_, at_).code;
    if (c == '_' || u_isIDStart(static_cast<UChar32>(code))) {
      std::size_t end = at_;
      while (end < source_.size()) {
        const Utf8Step step = StepUtf8(source_, end);
        if (source_[end] != '_' && !u_isIDPart(static_cast<UChar32>(step.code))) break;
        if (step.code < 0x20) break;  // u_isIDPart takes control characters as well
        end += static_cast<std::size_t>(step.bytes);
      }
      Add(Token::Kind::kName, Rest().substr(0, end - at_));
      Advance(end - at_);
      return {};
    }
    constexpr std::array<std::string_view, 26> kOperators = {
        "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[",
        "]",  "(",  ")",  "{",  "}",  ">",  "<", "=", ".", ":", "|", ",", ";"};
    for (const std::string_view op : kOperators) {
      if (!Rest().starts_with(op)) continue;
      if (op == "(" || op == "[" || op == "{") open += op == "(" ? ')' : op == "[" ? ']' : '}';
      if (op == ")" || op == "]" || op == "}") {
        if (open.empty() || open.back() != op[0]) return Bad(fmt::format("unexpected '{}'", op));
        open.pop_back();
      }
      Add(Token::Kind::kOperator, op);
      Advance(op.size());
      return {};
    }
    return Bad(fmt::format("unexpected character {}", Quote(Rest().substr(0, CharBytes(source_, at_)))));
  }

  Status Literal(char quote) {
    std::size_t end = at_ + 1;
    while (end < source_.size() && source_[end] != quote) end += source_[end] == '\\' ? 2 : 1;
    if (end >= source_.size()) return Bad("a text has no end");
    Add(Token::Kind::kText, Unescape(Rest().substr(1, end - at_ - 1)));
    Advance(end + 1 - at_);
    return {};
  }

  Status Number() {
    const std::string_view rest = Rest();
    std::size_t n = DigitRun(rest);
    if (rest[0] == '0' && n == 1 && rest.size() > 2 &&
        std::string_view("xXoObB").find(rest[1]) != rest.npos) {
      n = 2;
      while (n < rest.size() && (std::isxdigit(static_cast<unsigned char>(rest[n])) || rest[n] == '_')) ++n;
    } else {
      // A fraction, an exponent or both make it a float.
      std::size_t end = n;
      if (end + 1 < rest.size() && rest[end] == '.' && IsDigit(rest[end + 1]))
        end += 1 + DigitRun(rest.substr(end + 1));
      if (end < rest.size() && (rest[end] == 'e' || rest[end] == 'E')) {
        const std::size_t sign =
            end + 1 < rest.size() && (rest[end + 1] == '+' || rest[end + 1] == '-') ? 1 : 0;
        if (const std::size_t digits = DigitRun(rest.substr(std::min(end + 1 + sign, rest.size())));
            digits > 0)
          end += 1 + sign + digits;
      }
      // Behind a dot digits are an index (x.0.1), never a float.
      const bool after_dot =
          !tokens_.empty() && tokens_.back().kind == Token::Kind::kOperator && tokens_.back().text == ".";
      if (end > n && !after_dot) {
        const auto value = ParseFloat(rest.substr(0, end));
        if (!value) return Bad("a number that cannot be read");
        Add(Token::Kind::kNumber, rest.substr(0, end));
        tokens_.back().number = Value(*value);
        Advance(end);
        return {};
      }
    }
    const auto value = ParseInteger(rest.substr(0, n), 0);
    if (!value) return Bad("a number that cannot be read");
    Add(Token::Kind::kNumber, rest.substr(0, n));
    tokens_.back().number = Value(*value);
    Advance(n);
    return {};
  }

  const std::string source_;
  std::size_t at_ = 0;
  int line_ = 1;
  bool line_starting_ = true;  // nothing but the start of the line stands before at_
  std::vector<Token> tokens_;
};

}  // namespace

Expected<std::vector<Token>> Tokenize(std::string_view source) {
  if (!IsUtf8(source)) return Fail(ErrorCode::kInvalidArgument, "line 1: the template is not UTF-8");
  return Lexer(NormalizeLines(source)).Run();
}

}  // namespace elasticmoe::model::jinja
