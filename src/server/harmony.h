// The output of gpt-oss: messages with a header each (OpenAI's "harmony" response format),
//   <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.NAME
//   <|constrain|>json<|message|>{...}<|call|>  or  <|start|>assistant<|channel|>final<|message|>...<|return|>
// analysis is reasoning; final, and commentary to nobody, is content; what goes to functions.NAME is a call.
// Text in pieces goes in; the result is the same wherever it was cut. Pure.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "server/tool_formats.h"

namespace elasticmoe::server {

class HarmonyParser {
 public:
  explicit HarmonyParser(bool parallel) : parallel_(parallel) {}  // !parallel: only the first call counts

  struct Output {
    std::string reasoning;
    std::string content;
    std::vector<ToolCall> calls;
  };
  // Text without a header is content. A call whose arguments are no JSON object comes out as content.
  Output Add(std::string_view text);
  Output Finish();

  int CallCount() const { return count_; }

 private:
  enum class State { kHeader, kBody };
  enum class Kind { kReasoning, kContent, kCall };

  void ReadHeader(std::string_view header);
  void Body(std::string_view text, Output& out);
  void EndMessage(Output& out);
  bool StepHeader();
  bool StepBody(Output& out);

  bool parallel_;
  State state_ = State::kHeader;
  Kind kind_ = Kind::kContent;
  int count_ = 0;
  std::string name_;       // of the function called
  std::string arguments_;  // of the call so far
  std::string held_;
};

}  // namespace elasticmoe::server
