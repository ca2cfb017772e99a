// tokenizer.json from anywhere: refused, or it encodes and decodes any text without harm. The input is the
// file and, behind its last NUL byte, a text.
#include <cstdint>
#include <string_view>

#include "base/check.h"
#include "model/tokenizer.h"

using elasticmoe::TokenId;
using elasticmoe::model::StreamDecoder;
using elasticmoe::model::Tokenizer;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::string_view json(reinterpret_cast<const char*>(data), size);
  std::string_view text = "Hello  world's 123 <s> \xE4\xBD\xA0\xE5\xA5\xBD \xFF\r\n\n e\xCC\x81 <0x0A>";
  if (const auto nul = json.rfind('\0'); nul != json.npos) {
    text = json.substr(nul + 1);
    json = json.substr(0, nul);
  }
  const auto tokenizer = Tokenizer::FromJson(json, json);
  if (!tokenizer) return 0;
  const Tokenizer& t = **tokenizer;
  for (const bool special : {false, true}) {
    const std::vector<TokenId> ids = t.Encode(text, special);
    StreamDecoder stream(t, special);
    std::string streamed;
    for (const TokenId id : ids) {
      EM_CHECK(id >= 0 && (special || id < t.Size()), "id {} of {}", id, t.Size());
      streamed += stream.Add(id);
      t.TokenText(id);
    }
    streamed += stream.Finish();
    EM_CHECK(streamed == t.Decode(ids, special), "a stream gave another text than the whole");
  }
  return 0;
}
