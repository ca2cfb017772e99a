// From bodies to checked prompts (the first half of generation.h).
#include <ctime>

#include "server/generation.h"

namespace elasticmoe::server {
namespace {

// Cuts, checks and budgets one prompt.
ApiResult<int> FitPrompt(const ServingContext& context, const SamplingRequest& request,
                         std::string_view param, bool chat, std::vector<TokenId>& prompt) {
  const int limit = context.engine.MaxModelLen();
  if (prompt.empty()) return BadField(param, "{}: the prompt is empty", param);
  std::size_t keep = prompt.size();
  if (request.truncate_prompt_tokens > 0) keep = static_cast<std::size_t>(request.truncate_prompt_tokens);
  if (request.truncate_prompt_tokens < 0)
    keep = static_cast<std::size_t>(std::max(1, limit - request.max_tokens.value_or(1)));
  if (keep < prompt.size()) prompt.erase(prompt.begin(), prompt.end() - static_cast<std::ptrdiff_t>(keep));

  if (prompt.size() > static_cast<std::size_t>(limit))
    return BadField(param, "{}: the prompt has {} tokens, more than the context of {} tokens; shorten it",
                    param, prompt.size(), limit);
  const int room = limit - static_cast<int>(prompt.size());
  const int wanted = request.max_tokens.value_or(chat ? room : std::min(16, room));
  if (wanted > room)
    return BadField(
        "max_tokens",
        "max_tokens: {} tokens do not fit behind a prompt of {} tokens (context={} tokens, room={}); lower "
        "max_tokens or shorten the prompt",
        wanted, prompt.size(), limit, room);
  if (wanted == 0 && !request.max_tokens)
    return BadField(param, "{}: the prompt of {} tokens fills the context of {} tokens; shorten it", param,
                    prompt.size(), limit);
  if (request.min_tokens > wanted)
    return BadField("min_tokens", "min_tokens: {} is larger than max_tokens {}", request.min_tokens, wanted);
  return wanted;
}

ApiResult<Json> Body(const HttpRequest& request) {
  const std::string_view encoding = request.Header("content-encoding");
  if (!encoding.empty() && encoding != "identity")
    return tl::unexpected<ApiError>(ApiError{
        .status = 415,
        .message = fmt::format("content-encoding {} is not supported; send the body as it is", encoding)});
  return ParseBody(request.body);
}

AnswerOptions MakeAnswer(const ServingContext& context, const SamplingRequest& request, std::string id,
                         std::string model) {
  AnswerOptions answer;
  answer.head = {.id = std::move(id), .model = std::move(model), .created_s = std::time(nullptr)};
  answer.format = {.tokenizer = context.text.tokenizer, .as_ids = request.return_tokens_as_token_ids};
  answer.logprobs = request.sampling.logprobs >= 0;
  answer.prompt_logprobs = request.prompt_logprobs >= 0;
  answer.token_ids = request.return_token_ids || context.text.tokenizer == nullptr;
  answer.stream = request.stream;
  answer.include_usage = request.include_usage;
  answer.continuous_usage = request.continuous_usage;
  answer.n = request.n;
  return answer;
}

// The text of the last tokens of a prompt: as many as <think> may take, and white space behind it.
std::string PromptEnd(const ServingContext& context, const std::vector<TokenId>& prompt) {
  constexpr std::size_t kTokens = 16;
  const std::span<const TokenId> ids(prompt);
  return context.text.tokenizer->Decode(ids.last(std::min(kTokens, ids.size())), false);
}

ApiResult<void> CheckText(const ServingContext& context, const SamplingRequest& request) {
  if (context.text.tokenizer == nullptr && !request.stop.empty())
    return BadField("stop", "stop: this model has no tokenizer; use stop_token_ids");
  return {};
}

}  // namespace

ApiResult<PreparedRequest> PrepareChat(const ServingContext& context, const HttpRequest& request) {
  API_ASSIGN_OR_RETURN(const Json body, Body(request));
  API_ASSIGN_OR_RETURN(ChatRequest chat, ParseChatRequest(body, context.limits));
  API_ASSIGN_OR_RETURN(std::string model, context.ModelName(chat.model));
  API_RETURN_IF_ERROR(CheckText(context, chat));
  API_ASSIGN_OR_RETURN(std::vector<TokenId> prompt,
                       EncodeChat(context.text, chat.chat, chat.add_special_tokens, std::time(nullptr)));
  API_ASSIGN_OR_RETURN(const int max_tokens, FitPrompt(context, chat, "messages", true, prompt));
  PreparedRequest out;
  out.chat = true;
  out.prompts.push_back(std::move(prompt));
  out.max_tokens = {max_tokens};
  out.answer = MakeAnswer(context, chat, "chatcmpl-" + request.id, std::move(model));
  const OutputFormat& format = context.options.output;
  out.output = {.open_reasoning = OpensReasoning(format, PromptEnd(context, out.prompts[0])),
                .tools = chat.chat.tools,
                .parallel = chat.parallel_tool_calls};
  if (format.NeedsSpecialTokens(!chat.chat.tools.is_null())) chat.skip_special_tokens = false;
  out.sampling = std::move(chat);
  return out;
}

ApiResult<PreparedRequest> PrepareCompletion(const ServingContext& context, const HttpRequest& request) {
  API_ASSIGN_OR_RETURN(const Json body, Body(request));
  API_ASSIGN_OR_RETURN(CompletionRequest completion, ParseCompletionRequest(body, context.limits));
  API_ASSIGN_OR_RETURN(std::string model, context.ModelName(completion.model));
  API_RETURN_IF_ERROR(CheckText(context, completion));
  PreparedRequest out;
  out.answer = MakeAnswer(context, completion, "cmpl-" + request.id, std::move(model));
  out.answer.echo = completion.echo;
  for (Prompt& prompt : completion.prompts) {
    std::vector<TokenId> ids;
    if (const auto* text = std::get_if<std::string>(&prompt)) {
      API_ASSIGN_OR_RETURN(ids, EncodeText(context.text, "prompt", *text, completion.add_special_tokens));
    } else {
      ids = std::get<std::vector<TokenId>>(std::move(prompt));
    }
    API_ASSIGN_OR_RETURN(const int max_tokens, FitPrompt(context, completion, "prompt", false, ids));
    if (completion.echo) {
      std::string text;
      if (std::holds_alternative<std::string>(prompt) && completion.truncate_prompt_tokens == 0)
        text = std::get<std::string>(prompt);
      else if (context.text.tokenizer != nullptr)
        text = context.text.tokenizer->Decode(ids, completion.skip_special_tokens);
      out.answer.echo_texts.push_back(std::move(text));
    }
    out.prompts.push_back(std::move(ids));
    out.max_tokens.push_back(max_tokens);
  }
  out.sampling = std::move(completion);
  return out;
}

}  // namespace elasticmoe::server
