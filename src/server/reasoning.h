// Reasoning that a model writes before its answer, between <think> and </think> (Qwen3, DeepSeek-R1,
// GLM-4.5). Text in pieces goes in; reasoning and content come out, the same wherever the text was cut. Pure.
#pragma once

#include <string>
#include <string_view>

namespace elasticmoe::server {

class ThinkParser {
 public:
  // `open`: the prompt ends in <think> already.
  explicit ThinkParser(bool open) : open_(open) {}

  struct Output {
    std::string reasoning;
    std::string content;
  };
  // White space at both ends of the reasoning, and before the content that follows it, is dropped. Only a
  // <think> at the very beginning counts: later ones are text.
  Output Add(std::string_view text);
  Output Finish();

 private:
  enum class State { kStart, kReasoning, kContent };

  void Reasoning(std::string_view text, Output& out);

  State state_ = State::kStart;
  bool open_;
  bool trims_ = false;  // white space is dropped until something else comes
  std::string held_;    // what may be a tag
  std::string space_;   // white space that the end of the reasoning may follow
};

}  // namespace elasticmoe::server
