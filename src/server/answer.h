// How the choices of one request become an answer: chat or plain completion, whole or streamed. Pure.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "server/choice.h"
#include "server/openai_response.h"
#include "server/output_parser.h"

namespace elasticmoe::server {

// One choice and what has been gathered of it.
struct ChoiceState {
  int index = 0;
  std::vector<TokenId> prompt;
  std::unique_ptr<Choice> choice;
  std::vector<core::TokenLogprob> prompt_logprobs = {};  // of prompt[1..]
  int cached_tokens = 0;

  bool begun = false;   // its first chunk is out
  int text_offset = 0;  // of completion logprobs
  int tool_calls_sent = 0;
  std::unique_ptr<OutputParser> parser = {};  // of chat; may be null

  // Gathered for a whole answer.
  std::string text = {};
  std::string reasoning = {};
  std::vector<ToolCall> calls = {};
  std::vector<TokenId> tokens = {};
  std::vector<core::TokenLogprob> logprobs = {};
};

struct AnswerOptions {
  AnswerHead head;
  TokenFormat format;
  bool logprobs = false;
  bool prompt_logprobs = false;
  bool token_ids = false;
  bool stream = false;
  bool include_usage = false;
  bool continuous_usage = false;
  bool echo = false;                         // completions
  std::vector<std::string> echo_texts = {};  // one a prompt
  int n = 1;                                 // choices per prompt, so that index / n is the prompt
};

class AnswerWriter {
 public:
  static std::unique_ptr<AnswerWriter> Chat(AnswerOptions options);
  static std::unique_ptr<AnswerWriter> Completion(AnswerOptions options);
  virtual ~AnswerWriter() = default;

  // Takes in what an event added; for a stream, appends the SSE text of the chunks to `sse`. `delta` comes
  // from state.choice, which may have just finished. `usage`: of the whole answer so far.
  virtual void Add(ChoiceState& state, Choice::Delta delta, const UsageCount& usage, std::string& sse) = 0;

  // After the last chunk: the usage chunk if it was asked for, and [DONE].
  std::string StreamEnd(const UsageCount& usage) const;
  // REQUIRES: not a stream, and every choice finished.
  virtual Json Whole(std::vector<ChoiceState>& states, const UsageCount& usage) const = 0;

 protected:
  explicit AnswerWriter(AnswerOptions options) : options_(std::move(options)) {}
  virtual Json Frame(Json choices) const = 0;
  void Emit(Json choice, const UsageCount& usage, Json extra, std::string& sse) const;

  AnswerOptions options_;
};

}  // namespace elasticmoe::server
