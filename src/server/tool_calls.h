// Tool calls in the text of a model: found by their tags and read by their format. Text in pieces goes in;
// content and whole calls come out, the same wherever the text was cut. Pure.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "server/tool_formats.h"

namespace elasticmoe::server {

class ToolCallParser {
 public:
  // !parallel: only the first call counts. `tools`: those of the request, which say of some formats whether
  // an argument is a string; may be null.
  ToolCallParser(ToolFormat format, bool parallel, Json tools)
      : tags_(TagsOf(format)), format_(format), parallel_(parallel), tools_(std::move(tools)) {}

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
  // The text between the tags as calls; false where it is none.
  bool Calls(std::string_view text, Output& out);
  // Gives out what lies before the next tag and takes that away; false where none is there yet.
  bool NextTag(Output& out);

  const ToolTags& tags_;
  ToolFormat format_;
  bool parallel_;
  Json tools_;
  bool inside_ = false;
  int count_ = 0;
  std::string held_;   // a part of a tag, or the call so far
  std::string space_;  // white space that a call may follow
};

}  // namespace elasticmoe::server
