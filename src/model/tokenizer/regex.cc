#define PCRE2_CODE_UNIT_WIDTH 8
#include "model/tokenizer/regex.h"

#include <pcre2.h>

#include <array>

#include "base/check.h"
#include "model/tokenizer/unicode.h"

namespace elasticmoe::model {
namespace {

constexpr std::size_t kMaxPatternBytes = 64 << 10;  // the longest known is 400
constexpr std::size_t kJitStackBytes = 8 << 20;  // reserved, not touched, until a match backtracks that deep

// \s of Oniguruma is White_Space; PCRE2's also has U+180E. Ranges to stand inside of brackets.
constexpr std::string_view kSpace =
    R"(\t-\r \x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000})";
constexpr std::string_view kNotSpace =
    R"(\x{0}-\x{8}\x{E}-\x{1F}!-\x{84}\x{86}-\x{9F}\x{A1}-\x{167F}\x{1681}-\x{1FFF}\x{200B}-\x{2027})"
    R"(\x{202A}-\x{202E}\x{2030}-\x{205E}\x{2060}-\x{2FFF}\x{3001}-\x{10FFFF})";
// \w of Oniguruma is Alphabetic, Mark, Decimal_Number and Connector_Punctuation; the ranges are the
// Alphabetic symbols.
constexpr std::string_view kWord =
    R"(\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}\x{24B6}-\x{24E9}\x{1F130}-\x{1F149}\x{1F150}-\x{1F169}\x{1F170}-\x{1F189})";

Error Unsupported(std::string_view construct, std::size_t at) {
  return {ErrorCode::kUnimplemented,
          fmt::format("compiling a regex: {} at byte {} is not supported", construct, at)};
}

// The pattern in PCRE2's words.
Expected<std::string> Rewrite(std::string_view pattern) {
  std::string out;
  bool in_class = false;
  for (std::size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (c == '\\' && i + 1 < pattern.size()) {
      const char escaped = pattern[++i];
      switch (escaped) {
        case 's':
          out += in_class ? std::string(kSpace) : fmt::format("[{}]", kSpace);
          break;
        case 'S':
          out += in_class ? std::string(kNotSpace) : fmt::format("[^{}]", kSpace);
          break;
        case 'w':
          out += in_class ? std::string(kWord) : fmt::format("[{}]", kWord);
          break;
        case 'W':
          if (in_class) return tl::unexpected(Unsupported("\\W inside of brackets", i - 1));
          out += fmt::format("[^{}]", kWord);
          break;
        case 'h':
        case 'H':  // a hexadecimal digit there, horizontal space here
          return tl::unexpected(Unsupported("\\h", i - 1));
        default:
          out += c;
          out += escaped;
      }
      continue;
    }
    if (in_class) {
      if (c == ']') in_class = false;
      if (c == '[' && pattern.substr(i).starts_with("[:")) {
        const auto end = pattern.find(":]", i);
        if (end == pattern.npos) return tl::unexpected(Unsupported("an open [:", i));
        out += pattern.substr(i, end + 2 - i);
        i = end + 1;
        continue;
      }
      if (c == '[') return tl::unexpected(Unsupported("a set inside of brackets", i));
      if (c == '&' && pattern.substr(i).starts_with("&&"))
        return tl::unexpected(Unsupported("an intersection (&&)", i));
      out += c;
    } else {
      out += c;
      if (c == '[') {
        in_class = true;
        if (i + 1 < pattern.size() && pattern[i + 1] == '^') out += pattern[++i];
        if (i + 1 < pattern.size() && pattern[i + 1] == ']') {  // a bracket that comes first is meant itself
          out += "\\]";
          ++i;
        }
      }
    }
  }
  return out;
}

}  // namespace

struct RegexScratch::Impl {
  pcre2_match_data* data = pcre2_match_data_create(1, nullptr);  // the whole match is all we ask for
  pcre2_match_context* context = pcre2_match_context_create(nullptr);
  pcre2_jit_stack* stack = pcre2_jit_stack_create(32 << 10, kJitStackBytes, nullptr);

  Impl() {
    EM_CHECK(data != nullptr && context != nullptr, "out of memory for a match");
    if (stack != nullptr) pcre2_jit_stack_assign(context, nullptr, stack);
  }
  ~Impl() {
    pcre2_match_data_free(data);
    pcre2_match_context_free(context);
    if (stack != nullptr) pcre2_jit_stack_free(stack);
  }
};

RegexScratch::RegexScratch() = default;
RegexScratch::~RegexScratch() = default;

struct Regex::Code {
  pcre2_code* code = nullptr;
  std::string literal;  // searched for as it is, where there is no code
  ~Code() { pcre2_code_free(code); }
};

Regex::Regex(std::unique_ptr<Code> code) : code_(std::move(code)) {}
Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;
Regex::~Regex() = default;

Expected<Regex> Regex::Literal(std::string_view text) {
  auto code = std::make_unique<Code>();
  code->literal = text;
  return Regex(std::move(code));
}

Expected<Regex> Regex::Compile(std::string_view pattern) {
  if (pattern.size() > kMaxPatternBytes)
    return Fail(ErrorCode::kInvalidArgument, "compiling a regex: {} bytes (limit={})", pattern.size(),
                kMaxPatternBytes);
  if (!IsUtf8(pattern)) return Fail(ErrorCode::kInvalidArgument, "compiling a regex: it is not UTF-8");
  // "(*" at the start would set PCRE2's own options, limits among them.
  if (pattern.starts_with("(*")) return tl::unexpected(Unsupported("(*", 0));
  EM_ASSIGN_OR_RETURN(const std::string rewritten, Rewrite(pattern));
  int error = 0;
  PCRE2_SIZE at = 0;
  // Oniguruma's ^ and $ hold at every line (Ruby syntax), hence MULTILINE. \C could match half a character.
  constexpr auto kOptions = PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C;
  auto code = std::make_unique<Code>();
  code->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(rewritten.data()), rewritten.size(), kOptions,
                             &error, &at, nullptr);
  if (code->code == nullptr) {
    std::array<PCRE2_UCHAR, 256> message{};
    pcre2_get_error_message(error, message.data(), message.size());
    return Fail(ErrorCode::kInvalidArgument, "compiling a regex: {} at byte {} of {}",
                reinterpret_cast<const char*>(message.data()), at, rewritten);
  }
  pcre2_jit_compile(code->code, PCRE2_JIT_COMPLETE);  // without it, the interpreter matches the same
  return Regex(std::move(code));
}

std::optional<Regex::Match> Regex::Find(std::string_view text, std::size_t from,
                                        RegexScratch& scratch) const {
  if (code_->code == nullptr) {
    const auto at = code_->literal.empty() ? text.npos : text.find(code_->literal, from);
    if (at == text.npos) return std::nullopt;
    return Match{at, at + code_->literal.size()};
  }
  if (scratch.impl_ == nullptr) scratch.impl_ = std::make_unique<RegexScratch::Impl>();
  const int found = pcre2_match(code_->code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                                PCRE2_NO_UTF_CHECK, scratch.impl_->data, scratch.impl_->context);
  if (found < 0) return std::nullopt;
  const PCRE2_SIZE* ends = pcre2_get_ovector_pointer(scratch.impl_->data);
  return Match{ends[0], ends[1]};
}

}  // namespace elasticmoe::model
