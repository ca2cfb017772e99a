// Tool calls in the text of Qwen and Hermes style models: <tool_call>{"name": ..., "arguments":
// {...}}</tool_call>. Text in pieces goes in; content and whole calls come out. Pure.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"

namespace elasticmoe::server {

struct ToolCall {
  std::string name;
  std::string arguments;  // JSON text
};

class ToolCallParser {
 public:
  explicit ToolCallParser(bool parallel) : parallel_(parallel) {}  // !parallel: only the first call counts

  struct Output {
    std::string content;
    std::vector<ToolCall> calls;
  };
  // What became certain. Text between the tags that is no call comes out as content, tags and all; white
  // space next to calls is dropped.
  Output Add(std::string_view text);
  Output Finish();

  int CallCount() const { return count_; }

 private:
  void Content(std::string_view text, Output& out);
  bool Call(std::string_view text, Output& out);

  bool parallel_;
  bool inside_ = false;
  int count_ = 0;
  std::string held_;   // a part of a tag, or the call so far
  std::string space_;  // white space that a call may follow
};

}  // namespace elasticmoe::server
