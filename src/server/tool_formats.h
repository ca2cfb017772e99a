// How model families write tool calls: the tags around them, and what lies between. Pure.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"

namespace elasticmoe::server {

struct ToolCall {
  std::string name;
  std::string arguments;  // JSON text
};

// Formats as the chat templates of the families show them.
enum class ToolFormat {
  kHermes,     // <tool_call>{"name": ..., "arguments": {...}}</tool_call> (Qwen, Hermes)
  kQwenCoder,  // <tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>
  kGlm,        // <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>...</tool_call>
  kMistral,    // [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], or [TOOL_CALLS]NAME[ARGS]{...}
  kDeepseek,  // <｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n{...}\n```<｜tool▁call▁end｜> (V3),
              // or <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜> (V3.1)
};

struct ToolTags {
  std::string_view open;
  std::string_view close;                  // "" = a call ends with the text or at the next `open`
  std::array<std::string_view, 2> silent;  // tags around all calls: taken away; "" = none
  bool special;                            // the tags are special tokens: a decoder must not skip them
};
const ToolTags& TagsOf(ToolFormat format);

// The calls in the text between the tags; none where it is not what the format says. `tools`: the request's,
// to tell strings from other values where the format writes both bare; may be null.
std::vector<ToolCall> ReadToolCalls(ToolFormat format, std::string_view text, const Json& tools);

}  // namespace elasticmoe::server
