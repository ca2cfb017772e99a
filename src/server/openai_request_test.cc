#include "server/openai_request.h"

#include <gtest/gtest.h>

namespace elasticmoe::server {
namespace {

const RequestLimits kLimits{.vocab = 100};

ApiResult<ChatRequest> Chat(std::string_view fields) {
  const std::string text = fmt::format(R"({{"messages":[{{"role":"user","content":"hi"}}]{}{}}})",
                                       fields.empty() ? "" : ",", fields);
  auto body = ParseBody(text);
  if (!body) return tl::unexpected<ApiError>(body.error());
  return ParseChatRequest(*body, kLimits);
}

ApiResult<CompletionRequest> Completion(std::string_view fields) {
  auto body = ParseBody(fmt::format("{{{}}}", fields));
  if (!body) return tl::unexpected<ApiError>(body.error());
  return ParseCompletionRequest(*body, kLimits);
}

TEST(ChatRequest, ReadsEveryField) {
  auto chat = Chat(R"("model":"m","temperature":0.5,"top_p":0.9,"top_k":40,"min_p":0.1,"presence_penalty":-1,
      "frequency_penalty":1.5,"repetition_penalty":1.1,"seed":-3,"n":2,"max_completion_tokens":7,"max_tokens":9,
      "min_tokens":2,"ignore_eos":true,"stop":["a","b"],"stop_token_ids":[1,2.0],"include_stop_str_in_output":true,
      "logit_bias":{"5":-100,"7":2.5},"logprobs":true,"top_logprobs":3,"stream":true,
      "stream_options":{"include_usage":true,"continuous_usage_stats":true},"skip_special_tokens":false,
      "priority":-4,"return_token_ids":true,"return_tokens_as_token_ids":true,"user":"u","unknown_field":{"x":1},
      "chat_template_kwargs":{"enable_thinking":false},"reasoning_effort":"low","add_generation_prompt":false)");
  ASSERT_TRUE(chat) << chat.error().message;
  const core::SamplingParams& s = chat->sampling;
  EXPECT_EQ(chat->model, "m");
  EXPECT_FLOAT_EQ(s.temperature, 0.5F);
  EXPECT_FLOAT_EQ(s.top_p, 0.9F);
  EXPECT_EQ(s.top_k, 40);
  EXPECT_FLOAT_EQ(s.min_p, 0.1F);
  EXPECT_FLOAT_EQ(s.presence_penalty, -1.0F);
  EXPECT_FLOAT_EQ(s.frequency_penalty, 1.5F);
  EXPECT_FLOAT_EQ(s.repetition_penalty, 1.1F);
  EXPECT_EQ(s.seed, static_cast<std::uint64_t>(-3));
  EXPECT_TRUE(chat->seed_given);
  EXPECT_EQ(s.logprobs, 3);
  EXPECT_EQ(s.logit_bias, (std::vector<std::pair<TokenId, float>>{{5, -100.0F}, {7, 2.5F}}));
  EXPECT_EQ(chat->n, 2);
  EXPECT_EQ(chat->max_tokens, 7);
  EXPECT_EQ(chat->min_tokens, 2);
  EXPECT_TRUE(chat->ignore_eos && chat->stream && chat->include_usage && chat->continuous_usage);
  EXPECT_TRUE(chat->include_stop_str_in_output && chat->return_token_ids && chat->return_tokens_as_token_ids);
  EXPECT_FALSE(chat->skip_special_tokens);
  EXPECT_FALSE(chat->add_special_tokens);
  EXPECT_EQ(chat->stop, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(chat->stop_token_ids, (std::vector<TokenId>{1, 2}));
  EXPECT_EQ(chat->priority, -4);
  EXPECT_EQ(DumpJson(chat->chat.variables), R"({"enable_thinking":false,"reasoning_effort":"low"})");
  EXPECT_FALSE(chat->chat.add_generation_prompt);
}

TEST(ChatRequest, NullMeansNotGiven) {
  auto chat = Chat(R"("temperature":null,"n":null,"stop":null,"max_tokens":null,"logprobs":null,"tools":null,
      "tool_choice":null,"stream":null,"stream_options":null,"seed":null,"logit_bias":null,"response_format":null)");
  ASSERT_TRUE(chat) << chat.error().message;
  EXPECT_FALSE(chat->max_tokens);
  EXPECT_FALSE(chat->seed_given);
  EXPECT_EQ(chat->sampling.logprobs, -1);
}

TEST(ChatRequest, TakesDefaultsOfTheModel) {
  auto config = GenerationDefaults::FromJson(
      ParseJson(R"({"temperature":0.7,"top_k":40,"top_p":0.95,"eos_token_id":[1]})").value());
  ASSERT_TRUE(config);
  const RequestLimits limits{.vocab = 100, .defaults = *config};
  auto body = ParseBody(R"({"messages":[{"role":"user","content":"x"}],"top_k":5})");
  auto chat = ParseChatRequest(*body, limits);
  ASSERT_TRUE(chat);
  EXPECT_FLOAT_EQ(chat->sampling.temperature, 0.7F);
  EXPECT_EQ(chat->sampling.top_k, 5);
  EXPECT_FLOAT_EQ(chat->sampling.top_p, 0.95F);
  EXPECT_FALSE(GenerationDefaults::FromJson(ParseJson(R"({"top_p":"x"})").value()));
}

TEST(ChatRequest, JoinsTextPartsAndParsesToolArguments) {
  auto body = ParseBody(R"({"messages":[
      {"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},
      {"role":"assistant","content":null,"tool_calls":[{"id":"1","type":"function","function":{"name":"f","arguments":"{\"x\":1}"}}]},
      {"role":"tool","tool_call_id":"1","content":"42"}]})");
  auto chat = ParseChatRequest(*body, kLimits);
  ASSERT_TRUE(chat) << chat.error().message;
  EXPECT_EQ(chat->chat.messages[0]["content"], "a\nb");
  EXPECT_EQ(chat->chat.messages[1]["content"], "");
  EXPECT_EQ(chat->chat.messages[1]["tool_calls"][0]["function"]["arguments"]["x"], 1);
}

TEST(ChatRequest, ToolChoiceNoneHidesTools) {
  const std::string tools = R"("tools":[{"type":"function","function":{"name":"f"}}])";
  EXPECT_TRUE(Chat(tools)->chat.tools.is_array());
  EXPECT_TRUE(Chat(tools + R"(,"tool_choice":"auto")")->chat.tools.is_array());
  EXPECT_TRUE(Chat(tools + R"(,"tool_choice":"none")")->chat.tools.is_null());
}

TEST(CompletionRequest, ReadsEveryKindOfPrompt) {
  EXPECT_EQ(std::get<std::string>(Completion(R"("prompt":"a")")->prompts.at(0)), "a");
  EXPECT_EQ(Completion(R"("prompt":["a","b"])")->prompts.size(), 2U);
  EXPECT_EQ(std::get<std::vector<TokenId>>(Completion(R"("prompt":[1,2])")->prompts.at(0)),
            (std::vector<TokenId>{1, 2}));
  EXPECT_EQ(std::get<std::vector<TokenId>>(Completion(R"("prompt":[[1],[2,3]])")->prompts.at(1)),
            (std::vector<TokenId>{2, 3}));
  auto echo =
      Completion(R"("prompt":["a","b"],"echo":true,"logprobs":1,"max_tokens":0,"suffix":null,"best_of":1)");
  ASSERT_TRUE(echo) << echo.error().message;
  EXPECT_TRUE(echo->echo);
  EXPECT_EQ(echo->max_tokens, 0);
  EXPECT_EQ(echo->sampling.logprobs, 1);
}

struct Bad {
  const char* fields;
  const char* param;
  const char* says;
};

class BadChat : public testing::TestWithParam<Bad> {};
TEST_P(BadChat, IsRefusedByName) {
  auto chat = Chat(GetParam().fields);
  ASSERT_FALSE(chat) << GetParam().fields;
  EXPECT_EQ(chat.error().status, 400);
  EXPECT_EQ(chat.error().param, GetParam().param);
  EXPECT_NE(chat.error().message.find(GetParam().says), std::string::npos) << chat.error().message;
}
INSTANTIATE_TEST_SUITE_P(
    Fields, BadChat,
    testing::Values(
        Bad{R"("temperature":-0.1)", "temperature", "between 0 and 100"},
        Bad{R"("temperature":"hot")", "temperature", "a string"},
        Bad{R"("temperature":1e999)", "", "not JSON"}, Bad{R"("temperature":NaN)", "", "not JSON"},
        Bad{R"("temperature":1e300)", "temperature", "1e+300"}, Bad{R"("top_p":0)", "top_p", "larger than 0"},
        Bad{R"("top_p":1.5)", "top_p", "between 0 and 1"}, Bad{R"("top_k":-2)", "top_k", "between -1"},
        Bad{R"("top_k":1.5)", "top_k", "integer"}, Bad{R"("min_p":2)", "min_p", "between"},
        Bad{R"("presence_penalty":3)", "presence_penalty", "-2 and 2"},
        Bad{R"("repetition_penalty":0)", "repetition_penalty", "0.01"}, Bad{R"("n":0)", "n", "between 1"},
        Bad{R"("n":99999999999999999999)", "n", "found"}, Bad{R"("n":true)", "n", "a boolean"},
        Bad{R"("max_tokens":0)", "max_tokens", "between 1"},
        Bad{R"("max_completion_tokens":-5)", "max_completion_tokens", "-5"},
        Bad{R"("max_tokens":18446744073709551615)", "max_tokens", "found 18446744073709551615"},
        Bad{R"("min_tokens":-1)", "min_tokens", "between 0"}, Bad{R"("seed":1.5)", "seed", "integer"},
        Bad{R"("stop":[""])", "stop", "empty string"}, Bad{R"("stop":[1])", "stop", "a number"},
        Bad{R"("stop":{})", "stop", "an object"}, Bad{R"("stop_token_ids":[100])", "stop_token_ids", "0..99"},
        Bad{R"("stop_token_ids":[-1])", "stop_token_ids", "-1"},
        Bad{R"("logit_bias":{"x":1})", "logit_bias", "no token id"},
        Bad{R"("logit_bias":{"100":1})", "logit_bias", "0..99"},
        Bad{R"("logit_bias":{"1":101})", "logit_bias", "-100 and 100"},
        Bad{R"("logit_bias":[1])", "logit_bias", "an array"},
        Bad{R"("top_logprobs":2)", "top_logprobs", "logprobs=true"},
        Bad{R"("logprobs":true,"top_logprobs":21)", "top_logprobs", "20"},
        Bad{R"("logprobs":2)", "logprobs", "true or false"},
        Bad{R"("prompt_logprobs":1,"stream":true)", "prompt_logprobs", "stream"},
        Bad{R"("stream_options":{"include_usage":true})", "stream_options", "stream=true"},
        Bad{R"("stream":true,"stream_options":{"include_usage":1})", "stream_options", "include_usage"},
        Bad{R"("tools":[])", "tools", "not be empty"},
        Bad{R"("tools":[{"type":"function"}])", "tools", "name"},
        Bad{R"("tool_choice":"auto")", "tool_choice", "needs tools"},
        Bad{R"("tools":[{"function":{"name":"f"}}],"tool_choice":"required")", "tool_choice",
            "guided decoding"},
        Bad{R"("tools":[{"function":{"name":"f"}}],"tool_choice":{"type":"function"})", "tool_choice",
            "guided decoding"},
        Bad{R"("tool_choice":"maybe")", "tool_choice", "maybe"},
        Bad{R"("functions":[{"name":"f"}])", "functions", "use tools"},
        Bad{R"("response_format":{"type":"json_object"})", "response_format", "not supported"},
        Bad{R"("response_format":{"type":"json_schema"})", "response_format", "json_schema is missing"},
        Bad{R"("response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{}}})",
            "response_format", "not supported"},
        Bad{R"("guided_json":{"a":1})", "guided_json", "guided decoding"},
        Bad{R"("structured_outputs":{"regex":"a"})", "structured_outputs", "guided"},
        Bad{R"("bad_words":["x"])", "bad_words", "logit_bias"},
        Bad{R"("chat_template":"x")", "chat_template", "not accepted"},
        Bad{R"("continue_final_message":true,"add_generation_prompt":true)", "continue_final_message",
            "add_generation_prompt"},
        Bad{R"("chat_template_kwargs":[1])", "chat_template_kwargs", "an object"},
        Bad{R"("model":5)", "model", "a string"}, Bad{R"("messages":[])", "messages", "not be empty"}));

TEST(ChatRequest, NamesTheMessageAtFault) {
  for (const char* messages :
       {R"(5)", R"([5])", R"([{}])", R"([{"role":1}])", R"([{"role":"user","content":5}])",
        R"([{"role":"user","content":[{"type":"image_url","image_url":{}}]}])",
        R"([{"role":"user","content":[{"type":"text"}]}])", R"([{"role":"assistant","tool_calls":[{}]}])",
        R"([{"role":"assistant","tool_calls":5}])",
        R"([{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"{"}}]}])"}) {
    auto body = ParseBody(fmt::format(R"({{"messages":{}}})", messages));
    ASSERT_TRUE(body) << messages;
    auto chat = ParseChatRequest(*body, kLimits);
    ASSERT_FALSE(chat) << messages;
    EXPECT_EQ(chat.error().param, "messages");
  }
}

class BadCompletion : public testing::TestWithParam<Bad> {};
TEST_P(BadCompletion, IsRefusedByName) {
  auto completion = Completion(GetParam().fields);
  ASSERT_FALSE(completion) << GetParam().fields;
  EXPECT_EQ(completion.error().param, GetParam().param);
  EXPECT_NE(completion.error().message.find(GetParam().says), std::string::npos)
      << completion.error().message;
}
INSTANTIATE_TEST_SUITE_P(Fields, BadCompletion,
                         testing::Values(Bad{"", "prompt", "is missing"},
                                         Bad{R"("prompt":[])", "prompt", "is empty"},
                                         Bad{R"("prompt":5)", "prompt", "a number"},
                                         Bad{R"("prompt":[1,100])", "prompt",
                                             "prompt[1]: token id 100 is outside of the vocabulary (0..99)"},
                                         Bad{R"("prompt":[1,-1])", "prompt", "-1"},
                                         Bad{R"("prompt":[1,1.5])", "prompt", "1.5"},
                                         Bad{R"("prompt":[1,"a"])", "prompt", "prompt[1]"},
                                         Bad{R"("prompt":["a",[1]])", "prompt", "only strings"},
                                         Bad{R"("prompt":[[1],["a"]])", "prompt", "prompt[1][0]"},
                                         Bad{R"("prompt":[1,1e30])", "prompt", "token id"},
                                         Bad{R"("prompt":[null])", "prompt", "null"},
                                         Bad{R"("prompt":"a","suffix":"b")", "suffix", "insertion"},
                                         Bad{R"("prompt":"a","best_of":2)", "best_of", "must equal n"},
                                         Bad{R"("prompt":"a","logprobs":-1)", "logprobs", "between 0"},
                                         Bad{R"("prompt":"a","logprobs":true)", "logprobs", "a boolean"},
                                         Bad{R"("prompt":"a","max_tokens":-1)", "max_tokens", "between 0"},
                                         Bad{R"("prompt":["a","b","c"],"n":100)", "n", "too many choices"}));

TEST(Body, SaysWhatIsWrong) {
  EXPECT_NE(ParseBody("").error().message.find("empty"), std::string::npos);
  EXPECT_NE(ParseBody("{").error().message.find("not JSON"), std::string::npos);
  EXPECT_NE(ParseBody("[1]").error().message.find("an array"), std::string::npos);
  EXPECT_NE(ParseBody("{\"a\":\"\xff\"}").error().message.find("UTF-8"), std::string::npos);
  EXPECT_NE(ParseBody(std::string(100000, '[')).error().message.find("nested deeper"), std::string::npos);
}

TEST(TokenizeRequest, TakesAPromptOrMessages) {
  EXPECT_TRUE(
      ParseTokenizeRequest(*ParseBody(R"({"prompt":"x","return_token_strs":true})"))->return_token_strs);
  EXPECT_FALSE(ParseTokenizeRequest(*ParseBody(R"({"messages":[{"role":"user","content":"x"}]})"))
                   ->add_special_tokens);
  EXPECT_EQ(ParseTokenizeRequest(*ParseBody(R"({})")).error().param, "prompt");
  EXPECT_EQ(ParseDetokenizeRequest(*ParseBody(R"({"tokens":[1,2]})"), kLimits)->tokens.size(), 2U);
  EXPECT_EQ(ParseDetokenizeRequest(*ParseBody(R"({"tokens":"x"})"), kLimits).error().param, "tokens");
  EXPECT_EQ(ParseDetokenizeRequest(*ParseBody(R"({})"), kLimits).error().param, "tokens");
}

}  // namespace
}  // namespace elasticmoe::server
