#include "server/answer.h"

#include "base/hash.h"

namespace elasticmoe::server {
namespace {

template <class T>
void Append(std::vector<T>& to, std::vector<T>&& from) {
  to.insert(to.end(), std::make_move_iterator(from.begin()), std::make_move_iterator(from.end()));
}

Json FinishJson(const Choice& choice) {
  return choice.Finished() ? Json(choice.FinishReason()) : Json(nullptr);
}

// Under both names that clients read.
void AddReasoning(const std::string& reasoning, Json& message) {
  if (reasoning.empty()) return;
  message["reasoning_content"] = reasoning;
  message["reasoning"] = reasoning;
}

class ChatWriter final : public AnswerWriter {
 public:
  explicit ChatWriter(AnswerOptions options) : AnswerWriter(std::move(options)) {}

  void Add(ChoiceState& state, Choice::Delta delta, const UsageCount& usage, std::string& sse) override {
    OutputParser::Output parsed;
    if (state.parser) {
      parsed = state.parser->Add(delta.text);
      if (state.choice->Finished()) {
        auto rest = state.parser->Finish();
        parsed.reasoning += rest.reasoning;
        parsed.content += rest.content;
        Append(parsed.calls, std::move(rest.calls));
      }
    } else {
      parsed.content = std::move(delta.text);
    }
    if (options_.stream) {
      Stream(state, std::move(parsed), delta, usage, sse);
      return;
    }
    state.text += parsed.content;
    state.reasoning += parsed.reasoning;
    Append(state.calls, std::move(parsed.calls));
    Append(state.tokens, std::move(delta.tokens));
    Append(state.logprobs, std::move(delta.logprobs));
  }

  Json Whole(std::vector<ChoiceState>& states, const UsageCount& usage) const override {
    Json choices = Json::array();
    for (ChoiceState& state : states) {
      Json message = {{"role", "assistant"}, {"content", state.text}, {"refusal", nullptr}};
      AddReasoning(state.reasoning, message);
      if (state.text.empty() && !(state.calls.empty() && state.reasoning.empty()))
        message["content"] = nullptr;
      if (!state.calls.empty()) {
        Json calls = Json::array();
        for (const ToolCall& call : state.calls)
          calls.push_back(ToolCallJson(call, CallId(state.index, static_cast<int>(calls.size()))));
        message["tool_calls"] = std::move(calls);
      }
      Json choice = {{"index", state.index},
                     {"message", std::move(message)},
                     {"logprobs", nullptr},
                     {"finish_reason", Finish(state)},
                     {"stop_reason", state.choice->StopReason()}};
      if (options_.logprobs) choice["logprobs"] = ChatLogprobs(state.logprobs, options_.format);
      if (options_.token_ids) choice["token_ids"] = state.tokens;
      choices.push_back(std::move(choice));
    }
    Json whole = ChatCompletion(options_.head, std::move(choices));
    whole["usage"] = UsageJson(usage);
    if (options_.token_ids) whole["prompt_token_ids"] = states[0].prompt;
    if (options_.prompt_logprobs)
      whole["prompt_logprobs"] = PromptLogprobs(states[0].prompt_logprobs, options_.format);
    return whole;
  }

 protected:
  Json Frame(Json choices) const override { return ChatChunk(options_.head, std::move(choices)); }

 private:
  std::string CallId(int choice, int call) const {
    return fmt::format("call_{:016x}",
                       HashCombine(HashBytes(options_.head.id), static_cast<std::uint64_t>(choice) << 32 |
                                                                    static_cast<std::uint64_t>(call)));
  }

  static Json Finish(const ChoiceState& state) {
    if (state.parser && state.parser->CallCount() > 0 && state.choice->FinishReason() == "stop")
      return "tool_calls";
    return FinishJson(*state.choice);
  }

  Json Chunk(const ChoiceState& state, Json delta) const {
    return Json{{"index", state.index},
                {"delta", std::move(delta)},
                {"logprobs", nullptr},
                {"finish_reason", nullptr}};
  }

  void Stream(ChoiceState& state, OutputParser::Output parsed, const Choice::Delta& delta,
              const UsageCount& usage, std::string& sse) {
    Json extra = Json::object();
    if (!state.begun) {
      state.begun = true;
      if (options_.token_ids) extra["prompt_token_ids"] = state.prompt;
      Emit(Chunk(state, {{"role", "assistant"}, {"content", ""}}), usage, std::move(extra), sse);
    }
    std::vector<Json> chunks;
    const bool shows_tokens = !delta.tokens.empty() && (options_.logprobs || options_.token_ids);
    if (!parsed.reasoning.empty()) {
      Json piece = Json::object();
      AddReasoning(parsed.reasoning, piece);
      chunks.push_back(Chunk(state, std::move(piece)));
    }
    if (!parsed.content.empty() || (shows_tokens && chunks.empty()))
      chunks.push_back(Chunk(state, {{"content", parsed.content}}));
    if (shows_tokens) {
      if (options_.logprobs) chunks[0]["logprobs"] = ChatLogprobs(delta.logprobs, options_.format);
      if (options_.token_ids) chunks[0]["token_ids"] = delta.tokens;
    }
    for (const ToolCall& call : parsed.calls) {
      Json entry = {{"index", state.tool_calls_sent}};
      entry.update(ToolCallJson(call, CallId(state.index, state.tool_calls_sent)));
      ++state.tool_calls_sent;
      chunks.push_back(Chunk(state, {{"tool_calls", Json::array({std::move(entry)})}}));
    }
    if (state.choice->Finished()) {
      if (chunks.empty()) chunks.push_back(Chunk(state, {{"content", ""}}));
      chunks.back()["finish_reason"] = Finish(state);
      chunks.back()["stop_reason"] = state.choice->StopReason();
    }
    for (Json& chunk : chunks) Emit(std::move(chunk), usage, Json::object(), sse);
  }
};

class CompletionWriter final : public AnswerWriter {
 public:
  explicit CompletionWriter(AnswerOptions options) : AnswerWriter(std::move(options)) {}

  void Add(ChoiceState& state, Choice::Delta delta, const UsageCount& usage, std::string& sse) override {
    if (!options_.stream) {
      state.text += delta.text;
      Append(state.tokens, std::move(delta.tokens));
      Append(state.logprobs, std::move(delta.logprobs));
      return;
    }
    const bool first = !state.begun;
    const bool shows_tokens = !delta.tokens.empty() && (options_.logprobs || options_.token_ids);
    if (delta.text.empty() && !shows_tokens && !state.choice->Finished() && !(first && options_.echo)) return;
    state.begun = true;
    Emit(ToJson(state, delta.text, delta.tokens, std::move(delta.logprobs), first), usage, Json::object(),
         sse);
  }

  Json Whole(std::vector<ChoiceState>& states, const UsageCount& usage) const override {
    Json choices = Json::array();
    for (ChoiceState& state : states)
      choices.push_back(ToJson(state, state.text, state.tokens, std::move(state.logprobs), true));
    Json whole = TextCompletion(options_.head, std::move(choices));
    whole["usage"] = UsageJson(usage);
    return whole;
  }

 protected:
  Json Frame(Json choices) const override { return TextCompletion(options_.head, std::move(choices)); }

 private:
  // `first`: it opens with the prompt where that is echoed.
  Json ToJson(ChoiceState& state, const std::string& text, const std::vector<TokenId>& tokens,
              std::vector<core::TokenLogprob> logprobs, bool first) const {
    const bool echo = options_.echo && first;
    Json choice = {
        {"index", state.index},
        {"text",
         echo ? options_.echo_texts[static_cast<std::size_t>(state.index / options_.n)] + text : text},
        {"logprobs", nullptr},
        {"finish_reason", FinishJson(*state.choice)},
        {"stop_reason", state.choice->StopReason()}};
    if (options_.logprobs) {
      std::optional<TokenId> first_token;
      if (echo) {
        first_token = state.prompt.front();
        logprobs.insert(logprobs.begin(), state.prompt_logprobs.begin(), state.prompt_logprobs.end());
      }
      choice["logprobs"] = CompletionLogprobs(first_token, logprobs, options_.format, state.text_offset);
    }
    if (options_.prompt_logprobs)
      choice["prompt_logprobs"] = PromptLogprobs(state.prompt_logprobs, options_.format);
    if (options_.token_ids) {
      if (first) choice["prompt_token_ids"] = state.prompt;
      choice["token_ids"] = tokens;
    }
    return choice;
  }
};

}  // namespace

std::unique_ptr<AnswerWriter> AnswerWriter::Chat(AnswerOptions options) {
  return std::make_unique<ChatWriter>(std::move(options));
}
std::unique_ptr<AnswerWriter> AnswerWriter::Completion(AnswerOptions options) {
  return std::make_unique<CompletionWriter>(std::move(options));
}

void AnswerWriter::Emit(Json choice, const UsageCount& usage, Json extra, std::string& sse) const {
  Json chunk = Frame(Json::array({std::move(choice)}));
  if (options_.continuous_usage)
    chunk["usage"] = UsageJson(usage);
  else if (options_.include_usage)
    chunk["usage"] = nullptr;
  for (auto& [name, value] : extra.items()) chunk[name] = std::move(value);
  sse += SseData(chunk);
}

std::string AnswerWriter::StreamEnd(const UsageCount& usage) const {
  std::string out;
  if (options_.include_usage) {
    Json chunk = Frame(Json::array());
    chunk["usage"] = UsageJson(usage);
    out = SseData(chunk);
  }
  out += kSseDone;
  return out;
}

}  // namespace elasticmoe::server
