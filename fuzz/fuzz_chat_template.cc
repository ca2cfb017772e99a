// A chat template from anywhere: refused, or it renders, or it says why not, within its bounds. The input is
// the template and, behind its last NUL byte, the variables as JSON.
#include <cstdint>
#include <string_view>

#include "base/json.h"
#include "model/chat_template.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace elasticmoe;
  std::string_view source(reinterpret_cast<const char*>(data), size);
  std::string_view text =
      R"({"messages":[{"role":"system","content":"s"},{"role":"user","content":"hi"},{"role":"assistant","content":null,
          "tool_calls":[{"type":"function","function":{"name":"f","arguments":{"a":1.5,"b":[true,null]}}}]}],
          "tools":[{"type":"function","function":{"name":"f"}}],"add_generation_prompt":true,"bos_token":"<s>","eos_token":"</s>"})";
  if (const auto nul = source.rfind('\0'); nul != source.npos) {
    text = source.substr(nul + 1);
    source = source.substr(0, nul);
  }
  const auto variables = ParseJson(text);
  const auto parsed = model::ChatTemplate::Parse(source);
  if (parsed && variables && variables->is_object()) (void)parsed->Render(*variables, 1'700'000'000);
  return 0;
}
