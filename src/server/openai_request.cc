#include "server/openai_request.h"

#include <charconv>
#include <cmath>
#include <limits>

#include "server/json_fields.h"

namespace elasticmoe::server {
namespace {

constexpr std::int64_t kMaxInt = std::numeric_limits<int>::max();
constexpr std::size_t kMaxStopStrings = 64;
constexpr std::size_t kMaxStopBytes = 1024;  // of one: bounds what a stream holds back
constexpr std::size_t kMaxStopIds = 1024;
constexpr std::size_t kMaxBiases = 1024;  // what a table slot holds (runtime/exchange.h)
constexpr int kMaxN = 128;                // as OpenAI
// Keys of an object are searched one after another.
constexpr std::size_t kMaxFields = 1024;
constexpr std::size_t kMaxTemplateVariables = 256;

bool IsEmpty(const Json& value) {
  return value.is_null() || (value.is_structured() && value.empty()) ||
         (value.is_string() && value.get_ref<const std::string&>().empty()) ||
         (value.is_boolean() && !value.get<bool>());
}

// Fields that would change the answer and that this server does not do. (400, not 501: clients repeat a 5xx.)
void RefuseUnsupported(JsonFields& fields) {
  static constexpr std::string_view kGuided = "guided decoding is not supported";
  static constexpr std::pair<std::string_view, std::string_view> kFields[] = {
      {"structured_outputs", kGuided},
      {"guided_json", kGuided},
      {"guided_regex", kGuided},
      {"guided_choice", kGuided},
      {"guided_grammar", kGuided},
      {"grammar", kGuided},
      {"json_schema", kGuided},
      {"allowed_token_ids", "not supported; use logit_bias"},
      {"bad_words", "not supported; use logit_bias"},
      {"use_beam_search", "beam search is not supported"},
      {"prompt_embeds", "embeddings as a prompt are not supported; send text or token ids"},
      {"kv_transfer_params", "not supported"},
      {"cache_salt", "salted prefix caches are not supported"},
      {"audio", "only text is supported"},
  };
  for (const auto& [name, why] : kFields)
    if (const Json* value = fields.Find(name); value != nullptr && !IsEmpty(*value))
      fields.Refuse(name, "{}", why);

  if (const Json* format = fields.Find("response_format")) {
    const Json* type = nullptr;
    if (format->is_object())
      if (auto it = format->find("type"); it != format->end() && it->is_string()) type = &*it;
    if (type == nullptr)
      fields.Refuse("response_format", "must be an object with a string 'type'");
    else if (*type == "json_schema" && !format->contains("json_schema"))
      fields.Refuse("response_format", "json_schema is missing");
    else if (*type != "text")
      fields.Refuse("response_format", "type {} is not supported ({}); use \"text\"", DumpJson(*type),
                    kGuided);
  }
}

void ReadStop(JsonFields& fields, SamplingRequest& out) {
  const Json* stop = fields.Find("stop");
  if (stop == nullptr) return;
  if (stop->is_string()) {
    out.stop.push_back(stop->get<std::string>());
  } else if (stop->is_array()) {
    for (const Json& entry : *stop) {
      if (!entry.is_string()) return fields.Refuse("stop", "must hold strings, found {}", TypeName(entry));
      if (out.stop.size() == kMaxStopStrings)
        return fields.Refuse("stop", "has too many strings (limit={})", kMaxStopStrings);
      out.stop.push_back(entry.get<std::string>());
    }
  } else {
    return fields.Refuse("stop", "must be a string or an array of strings, found {}", TypeName(*stop));
  }
  for (const std::string& text : out.stop) {
    if (text.empty()) return fields.Refuse("stop", "must not hold an empty string");
    if (text.size() > kMaxStopBytes)
      return fields.Refuse("stop", "has a string of {} bytes (limit={})", text.size(), kMaxStopBytes);
  }
}

void ReadLogitBias(JsonFields& fields, int vocab, core::SamplingParams& sampling) {
  const Json* bias = fields.Find("logit_bias");
  if (bias == nullptr) return;
  if (!bias->is_object()) return fields.Refuse("logit_bias", "must be an object, found {}", TypeName(*bias));
  if (bias->size() > kMaxBiases)
    return fields.Refuse("logit_bias", "has {} entries (limit={})", bias->size(), kMaxBiases);
  for (const auto& [key, value] : bias->items()) {
    TokenId id = -1;
    const auto [end, ec] = std::from_chars(key.data(), key.data() + key.size(), id);
    if (ec != std::errc() || end != key.data() + key.size() || id < 0 || id >= vocab)
      return fields.Refuse("logit_bias", "key {} is no token id of the vocabulary (0..{})", DumpJson(key),
                           vocab - 1);
    if (!value.is_number()) return fields.Refuse("logit_bias", "value of {} must be a number", id);
    const double number = value.get<double>();
    if (!std::isfinite(number) || std::abs(number) > 100.0)
      return fields.Refuse("logit_bias", "value of {} must be between -100 and 100, found {}", id, number);
    sampling.logit_bias.emplace_back(id, static_cast<float>(number));
  }
}

void ReadStreamOptions(JsonFields& fields, SamplingRequest& out) {
  const Json* options = fields.Find("stream_options");
  if (options == nullptr) return;
  if (!out.stream) return fields.Refuse("stream_options", "can only be used with stream=true");
  if (!options->is_object())
    return fields.Refuse("stream_options", "must be an object, found {}", TypeName(*options));
  JsonFields inner(*options, "stream_options.");
  inner.Read("include_usage", out.include_usage);
  inner.Read("continuous_usage_stats", out.continuous_usage);
  if (auto status = inner.Status(); !status) fields.Refuse("stream_options", "{}", status.error().message);
}

void ReadSampling(JsonFields& fields, const RequestLimits& limits, SamplingRequest& out) {
  if (auto model = fields.String("model")) out.model = *model;
  core::SamplingParams& s = out.sampling;
  const GenerationDefaults& defaults = limits.defaults;
  s.temperature = defaults.temperature;
  s.top_p = defaults.top_p;
  s.top_k = defaults.top_k;
  s.min_p = defaults.min_p;
  s.repetition_penalty = defaults.repetition_penalty;
  fields.Read("temperature", s.temperature, 0.0, 100.0);
  fields.Read("top_p", s.top_p, 0.0, 1.0);
  if (s.top_p <= 0.0F) fields.Refuse("top_p", "must be larger than 0");
  fields.Read("top_k", s.top_k, -1, kMaxInt);
  if (s.top_k < 0) s.top_k = 0;  // vLLM's -1 = off
  fields.Read("min_p", s.min_p, 0.0, 1.0);
  fields.Read("presence_penalty", s.presence_penalty, -2.0, 2.0);
  fields.Read("frequency_penalty", s.frequency_penalty, -2.0, 2.0);
  fields.Read("repeat_penalty", s.repetition_penalty, 0.01, 100.0);  // llama.cpp's name
  fields.Read("repetition_penalty", s.repetition_penalty, 0.01, 100.0);
  if (auto seed = fields.Integer("seed", INT64_MIN, INT64_MAX)) {
    s.seed = static_cast<std::uint64_t>(*seed);
    out.seed_given = true;
  }
  ReadLogitBias(fields, limits.vocab, s);
  fields.Read("n", out.n, 1, std::min(kMaxN, limits.max_choices));
  fields.Read("min_tokens", out.min_tokens, 0, kMaxInt);
  fields.Read("ignore_eos", out.ignore_eos);
  ReadStop(fields, out);
  if (auto ids = fields.TokenIds("stop_token_ids", limits.vocab, kMaxStopIds))
    out.stop_token_ids = *std::move(ids);
  fields.Read("include_stop_str_in_output", out.include_stop_str_in_output);
  fields.Read("skip_special_tokens", out.skip_special_tokens);
  fields.Read("add_special_tokens", out.add_special_tokens);
  fields.Read("prompt_logprobs", out.prompt_logprobs, 0, core::kMaxTopLogprobs);
  fields.Read("truncate_prompt_tokens", out.truncate_prompt_tokens, -1, kMaxInt);
  fields.Read("priority", out.priority, std::numeric_limits<int>::min(), kMaxInt);
  fields.Read("stream", out.stream);
  ReadStreamOptions(fields, out);
  if (out.stream && out.prompt_logprobs >= 0)
    fields.Refuse("prompt_logprobs", "cannot be used with stream=true");
  fields.Read("return_token_ids", out.return_token_ids);
  fields.Read("return_tokens_as_token_ids", out.return_tokens_as_token_ids);
  RefuseUnsupported(fields);
}

// Content parts of text become one string, as vLLM joins them.
void NormalizeContent(JsonFields& fields, std::size_t index, Json& message) {
  auto it = message.find("content");
  if (it == message.end() || it->is_null()) {
    message["content"] = "";  // assistant messages with tool calls; templates fail on null
    return;
  }
  if (it->is_string()) return;
  if (!it->is_array())
    return fields.Refuse("messages", "messages[{}].content must be a string or an array of parts, found {}",
                         index, TypeName(*it));
  std::string text;
  bool first = true;
  for (const Json& part : *it) {
    if (part.is_string()) {
      text += (first ? "" : "\n") + part.get<std::string>();
    } else {
      std::string type = part.is_object() && part.contains("type") && part["type"].is_string()
                             ? part["type"].get<std::string>()
                             : "";
      if (type == "input_text") type = "text";
      if (type != "text" && type != "refusal")
        return fields.Refuse("messages",
                             "messages[{}].content has a part of type \"{}\"; only text is supported", index,
                             type);
      auto value = part.find(type);
      if (value == part.end()) value = part.find("text");
      if (value == part.end() || !value->is_string())
        return fields.Refuse("messages", "messages[{}].content has a text part without text", index);
      text += (first ? "" : "\n") + value->get<std::string>();
    }
    first = false;
  }
  *it = std::move(text);
}

// `arguments` of tool calls arrive as JSON text; templates want the object.
void NormalizeToolCalls(JsonFields& fields, std::size_t index, Json& message) {
  auto it = message.find("tool_calls");
  if (it == message.end()) return;
  if (it->is_null() || (it->is_array() && it->empty())) {
    message.erase("tool_calls");
    return;
  }
  if (!it->is_array())
    return fields.Refuse("messages", "messages[{}].tool_calls must be an array, found {}", index,
                         TypeName(*it));
  for (Json& call : *it) {
    if (!call.is_object() || !call.contains("function") || !call["function"].is_object() ||
        !call["function"].contains("name") || !call["function"]["name"].is_string())
      return fields.Refuse("messages", "messages[{}].tool_calls: every call needs a function with a name",
                           index);
    Json& function = call["function"];
    auto arguments = function.find("arguments");
    if (arguments == function.end() || arguments->is_null() || *arguments == "") {
      function["arguments"] = Json::object();
    } else if (arguments->is_string()) {
      auto parsed = ParseJson(arguments->get_ref<const std::string&>());
      if (!parsed || !parsed->is_object())
        return fields.Refuse("messages", "messages[{}].tool_calls: arguments of {} are not a JSON object",
                             index, DumpJson(function["name"]));
      *arguments = *std::move(parsed);
    }
  }
}

void ReadMessages(JsonFields& fields, Json& out) {
  const Json* messages = fields.Find("messages");
  if (messages == nullptr) return fields.Refuse("messages", "is missing");
  if (!messages->is_array())
    return fields.Refuse("messages", "must be an array, found {}", TypeName(*messages));
  if (messages->empty()) return fields.Refuse("messages", "must not be empty");
  out = *messages;
  for (std::size_t i = 0; i < out.size() && fields.Ok(); ++i) {
    Json& message = out[i];
    if (!message.is_object())
      return fields.Refuse("messages", "messages[{}] must be an object, found {}", i, TypeName(message));
    if (!message.contains("role") || !message["role"].is_string())
      return fields.Refuse("messages", "messages[{}].role must be a string", i);
    NormalizeContent(fields, i, message);
    if (fields.Ok()) NormalizeToolCalls(fields, i, message);
  }
}

void ReadTools(JsonFields& fields, Json& out) {
  if (const Json* old = fields.Find("functions"); old != nullptr && !IsEmpty(*old))
    fields.Refuse("functions", "is out of date; use tools");
  const Json* tools = fields.Find("tools");
  if (tools != nullptr) {
    if (!tools->is_array()) return fields.Refuse("tools", "must be an array, found {}", TypeName(*tools));
    if (tools->empty()) return fields.Refuse("tools", "must not be empty; leave it out instead");
    for (const Json& tool : *tools) {
      if (!tool.is_object() || !tool.contains("function") || !tool["function"].is_object() ||
          !tool["function"].contains("name") || !tool["function"]["name"].is_string())
        return fields.Refuse("tools", "every tool must be an object with a function that has a name");
    }
    out = *tools;
  }
  const Json* choice = fields.Find("tool_choice");
  if (choice == nullptr) return;
  if (*choice == "none") {
    out = nullptr;
  } else if (*choice == "auto") {
    if (tools == nullptr) fields.Refuse("tool_choice", "\"auto\" needs tools");
  } else if (*choice == "required" || choice->is_object()) {
    fields.Refuse("tool_choice",
                  "a forced tool call needs guided decoding, which is not supported; use \"auto\"");
  } else {
    fields.Refuse("tool_choice", "must be \"none\" or \"auto\", found {}", DumpJson(*choice).substr(0, 40));
  }
}

void ReadChatPrompt(JsonFields& fields, ChatPrompt& out) {
  ReadMessages(fields, out.messages);
  ReadTools(fields, out.tools);
  if (const Json* documents = fields.Find("documents")) {
    if (documents->is_array())
      out.documents = *documents;
    else
      fields.Refuse("documents", "must be an array, found {}", TypeName(*documents));
  }
  if (const Json* variables = fields.Find("chat_template_kwargs")) {
    if (variables->size() > kMaxTemplateVariables)
      fields.Refuse("chat_template_kwargs", "has {} entries (limit={})", variables->size(),
                    kMaxTemplateVariables);
    else if (variables->is_object())
      out.variables = *variables;
    else
      fields.Refuse("chat_template_kwargs", "must be an object, found {}", TypeName(*variables));
  }
  if (auto effort = fields.String("reasoning_effort")) out.variables["reasoning_effort"] = *effort;
  if (fields.Find("chat_template") != nullptr)
    fields.Refuse("chat_template", "templates of requests are not accepted; the model's own is used");
  const bool generation_given = fields.Find("add_generation_prompt") != nullptr;
  fields.Read("add_generation_prompt", out.add_generation_prompt);
  fields.Read("continue_final_message", out.continue_final_message);
  if (out.continue_final_message) {
    if (generation_given && out.add_generation_prompt)
      fields.Refuse("continue_final_message", "cannot be used with add_generation_prompt=true");
    out.add_generation_prompt = false;
  }
}

void ReadPrompts(JsonFields& fields, const RequestLimits& limits, CompletionRequest& out) {
  const Json* prompt = fields.Find("prompt");
  if (prompt == nullptr) return fields.Refuse("prompt", "is missing");
  const auto ids = [&](const Json& array, const std::string& name) {
    auto read = ReadTokenIds(array, name, limits.vocab);
    if (read)
      out.prompts.emplace_back(*std::move(read));
    else
      fields.Refuse("prompt", "{}", read.error().message);
  };
  if (prompt->is_string()) {
    out.prompts.emplace_back(prompt->get<std::string>());
  } else if (!prompt->is_array()) {
    fields.Refuse("prompt", "must be a string, strings or token ids, found {}", TypeName(*prompt));
  } else if (prompt->empty()) {
    fields.Refuse("prompt", "is empty");
  } else if (prompt->front().is_number()) {
    ids(*prompt, "prompt");
  } else {
    const auto limit = static_cast<std::size_t>(limits.max_choices);
    if (prompt->size() > limit)
      return fields.Refuse("prompt", "has {} prompts (limit={})", prompt->size(), limit);
    const bool strings = prompt->front().is_string();
    for (std::size_t i = 0; i < prompt->size() && fields.Ok(); ++i) {
      const Json& entry = (*prompt)[i];
      if (strings && entry.is_string())
        out.prompts.emplace_back(entry.get<std::string>());
      else if (!strings && entry.is_array())
        ids(entry, fmt::format("prompt[{}]", i));
      else
        fields.Refuse("prompt", "must hold only strings or only token ids; prompt[{}] is {}", i,
                      TypeName(entry));
    }
  }
  if (out.prompts.size() * static_cast<std::size_t>(out.n) > static_cast<std::size_t>(limits.max_choices))
    fields.Refuse("n", "{} prompts x n={} are too many choices (limit={})", out.prompts.size(), out.n,
                  limits.max_choices);
}

}  // namespace

Expected<GenerationDefaults> GenerationDefaults::FromJson(const Json& config) {
  GenerationDefaults defaults;
  if (!config.is_object())
    return Fail(ErrorCode::kInvalidArgument, "reading generation_config.json: must be an object, found {}",
                TypeName(config));
  JsonFields fields(config);
  fields.Read("temperature", defaults.temperature, 0.0, 100.0);
  fields.Read("top_p", defaults.top_p, 1e-6, 1.0);
  fields.Read("top_k", defaults.top_k, -1, kMaxInt);
  if (defaults.top_k < 0) defaults.top_k = 0;
  fields.Read("min_p", defaults.min_p, 0.0, 1.0);
  fields.Read("repetition_penalty", defaults.repetition_penalty, 0.01, 100.0);
  if (auto status = fields.Status(); !status)
    return Fail(ErrorCode::kInvalidArgument, "reading generation_config.json: {}", status.error().message);
  return defaults;
}

ApiResult<Json> ParseBody(std::string_view body) {
  if (body.find_first_not_of(" \t\r\n") == body.npos)
    return BadField("", "the body is empty; a JSON object is needed");
  auto parsed = ParseJson(body);
  if (!parsed) return BadField("", "the body is not JSON: {}", parsed.error().message);
  if (!parsed->is_object())
    return BadField("", "the body must be a JSON object, found {}", TypeName(*parsed));
  if (parsed->size() > kMaxFields)
    return BadField("", "the body has {} fields (limit={})", parsed->size(), kMaxFields);
  return *std::move(parsed);
}

ApiResult<ChatRequest> ParseChatRequest(const Json& body, const RequestLimits& limits) {
  JsonFields fields(body);
  ChatRequest out;
  out.add_special_tokens = false;  // the template writes them
  ReadChatPrompt(fields, out.chat);
  ReadSampling(fields, limits, out);
  int max_tokens = 0;
  fields.Read("max_tokens", max_tokens, 1, kMaxInt);
  fields.Read("max_completion_tokens", max_tokens, 1, kMaxInt);
  if (max_tokens > 0) out.max_tokens = max_tokens;
  fields.Read("parallel_tool_calls", out.parallel_tool_calls);

  bool logprobs = false;
  fields.Read("logprobs", logprobs);
  const auto top = fields.Integer("top_logprobs", 0, core::kMaxTopLogprobs);
  if (top.value_or(0) > 0 && !logprobs) fields.Refuse("top_logprobs", "needs logprobs=true");
  if (logprobs) out.sampling.logprobs = static_cast<int>(top.value_or(0));
  bool echo = false;
  fields.Read("echo", echo);
  if (echo) fields.Refuse("echo", "is not supported for chats");
  API_RETURN_IF_ERROR(fields.Status());
  return out;
}

ApiResult<CompletionRequest> ParseCompletionRequest(const Json& body, const RequestLimits& limits) {
  JsonFields fields(body);
  CompletionRequest out;
  ReadSampling(fields, limits, out);
  ReadPrompts(fields, limits, out);
  if (auto max_tokens = fields.Integer("max_tokens", 0, kMaxInt))
    out.max_tokens = static_cast<int>(*max_tokens);
  fields.Read("logprobs", out.sampling.logprobs, 0, core::kMaxTopLogprobs);
  fields.Read("echo", out.echo);
  if (auto suffix = fields.String("suffix"); suffix && !suffix->empty())
    fields.Refuse("suffix", "insertion is not supported");
  if (auto best_of = fields.Integer("best_of", 0, kMaxInt); best_of && *best_of != 0 && *best_of != out.n)
    fields.Refuse("best_of", "must equal n (n={}, best_of={}): choices are not ranked", out.n, *best_of);
  API_RETURN_IF_ERROR(fields.Status());
  return out;
}

ApiResult<TokenizeRequest> ParseTokenizeRequest(const Json& body) {
  JsonFields fields(body);
  TokenizeRequest out;
  if (auto model = fields.String("model")) out.model = *model;
  if (fields.Find("messages") != nullptr) {
    if (fields.Find("prompt") != nullptr) fields.Refuse("prompt", "cannot be used with messages");
    ChatPrompt chat;
    ReadChatPrompt(fields, chat);
    out.input = std::move(chat);
    out.add_special_tokens = false;
  } else if (auto prompt = fields.String("prompt")) {
    out.input = *std::move(prompt);
  } else {
    fields.Refuse("prompt", "is missing (or send messages)");
  }
  fields.Read("add_special_tokens", out.add_special_tokens);
  fields.Read("return_token_strs", out.return_token_strs);
  API_RETURN_IF_ERROR(fields.Status());
  return out;
}

ApiResult<DetokenizeRequest> ParseDetokenizeRequest(const Json& body, const RequestLimits& limits) {
  JsonFields fields(body);
  DetokenizeRequest out;
  if (auto model = fields.String("model")) out.model = *model;
  if (fields.Find("tokens") == nullptr) fields.Refuse("tokens", "is missing");
  if (auto ids = fields.TokenIds("tokens", limits.vocab, std::size_t{1} << 24)) out.tokens = *std::move(ids);
  API_RETURN_IF_ERROR(fields.Status());
  return out;
}

}  // namespace elasticmoe::server
