#include "model/tokenizer/unicode.h"

#include <unicode/bytestream.h>
#include <unicode/normalizer2.h>
#include <unicode/uchar.h>

#include <utility>

#include "base/check.h"

namespace elasticmoe::model {
namespace {

constexpr bool IsAscii(std::string_view text) {
  unsigned char all = 0;
  for (const unsigned char c : text) all |= c;
  return all < 0x80;
}

// Position of the first byte that is not part of valid UTF-8, text.size() if there is none.
std::size_t FindInvalid(std::string_view text) {
  for (std::size_t i = 0; i < text.size();) {
    if (static_cast<unsigned char>(text[i]) < 0x80) {
      ++i;
      continue;
    }
    const Utf8Step step = StepUtf8(text, i);
    if (!step.valid) return i;
    i += static_cast<std::size_t>(step.bytes);
  }
  return text.size();
}

const icu::Normalizer2& Normalizer(NormalForm form) {
  UErrorCode status = U_ZERO_ERROR;
  const icu::Normalizer2* normalizer = nullptr;
  switch (form) {
    case NormalForm::kNfc:
      normalizer = icu::Normalizer2::getNFCInstance(status);
      break;
    case NormalForm::kNfd:
      normalizer = icu::Normalizer2::getNFDInstance(status);
      break;
    case NormalForm::kNfkc:
      normalizer = icu::Normalizer2::getNFKCInstance(status);
      break;
    case NormalForm::kNfkd:
      normalizer = icu::Normalizer2::getNFKDInstance(status);
      break;
  }
  EM_CHECK(U_SUCCESS(status) && normalizer != nullptr, "ICU has no normalizer: {}", u_errorName(status));
  return *normalizer;
}

}  // namespace

Utf8Step StepUtf8(std::string_view text, std::size_t at) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(at);
  if (lead < 0x80) return {.code = lead, .bytes = 1, .valid = true};
  // What the second byte may be depends on the first (Unicode 15, table 3-7).
  int length = 0;
  unsigned char low = 0x80, high = 0xBF;
  char32_t code = 0;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
    code = lead & 0x1Fu;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    code = lead & 0x0Fu;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    code = lead & 0x07u;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return {};
  }
  for (int i = 1; i < length; ++i) {
    const std::size_t next = at + static_cast<std::size_t>(i);
    if (next >= text.size()) return {.bytes = i, .cut_off = true};
    if (byte(next) < low || byte(next) > high) return {.bytes = i};
    code = (code << 6) | (byte(next) & 0x3Fu);
    low = 0x80;
    high = 0xBF;
  }
  return {.code = code, .bytes = length, .valid = true};
}

bool IsUtf8(std::string_view text) {
  return FindInvalid(text) == text.size();
}

std::string RepairUtf8(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  while (true) {
    const std::size_t bad = FindInvalid(text);
    out += text.substr(0, bad);
    if (bad == text.size()) return out;
    out += kReplacementCharacter;
    text.remove_prefix(bad + static_cast<std::size_t>(StepUtf8(text, bad).bytes));
  }
}

void AppendUtf8(std::string& out, char32_t code) {
  const auto put = [&](char32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xC0 | (code >> 6));
    put(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    put(0xE0 | (code >> 12));
    put(0x80 | ((code >> 6) & 0x3F));
    put(0x80 | (code & 0x3F));
  } else {
    put(0xF0 | (code >> 18));
    put(0x80 | ((code >> 12) & 0x3F));
    put(0x80 | ((code >> 6) & 0x3F));
    put(0x80 | (code & 0x3F));
  }
}

std::string Normalize(std::string_view text, NormalForm form) {
  if (IsAscii(text)) return std::string(text);
  std::string out;
  out.reserve(text.size() + text.size() / 8);
  icu::StringByteSink<std::string> sink(&out);
  UErrorCode status = U_ZERO_ERROR;
  const icu::StringPiece piece(text.data(), static_cast<std::int32_t>(text.size()));
  Normalizer(form).normalizeUTF8(0, piece, sink, nullptr, status);
  // It fails only for want of memory; the text as it is beats no answer.
  return U_SUCCESS(status) ? out : std::string(text);
}

bool IsWordCharacter(char32_t code) {
  const auto c = static_cast<UChar32>(code);
  const auto type = u_charType(c);
  return u_hasBinaryProperty(c, UCHAR_ALPHABETIC) || type == U_NON_SPACING_MARK || type == U_ENCLOSING_MARK ||
         type == U_COMBINING_SPACING_MARK || type == U_DECIMAL_DIGIT_NUMBER ||
         type == U_CONNECTOR_PUNCTUATION || u_hasBinaryProperty(c, UCHAR_JOIN_CONTROL);
}

bool IsSpaceCharacter(char32_t code) {
  return u_hasBinaryProperty(static_cast<UChar32>(code), UCHAR_WHITE_SPACE);
}

const std::array<std::string, 256>& ByteAlphabet() {
  static const std::array<std::string, 256> alphabet = [] {
    std::array<std::string, 256> made;
    char32_t next = 0x100;  // for bytes that are no printable Latin-1 character, in order
    for (unsigned b = 0; b < 256; ++b) {
      const bool printable = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
      AppendUtf8(made[b], printable ? static_cast<char32_t>(b) : next++);
    }
    return made;
  }();
  return alphabet;
}

std::optional<std::string> FromByteAlphabet(std::string_view token) {
  // Every character of the alphabet is below U+0144, so the way back is a table too.
  static const std::array<int, 0x144> bytes = [] {
    std::array<int, 0x144> made;
    made.fill(-1);
    for (int b = 0; b < 256; ++b) made[StepUtf8(ByteAlphabet()[static_cast<std::size_t>(b)], 0).code] = b;
    return made;
  }();
  std::string out;
  out.reserve(token.size());
  for (std::size_t i = 0; i < token.size();) {
    const Utf8Step step = StepUtf8(token, i);
    if (!step.valid || step.code >= bytes.size() || bytes[step.code] < 0) return std::nullopt;
    out.push_back(static_cast<char>(bytes[step.code]));
    i += static_cast<std::size_t>(step.bytes);
  }
  return out;
}

std::string Utf8Stream::Add(std::string_view bytes) {
  tail_ += bytes;
  // Only the last three bytes can be the start of a character that is still to come.
  std::size_t end = tail_.size();
  for (std::size_t back = 1; back <= 3 && back <= tail_.size(); ++back) {
    const std::size_t at = tail_.size() - back;
    if ((static_cast<unsigned char>(tail_[at]) & 0xC0) == 0x80) continue;
    if (StepUtf8(tail_, at).cut_off) end = at;
    break;
  }
  std::string out = RepairUtf8(std::string_view(tail_).substr(0, end));
  tail_.erase(0, end);
  return out;
}

std::string Utf8Stream::Finish() {
  return RepairUtf8(std::exchange(tail_, {}));
}

}  // namespace elasticmoe::model
