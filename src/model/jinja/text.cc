#include "model/jinja/text.h"

#include <fmt/format.h>
#include <unicode/locid.h>
#include <unicode/uchar.h>
#include <unicode/unistr.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <utility>

#include "model/tokenizer/unicode.h"

namespace elasticmoe::model::jinja {
namespace {

char32_t CodeAt(std::string_view text, std::size_t at) {
  return StepUtf8(text, at).code;
}

std::size_t StartOfLast(std::string_view text, std::size_t end) {
  do --end;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80);
  return end;
}

bool IsLineEnd(char32_t code) {
  return (code >= 0x0A && code <= 0x0D) || (code >= 0x1C && code <= 0x1E) || code == 0x85 || code == 0x2028 ||
         code == 0x2029;
}

std::string FromIcu(const icu::UnicodeString& text) {
  std::string out;
  text.toUTF8String(out);
  return out;
}

icu::UnicodeString ToIcu(std::string_view text) {
  return icu::UnicodeString::fromUTF8(icu::StringPiece(text.data(), static_cast<std::int32_t>(text.size())));
}

}  // namespace

bool IsSpace(char32_t code) {
  if (code < 0x80) return (code >= 0x09 && code <= 0x0D) || (code >= 0x1C && code <= 0x20);
  return code == 0x85 || u_charType(static_cast<UChar32>(code)) == U_SPACE_SEPARATOR || code == 0x2028 ||
         code == 0x2029;
}

bool IsPrintable(char32_t code) {
  if (code == ' ') return true;
  switch (u_charType(static_cast<UChar32>(code))) {
    case U_UNASSIGNED:
    case U_CONTROL_CHAR:
    case U_FORMAT_CHAR:
    case U_PRIVATE_USE_CHAR:
    case U_SURROGATE:
    case U_SPACE_SEPARATOR:
    case U_LINE_SEPARATOR:
    case U_PARAGRAPH_SEPARATOR:
      return false;
    default:
      return true;
  }
}

std::size_t CountChars(std::string_view text) {
  return static_cast<std::size_t>(std::count_if(
      text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
}

std::size_t OffsetOf(std::string_view text, std::size_t index) {
  std::size_t at = 0;
  for (; index > 0 && at < text.size(); --index) at += CharBytes(text, at);
  return at;
}

std::string_view Strip(std::string_view text, std::optional<std::string_view> chars, bool left, bool right) {
  const auto goes = [&](std::size_t at) {
    return chars ? chars->find(text.substr(at, CharBytes(text, at))) != chars->npos
                 : IsSpace(CodeAt(text, at));
  };
  while (left && !text.empty() && goes(0)) text.remove_prefix(CharBytes(text, 0));
  while (right && !text.empty() && goes(StartOfLast(text, text.size())))
    text = text.substr(0, StartOfLast(text, text.size()));
  return text;
}

std::vector<std::string_view> SplitBy(std::string_view text, std::string_view separator, std::int64_t limit,
                                      bool from_right) {
  std::vector<std::string_view> parts;
  for (; limit != 0; --limit) {
    const auto at = from_right ? text.rfind(separator) : text.find(separator);
    if (at == text.npos) break;
    if (from_right) {
      parts.push_back(text.substr(at + separator.size()));
      text = text.substr(0, at);
    } else {
      parts.push_back(text.substr(0, at));
      text.remove_prefix(at + separator.size());
    }
  }
  parts.push_back(text);
  if (from_right) std::reverse(parts.begin(), parts.end());
  return parts;
}

std::vector<std::string_view> SplitAtSpace(std::string_view text, std::int64_t limit, bool from_right) {
  std::vector<std::string_view> parts;
  for (; limit != 0; --limit) {
    text = Strip(text, std::nullopt, !from_right, from_right);
    if (text.empty()) return from_right ? std::vector(parts.rbegin(), parts.rend()) : parts;
    if (from_right) {
      std::size_t begin = text.size();
      while (begin > 0 && !IsSpace(CodeAt(text, StartOfLast(text, begin)))) begin = StartOfLast(text, begin);
      parts.push_back(text.substr(begin));
      text = text.substr(0, begin);
    } else {
      std::size_t end = 0;
      while (end < text.size() && !IsSpace(CodeAt(text, end))) end += CharBytes(text, end);
      parts.push_back(text.substr(0, end));
      text.remove_prefix(end);
    }
  }
  text = Strip(text, std::nullopt, !from_right, from_right);
  if (!text.empty()) parts.push_back(text);
  if (from_right) std::reverse(parts.begin(), parts.end());
  return parts;
}

std::vector<std::string_view> SplitLines(std::string_view text, bool keep_ends) {
  std::vector<std::string_view> lines;
  std::size_t begin = 0;
  for (std::size_t i = 0; i < text.size();) {
    const Utf8Step step = StepUtf8(text, i);
    const std::size_t end = i;
    i += static_cast<std::size_t>(step.bytes);
    if (!IsLineEnd(step.code)) continue;
    if (step.code == '\r' && i < text.size() && text[i] == '\n') ++i;
    lines.push_back(text.substr(begin, (keep_ends ? i : end) - begin));
    begin = i;
  }
  if (begin < text.size()) lines.push_back(text.substr(begin));
  return lines;
}

std::string Upper(std::string_view text) {
  return FromIcu(ToIcu(text).toUpper(icu::Locale::getRoot()));
}
std::string Lower(std::string_view text) {
  return FromIcu(ToIcu(text).toLower(icu::Locale::getRoot()));
}

std::string Capitalize(std::string_view text) {
  if (text.empty()) return "";
  std::string out;
  const std::size_t first = CharBytes(text, 0);
  AppendUtf8(out, static_cast<char32_t>(u_totitle(static_cast<UChar32>(CodeAt(text, 0)))));
  return out + Lower(text.substr(first));
}

std::string Title(std::string_view text) {
  std::string out;
  bool inside = false;  // of a run of letters
  for (std::size_t i = 0; i < text.size(); i += CharBytes(text, i)) {
    const auto code = static_cast<UChar32>(CodeAt(text, i));
    const bool cased = u_hasBinaryProperty(code, UCHAR_CASED);
    AppendUtf8(out, static_cast<char32_t>(!cased ? code : inside ? u_tolower(code) : u_totitle(code)));
    inside = cased;
  }
  return out;
}

std::string Replace(std::string_view text, std::string_view old_text, std::string_view new_text,
                    std::int64_t limit) {
  std::string out;
  if (old_text.empty()) {  // between all characters
    for (std::size_t i = 0; i < text.size(); i += CharBytes(text, i)) {
      if (limit != 0) out += new_text, --limit;
      out += text.substr(i, CharBytes(text, i));
    }
    if (limit != 0) out += new_text;
    return out;
  }
  for (; limit != 0; --limit) {
    const auto at = text.find(old_text);
    if (at == text.npos) break;
    out += text.substr(0, at);
    out += new_text;
    text.remove_prefix(at + old_text.size());
  }
  return out += text;
}

std::size_t CountOf(std::string_view text, std::string_view part) {
  if (part.empty()) return CountChars(text) + 1;
  std::size_t count = 0;
  for (auto at = text.find(part); at != text.npos; at = text.find(part, at + part.size())) ++count;
  return count;
}

std::string FormatFloat(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  // The shortest digits that give the value back, laid out as Python does.
  char buffer[32];
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::scientific).ptr;
  std::string_view text(buffer, static_cast<std::size_t>(end - buffer));
  std::string sign, digits;
  if (text[0] == '-') {
    sign = "-";
    text.remove_prefix(1);
  }
  const auto e = text.find('e');
  for (const char c : text.substr(0, e))
    if (c != '.') digits += c;
  int exponent = 0;
  std::string_view exponent_text = text.substr(e + 1);
  if (exponent_text[0] == '+') exponent_text.remove_prefix(1);
  std::from_chars(exponent_text.data(), exponent_text.data() + exponent_text.size(), exponent);
  const int count = static_cast<int>(digits.size());
  if (exponent < -4 || exponent >= 16) {
    const std::string fraction = count > 1 ? "." + digits.substr(1) : "";
    return fmt::format("{}{}{}e{}{:02}", sign, digits[0], fraction, exponent < 0 ? '-' : '+',
                       std::abs(exponent));
  }
  if (exponent < 0) return sign + "0." + std::string(static_cast<std::size_t>(-exponent - 1), '0') + digits;
  if (count <= exponent + 1)
    return sign + digits + std::string(static_cast<std::size_t>(exponent + 1 - count), '0') + ".0";
  const auto whole = static_cast<std::size_t>(exponent + 1);
  return sign + digits.substr(0, whole) + "." + digits.substr(whole);
}

std::string Quote(std::string_view text) {
  const char quote = text.find('\'') != text.npos && text.find('"') == text.npos ? '"' : '\'';
  std::string out(1, quote);
  for (std::size_t i = 0; i < text.size(); i += CharBytes(text, i)) {
    const char32_t code = CodeAt(text, i);
    if (code == static_cast<char32_t>(quote) || code == '\\') {
      out += '\\';
      out += static_cast<char>(code);
    } else if (code == '\n') {
      out += "\\n";
    } else if (code == '\r') {
      out += "\\r";
    } else if (code == '\t') {
      out += "\\t";
    } else if (IsPrintable(code)) {
      out += text.substr(i, CharBytes(text, i));
    } else if (code < 0x100) {
      out += fmt::format("\\x{:02x}", static_cast<unsigned>(code));
    } else if (code < 0x10000) {
      out += fmt::format("\\u{:04x}", static_cast<unsigned>(code));
    } else {
      out += fmt::format("\\U{:08x}", static_cast<unsigned>(code));
    }
  }
  return out += quote;
}

std::optional<std::int64_t> ParseInteger(std::string_view text, int base) {
  text = Strip(text, std::nullopt, true, true);
  const bool negative = text.starts_with('-');
  if (negative || text.starts_with('+')) text.remove_prefix(1);
  const auto prefixed = [&](char letter) {
    return text.size() > 2 && text[0] == '0' && (text[1] | 0x20) == letter;
  };
  if (base == 0) base = prefixed('x') ? 16 : prefixed('o') ? 8 : prefixed('b') ? 2 : 10;
  if ((base == 16 && prefixed('x')) || (base == 8 && prefixed('o')) || (base == 2 && prefixed('b'))) {
    text.remove_prefix(2);
    if (text.starts_with('_')) text.remove_prefix(1);
  }
  std::string digits;
  bool underscore_may_come = false;
  for (const char c : text) {
    if (c == '_') {
      if (!std::exchange(underscore_may_come, false)) return std::nullopt;
      continue;
    }
    digits += c;
    underscore_may_come = true;
  }
  if (digits.empty() || text.ends_with('_')) return std::nullopt;
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value, base);
  if (error != std::errc() || end != digits.data() + digits.size()) return std::nullopt;
  if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) return std::nullopt;
  return negative ? -static_cast<std::int64_t>(value) : static_cast<std::int64_t>(value);
}

std::optional<double> ParseFloat(std::string_view text) {
  text = Strip(text, std::nullopt, true, true);
  const bool negative = text.starts_with('-');
  if (negative || text.starts_with('+')) text.remove_prefix(1);
  if (text.empty() || text.starts_with('-') || text.starts_with('+')) return std::nullopt;
  std::string digits;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const auto is_digit = [&](std::size_t at) {
      return at < text.size() && text[at] >= '0' && text[at] <= '9';
    };
    if (text[i] == '_') {
      if (i == 0 || !is_digit(i - 1) || !is_digit(i + 1)) return std::nullopt;
    } else {
      digits += text[i];
    }
  }
  double value = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (end != digits.data() + digits.size() || digits.find('(') != digits.npos) return std::nullopt;
  // Out of range: from_chars leaves the value alone; Python gives infinity or zero.
  if (error == std::errc::result_out_of_range)
    value = digits.find("e-") == digits.npos && digits.find("E-") == digits.npos ? HUGE_VAL : 0;
  else if (error != std::errc())
    return std::nullopt;
  return negative ? -value : value;
}

}  // namespace elasticmoe::model::jinja
