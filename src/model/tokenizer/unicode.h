// UTF-8 and Unicode as the tokenizers need them: checking, repairing, normal forms (ICU) and the byte
// alphabet of byte-level BPE. Pure.
#pragma once

#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

namespace elasticmoe::model {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";  // U+FFFD

// One step through bytes that may be UTF-8. Where they are not, `bytes` is the length of the "maximal
// subpart" (Unicode 15, section 3.9) that one U+FFFD stands for; `cut_off` says that only the end of the text
// made it wrong.
struct Utf8Step {
  char32_t code = 0xFFFD;
  int bytes = 1;
  bool valid = false;
  bool cut_off = false;
};

// REQUIRES: at < text.size().
Utf8Step StepUtf8(std::string_view text, std::size_t at);

bool IsUtf8(std::string_view text);
std::string RepairUtf8(std::string_view text);  // each maximal subpart that is wrong becomes U+FFFD
void AppendUtf8(std::string& out, char32_t code);

// Bytes of the character that starts at `at`. REQUIRES: `text` is UTF-8 and `at` the start of a character.
constexpr std::size_t CharBytes(std::string_view text, std::size_t at) {
  const auto lead = static_cast<unsigned char>(text[at]);
  return lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
}

enum class NormalForm { kNfc, kNfd, kNfkc, kNfkd };

// REQUIRES: `text` is UTF-8.
std::string Normalize(std::string_view text, NormalForm form);

// Properties of a character in the sense of the regex classes \w and \s.
bool IsWordCharacter(char32_t code);
bool IsSpaceCharacter(char32_t code);

// The alphabet of byte-level BPE (GPT-2): every byte has a printable character of its own.
const std::array<std::string, 256>& ByteAlphabet();

// The bytes that `token` stands for; nullopt if it holds a character outside of the alphabet.
std::optional<std::string> FromByteAlphabet(std::string_view token);

// Bytes in, text out as soon as it is certain. The pieces together equal RepairUtf8 of the whole.
class Utf8Stream {
 public:
  std::string Add(std::string_view bytes);
  std::string Finish();

 private:
  std::string tail_;  // the start of a character, at most 3 bytes
};

}  // namespace elasticmoe::model
