#include "server/api_server.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/file.h"
#include "server/testing/scripted_api.h"
#include "server/testing/test_client.h"

namespace elasticmoe::server {
namespace {

using testing::HasSubstr;

TestResponse Post(ScriptedApi& api, std::string_view path, std::string_view body,
                  std::string_view headers = "") {
  return TestClient(api.server->Port()).Call("POST", path, body, headers);
}
TestResponse Get(ScriptedApi& api, std::string_view path, std::string_view headers = "") {
  return TestClient(api.server->Port()).Call("GET", path, "", headers);
}
TestResponse Chat(ScriptedApi& api, std::string_view fields = "") {
  return Post(api, "/v1/chat/completions",
              fmt::format(R"({{"messages":[{{"role":"user","content":"hi"}}]{}{}}})",
                          fields.empty() ? "" : ",", fields));
}
TestResponse Complete(ScriptedApi& api, std::string_view fields) {
  return Post(api, "/v1/completions", fmt::format("{{{}}}", fields));
}
// The parsed data of a stream; its last element is the string "[DONE]".
std::vector<Json> Chunks(const TestResponse& response) {
  std::vector<Json> chunks;
  for (const std::string& data : response.Events())
    chunks.push_back(data == "[DONE]" ? Json(data) : ParseJson(data).value());
  return chunks;
}

TEST(Api, AnswersAChat) {
  ScriptedApi api(ByteEngine("Hello"));
  const TestResponse response = Chat(api, R"("model":"demo")");
  ASSERT_EQ(response.status, 200) << response.body;
  const Json json = response.Parsed();
  EXPECT_TRUE(json["id"].get<std::string>().starts_with("chatcmpl-"));
  EXPECT_EQ(json["object"], "chat.completion");
  EXPECT_EQ(json["model"], "demo");
  EXPECT_EQ(json["choices"][0]["message"]["role"], "assistant");
  EXPECT_EQ(json["choices"][0]["message"]["content"], "Hello");
  EXPECT_EQ(json["choices"][0]["finish_reason"], "stop");
  EXPECT_TRUE(json["choices"][0]["stop_reason"].is_null());
  EXPECT_EQ(json["usage"]["prompt_tokens"], std::string("user: hi\nassistant: ").size());
  EXPECT_EQ(json["usage"]["completion_tokens"], 6);
  EXPECT_EQ(json["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
  EXPECT_FALSE(json["choices"][0].contains("token_ids"));
}

TEST(Api, StreamsAChatAsClientsExpect) {
  ScriptedApi api(ByteEngine("H\xC3\xA9!"));
  const TestResponse response = Chat(api, R"("stream":true,"stream_options":{"include_usage":true})");
  EXPECT_THAT(response.headers.at("content-type"), HasSubstr("text/event-stream"));
  EXPECT_TRUE(response.complete);
  const auto chunks = Chunks(response);
  ASSERT_EQ(chunks.size(), 7U) << response.body;  // role, H, é, !, finish, usage, done
  EXPECT_EQ(DumpJson(chunks[0]["choices"][0]["delta"]), R"({"role":"assistant","content":""})");
  EXPECT_EQ(chunks[1]["choices"][0]["delta"]["content"], "H");
  EXPECT_EQ(chunks[2]["choices"][0]["delta"]["content"], "\xC3\xA9");
  EXPECT_EQ(chunks[3]["choices"][0]["delta"]["content"], "!");
  EXPECT_TRUE(chunks[3]["choices"][0]["finish_reason"].is_null());
  EXPECT_EQ(chunks[4]["choices"][0]["finish_reason"], "stop");
  EXPECT_TRUE(chunks[4]["usage"].is_null());
  EXPECT_EQ(chunks[5]["choices"].size(), 0U);
  EXPECT_EQ(chunks[5]["usage"]["completion_tokens"], 5);
  EXPECT_EQ(chunks[6], "[DONE]");
  for (int i = 0; i < 6; ++i)
    EXPECT_EQ(chunks[static_cast<std::size_t>(i)]["object"], "chat.completion.chunk");
}

TEST(Api, StopsAtStopStringsAndCancelsTheRest) {
  ScriptedApi api(ByteEngine("one, two, three, and so on for long"));
  Json choice = Complete(api, R"("prompt":"x","max_tokens":400,"stop":[", th"])").Parsed()["choices"][0];
  EXPECT_EQ(choice["text"], "one, two");
  EXPECT_EQ(choice["finish_reason"], "stop");
  EXPECT_EQ(choice["stop_reason"], ", th");
  choice = Complete(api, R"("prompt":"x","max_tokens":400,"stop":", th","include_stop_str_in_output":true)")
               .Parsed()["choices"][0];
  EXPECT_EQ(choice["text"], "one, two, th");
  choice = Complete(api, R"("prompt":"x","max_tokens":400,"stop":",","min_tokens":6)").Parsed()["choices"][0];
  EXPECT_EQ(choice["text"], "one, two");
  choice = Complete(api, fmt::format(R"("prompt":"x","max_tokens":400,"stop_token_ids":[{}])", int{'w'}))
               .Parsed()["choices"][0];
  EXPECT_EQ(choice["text"], "one, t");
  EXPECT_EQ(choice["stop_reason"], int{'w'});
  api.engine.WaitUntilIdle();
  const auto chunks = Chunks(Complete(api, R"("prompt":"x","max_tokens":400,"stop":"thr","stream":true)"));
  std::string text;
  for (std::size_t i = 0; i + 1 < chunks.size(); ++i)
    text += chunks[i]["choices"][0]["text"].get<std::string>();
  EXPECT_EQ(text, "one, two, ");
  EXPECT_EQ(chunks[chunks.size() - 2]["choices"][0]["finish_reason"], "stop");
}

TEST(Api, KeepsToMaxTokensAndDefaults) {
  ScriptedApi api(ByteEngine(std::string(600, 'a')));
  Json json = Complete(api, R"("prompt":"x")").Parsed();
  EXPECT_EQ(json["choices"][0]["text"], std::string(16, 'a'));
  EXPECT_EQ(json["choices"][0]["finish_reason"], "length");
  json = Chat(api).Parsed();
  EXPECT_EQ(json["usage"]["total_tokens"], 512);
  json = Chat(api, R"("max_completion_tokens":3)").Parsed();
  EXPECT_EQ(json["choices"][0]["message"]["content"], "aaa");
  json = Complete(api, fmt::format(R"("prompt":"{}")", std::string(505, 'p'))).Parsed();
  EXPECT_EQ(json["usage"]["completion_tokens"], 6) << json;  // <bos> and 505 leave 6
}

TEST(Api, GivesNChoicesWithTheirOwnSeeds) {
  auto options = ByteEngine("");
  options.next_token = [](const core::GenerationRequest& request, int index) -> TokenId {
    return index == 0 ? static_cast<TokenId>('0' + request.sampling.seed) : kEos;
  };
  ScriptedApi api(options);
  Json json = Complete(api, R"("prompt":["x","y"],"n":2,"seed":3)").Parsed();
  ASSERT_EQ(json["choices"].size(), 4U);
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(json["choices"][i]["index"], i);
    EXPECT_EQ(json["choices"][i]["text"], i % 2 == 0 ? "3" : "4");
  }
  EXPECT_EQ(json["usage"]["prompt_tokens"], 4);
  EXPECT_EQ(json["usage"]["completion_tokens"], 8);
}

TEST(Api, EchoesAndScoresAPrompt) {
  ScriptedApi api(ByteEngine("yes"));
  Json json =
      Complete(api, R"("prompt":"abc","echo":true,"logprobs":1,"max_tokens":0,"add_special_tokens":false)")
          .Parsed();
  Json choice = json["choices"][0];
  EXPECT_EQ(choice["text"], "abc");
  EXPECT_EQ(choice["finish_reason"], "length");
  EXPECT_EQ(DumpJson(choice["logprobs"]["tokens"]), R"(["a","b","c"])");
  EXPECT_EQ(DumpJson(choice["logprobs"]["text_offset"]), "[0,1,2]");
  EXPECT_EQ(DumpJson(choice["logprobs"]["token_logprobs"]), "[null,-0.25,-0.25]");
  EXPECT_EQ(json["usage"]["completion_tokens"], 0);
  choice = Complete(api, R"("prompt":"abc","echo":true,"logprobs":2,"add_special_tokens":false)")
               .Parsed()["choices"][0];
  EXPECT_EQ(choice["text"], "abcyes");
  EXPECT_EQ(choice["logprobs"]["tokens"].size(), 7U);  // with <eos>
  const auto chunks = Chunks(Complete(api, R"("prompt":"abc","echo":true,"stream":true)"));
  EXPECT_EQ(chunks[0]["choices"][0]["text"], "abcy");
}

TEST(Api, ShowsLogprobsInBothShapes) {
  ScriptedApi api(ByteEngine("hi"));
  Json entry =
      Chat(api, R"("logprobs":true,"top_logprobs":2)").Parsed()["choices"][0]["logprobs"]["content"][0];
  EXPECT_EQ(entry["token"], "h");
  EXPECT_EQ(entry["bytes"][0], int{'h'});
  EXPECT_DOUBLE_EQ(entry["logprob"].get<double>(), -0.25);
  ASSERT_EQ(entry["top_logprobs"].size(), 2U);
  EXPECT_EQ(entry["top_logprobs"][1]["token"], "i");
  entry = Chat(api, R"("logprobs":true)").Parsed()["choices"][0]["logprobs"]["content"][0];
  EXPECT_EQ(entry["top_logprobs"].size(), 0U);
  Json logprobs = Complete(api, R"("prompt":"x","logprobs":5,"return_tokens_as_token_ids":true)")
                      .Parsed()["choices"][0]["logprobs"];
  EXPECT_EQ(logprobs["tokens"][0], "token_id:104");
  EXPECT_EQ(logprobs["top_logprobs"][0].size(), 5U);
  Json prompt =
      Complete(api, R"("prompt":"abc","prompt_logprobs":1)").Parsed()["choices"][0]["prompt_logprobs"];
  ASSERT_EQ(prompt.size(), 4U);
  EXPECT_TRUE(prompt[0].is_null());
  EXPECT_EQ(prompt[1]["97"]["rank"], 1);
  const auto chunks = Chunks(Chat(api, R"("logprobs":true,"stream":true)"));
  EXPECT_EQ(chunks[1]["choices"][0]["logprobs"]["content"][0]["token"], "h");
}

TEST(Api, ReturnsTokenIds) {
  ScriptedApi api(ByteEngine("hi"));
  Json choice = Complete(api, R"("prompt":[1,2],"temperature":0,"logprobs":5,"return_token_ids":true)")
                    .Parsed()["choices"][0];
  EXPECT_EQ(choice["token_ids"], Json({104, 105, kEos}));
  EXPECT_EQ(choice["prompt_token_ids"], Json({1, 2}));
  const Json chat = Chat(api, R"("return_token_ids":true)").Parsed();
  EXPECT_EQ(chat["choices"][0]["token_ids"], Json({104, 105, kEos}));
  EXPECT_EQ(chat["prompt_token_ids"].size(), 20U);
  const auto chunks = Chunks(Chat(api, R"("return_token_ids":true,"stream":true)"));
  EXPECT_EQ(chunks[0]["prompt_token_ids"].size(), 20U);
  EXPECT_EQ(chunks[1]["choices"][0]["token_ids"], Json({104}));
}

TEST(Api, GivesContinuousUsage) {
  ScriptedApi api(ByteEngine("abc"));
  const auto chunks = Chunks(Chat(api, R"("stream":true,"stream_options":{"continuous_usage_stats":true})"));
  EXPECT_EQ(chunks[1]["usage"]["completion_tokens"], 1);
  EXPECT_EQ(chunks[2]["usage"]["completion_tokens"], 2);
  EXPECT_EQ(chunks.back(), "[DONE]");
}

TEST(Api, FindsToolCalls) {
  ScriptedApi api(ByteEngine(
      "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>"));
  const std::string tools = R"("tools":[{"type":"function","function":{"name":"get_weather"}}])";
  Json choice = Chat(api, tools).Parsed()["choices"][0];
  EXPECT_EQ(choice["finish_reason"], "tool_calls");
  EXPECT_TRUE(choice["message"]["content"].is_null());
  EXPECT_EQ(choice["message"]["tool_calls"][0]["function"]["name"], "get_weather");
  EXPECT_EQ(choice["message"]["tool_calls"][0]["function"]["arguments"], R"({"city":"Paris"})");
  const auto chunks = Chunks(Chat(api, tools + R"(,"stream":true)"));
  ASSERT_EQ(chunks.size(), 4U);
  EXPECT_EQ(chunks[1]["choices"][0]["delta"]["tool_calls"][0]["index"], 0);
  EXPECT_EQ(chunks[1]["choices"][0]["delta"]["tool_calls"][0]["function"]["name"], "get_weather");
  EXPECT_EQ(chunks[2]["choices"][0]["finish_reason"], "tool_calls");
  choice = Chat(api).Parsed()["choices"][0];
  EXPECT_THAT(choice["message"]["content"].get<std::string>(), HasSubstr("<tool_call>"));
}

TEST(Api, ShowsReasoningUnderBothNames) {
  ServerOptions options;
  options.output.reasoning = ReasoningFormat::kThink;
  ScriptedApi api(ByteEngine("<think>\nHm.\n</think>\n\nYes."), options);
  const Json message = Chat(api).Parsed()["choices"][0]["message"];
  EXPECT_EQ(message["reasoning_content"], "Hm.");
  EXPECT_EQ(message["reasoning"], "Hm.");
  EXPECT_EQ(message["content"], "Yes.");
  std::string reasoning, content;
  std::size_t tokens = 0;
  for (const Json& chunk : Chunks(Chat(api, R"("stream":true,"return_token_ids":true)"))) {
    if (!chunk.is_object() || chunk["choices"].empty()) continue;
    const Json& choice = chunk["choices"][0];
    tokens += choice.value("token_ids", Json::array()).size();
    EXPECT_EQ(choice["delta"].value("reasoning", ""), choice["delta"].value("reasoning_content", ""));
    reasoning += choice["delta"].value("reasoning_content", "");
    content += choice["delta"].value("content", "");
  }
  EXPECT_EQ(reasoning, "Hm.");
  EXPECT_EQ(content, "Yes.");
  EXPECT_EQ(tokens, 27U);  // each token is shown once: 26 bytes and <eos>
  const Json cut = Chat(api, R"("max_tokens":11)").Parsed()["choices"][0];
  EXPECT_EQ(cut["finish_reason"], "length");
  EXPECT_EQ(cut["message"]["reasoning_content"], "Hm.");
  EXPECT_TRUE(cut["message"]["content"].is_null());
  // Plain completions stay as they are.
  EXPECT_THAT(
      Complete(api, R"("prompt":"x","max_tokens":40)").Parsed()["choices"][0]["text"].get<std::string>(),
      HasSubstr("<think>"));
}

TEST(Api, GoesOnReasoningThatThePromptBegan) {
  ServerOptions options;
  options.output.reasoning = ReasoningFormat::kThink;
  ScriptedApi api(ByteEngine("Hm.</think>Yes."), options);
  const std::string begun =
      R"({"model":"demo","continue_final_message":true,"messages":[{"role":"assistant","content":"<think>"}]})";
  const Json message = Post(api, "/v1/chat/completions", begun).Parsed()["choices"][0]["message"];
  EXPECT_EQ(message["reasoning_content"], "Hm.");
  EXPECT_EQ(message["content"], "Yes.");
  EXPECT_EQ(Chat(api).Parsed()["choices"][0]["message"]["content"], "Hm.</think>Yes.");
}

TEST(Api, ContinuesTheFinalMessage) {
  ScriptedApi api(ByteEngine("!"));
  const Json json =
      Post(api, "/tokenize",
           R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"Well, "}],
                             "continue_final_message":true,"add_generation_prompt":false})")
          .Parsed();
  EXPECT_EQ(json["count"], std::string("user: a\nassistant: Well,").size());
}

TEST(Api, TokenizesAndDetokenizes) {
  ScriptedApi api(ByteEngine(""));
  Json json = Post(api, "/tokenize", R"({"prompt":"ab","return_token_strs":true})").Parsed();
  EXPECT_EQ(json["tokens"], Json({kBos, 97, 98}));
  EXPECT_EQ(json["token_strs"][1], "a");
  EXPECT_EQ(json["max_model_len"], 512);
  EXPECT_EQ(Post(api, "/detokenize", R"({"tokens":[104,105]})").Parsed()["prompt"], "hi");
  EXPECT_EQ(Post(api, "/detokenize", R"({"tokens":[9999]})").status, 400);
}

TEST(Api, LargeBodiesAreReadOnAHelperThread) {
  ScriptedApi api(ByteEngine("ok"), {.offload_bytes = 100});
  const std::string pad(5000, ' ');
  EXPECT_EQ(Chat(api, pad + R"("max_tokens":2)").Parsed()["choices"][0]["message"]["content"], "ok");
  EXPECT_EQ(Chat(api, pad + R"("max_tokens":0)").status, 400);
  EXPECT_EQ(Post(api, "/tokenize", pad + R"({"prompt":"ab"})").Parsed()["count"], 3);
}

TEST(Api, NamesWhatIsWrong) {
  ScriptedApi api(ByteEngine("x"));
  const auto error = [](const TestResponse& response) { return response.Parsed()["error"]; };
  EXPECT_EQ(error(Chat(api, R"("model":"gpt")"))["code"], "model_not_found");
  EXPECT_EQ(Chat(api, R"("model":"gpt")").status, 404);
  EXPECT_EQ(Chat(api, R"("model":"alias")").Parsed()["model"], "alias");
  EXPECT_EQ(error(Chat(api, R"("temperature":-1)"))["param"], "temperature");
  EXPECT_EQ(error(Complete(api, R"("prompt":[1,258])"))["param"], "prompt");
  EXPECT_THAT(error(Complete(api, R"("prompt":"","add_special_tokens":false)"))["message"].get<std::string>(),
              HasSubstr("empty"));
  const Json too_long = error(Complete(api, fmt::format(R"("prompt":"{}")", std::string(600, 'p'))));
  EXPECT_EQ(too_long["param"], "prompt");
  EXPECT_THAT(too_long["message"].get<std::string>(), testing::AllOf(HasSubstr("601"), HasSubstr("512")));
  const Json too_many = error(Complete(api, R"("prompt":"abc","max_tokens":509)"));
  EXPECT_EQ(too_many["param"], "max_tokens");
  EXPECT_THAT(too_many["message"].get<std::string>(),
              testing::AllOf(HasSubstr("509"), HasSubstr("512"), HasSubstr("508")));
  EXPECT_EQ(error(Complete(api, R"("prompt":"abc","min_tokens":20,"max_tokens":10)"))["param"], "min_tokens");
  EXPECT_EQ(error(Complete(api, fmt::format(R"("prompt":"{}","truncate_prompt_tokens":10,"max_tokens":1)",
                                            std::string(600, 'p')))),
            Json());
  EXPECT_THAT(
      error(Post(api, "/v1/chat/completions", R"({"messages":[{"role":"bad","content":""}]})"))["message"]
          .get<std::string>(),
      HasSubstr("roles must alternate"));
  EXPECT_EQ(Post(api, "/v1/chat/completions", "not json").status, 400);
  EXPECT_EQ(Post(api, "/v1/chat/completions", "{}", "Content-Encoding: gzip\r\n").status, 415);
  EXPECT_EQ(Get(api, "/v1/chat/completions").status, 405);
  EXPECT_EQ(Post(api, "/v1/responses", "{}").status, 404);
}

TEST(Api, EngineErrorsBecomeErrors) {
  auto options = ByteEngine("abcdef");
  options.fail = [](const core::GenerationRequest& request, int index) -> std::optional<std::string> {
    if (index == request.max_tokens - 1) return "device 3 died";
    return std::nullopt;
  };
  ScriptedApi api(options);
  const TestResponse whole = Complete(api, R"("prompt":"x","max_tokens":3)");
  EXPECT_EQ(whole.status, 500);
  EXPECT_THAT(whole.Parsed()["error"]["message"].get<std::string>(), HasSubstr("device 3 died"));
  const auto chunks = Chunks(Complete(api, R"("prompt":"x","max_tokens":3,"stream":true)"));
  ASSERT_EQ(chunks.size(), 4U);
  EXPECT_EQ(chunks[1]["choices"][0]["text"], "b");
  EXPECT_EQ(chunks[2]["error"]["type"], "server_error");
}

TEST(Api, AFullQueueIs429) {
  auto options = ByteEngine("abc");
  options.manual = true;
  options.max_waiting = 1;
  ScriptedApi api(options, {.max_streams = 2});
  TestClient first(api.server->Port()), second(api.server->Port());
  const std::string body = TestClient::Text("POST", "/v1/completions", R"({"prompt":"x"})");
  first.Send(body);
  api.engine.WaitForSubmitted(1);
  const TestResponse full = Complete(api, R"("prompt":["x"])");
  EXPECT_EQ(full.status, 429);
  EXPECT_EQ(full.headers.at("retry-after"), "1");
  api.engine.Step();
  second.Send(body);
  api.engine.WaitForSubmitted(2);
  EXPECT_EQ(Complete(api, R"("prompt":"x")").Parsed()["error"]["code"], "too_many_requests");
  EXPECT_EQ(Get(api, "/load").Parsed()["server_load"], 2);
  api.engine.Step(10);
  EXPECT_EQ(first.Read().Parsed()["choices"][0]["text"], "abc");
  EXPECT_EQ(second.Read().Parsed()["choices"][0]["text"], "abc");
}

TEST(Api, CancelsWhenTheClientHangsUp) {
  auto options = ByteEngine(std::string(400, 'a'));
  options.step_interval = std::chrono::milliseconds(2);
  ScriptedApi api(options);
  for (const char* stream : {"true", "false"}) {
    TestClient client(api.server->Port());
    client.Send(
        TestClient::Text("POST", "/v1/completions",
                         fmt::format(R"({{"prompt":["x","y"],"max_tokens":400,"stream":{}}})", stream)));
    if (std::string_view(stream) == "true") {
      ASSERT_TRUE(client.ReadUntil("\"text\""));
    }
    client.Close();
  }
  api.engine.WaitForSubmitted(4);
  api.engine.WaitUntilIdle();
  EXPECT_EQ(api.engine.Cancelled(), 4U);
}

TEST(Api, StopFinishesStreamsAndStopNowAborts) {
  auto options = ByteEngine("abc");
  options.manual = true;
  ScriptedApi api(options);
  TestClient running(api.server->Port());
  running.Send(TestClient::Text("POST", "/v1/completions", R"({"prompt":"x","stream":true})"));
  api.engine.WaitForSubmitted(1);
  TestClient cut(api.server->Port());
  cut.Send(TestClient::Text("POST", "/v1/completions", R"({"prompt":"x"})"));
  api.engine.WaitForSubmitted(2);
  api.server->BeginStop();
  api.engine.Step(2);
  ASSERT_TRUE(running.ReadUntil("\"b\""));
  api.server->StopNow();
  api.server->Wait();
  EXPECT_EQ(cut.Read().status, 0);
  api.engine.Step(1);
  EXPECT_EQ(api.engine.Cancelled(), 2U);
}

TEST(Api, GuardsV1AndAddedRoutesByKey) {
  ScriptedApi api(ByteEngine("x"), {.api_keys = {"first", "second"}});
  api.server->AddRoute("POST", "/scale",
                       Plain([](const HttpRequest&) { return HttpResponse{.body = "{}"}; }));
  EXPECT_EQ(Get(api, "/v1/models").status, 401);
  EXPECT_EQ(Get(api, "/v1/models").Parsed()["error"]["code"], "invalid_api_key");
  for (const char* wrong : {"Bearer firs", "Bearer first1", "Bearer", "Bearer ", "Basic first", "first"})
    EXPECT_EQ(Get(api, "/v1/models", fmt::format("Authorization: {}\r\n", wrong)).status, 401) << wrong;
  EXPECT_EQ(Get(api, "/v1/models", "Authorization: Bearer first\r\n").status, 200);
  EXPECT_EQ(Get(api, "/v1/models/demo", "Authorization: bearer second\r\n").status, 200);
  EXPECT_EQ(Post(api, "/scale", "{}").status, 401);
  EXPECT_EQ(Post(api, "/scale", "{}", "Authorization: Bearer second\r\n").status, 200);
  EXPECT_EQ(Get(api, "/health").status, 200);
  EXPECT_EQ(Get(api, "/metrics").status, 200);
}

TEST(Api, ListsModelsAndState) {
  bool healthy = true;
  ScriptedApi api(ByteEngine("x"), {.version = "1.2", .healthy = [&healthy] { return healthy; }});
  const Json models = Get(api, "/v1/models").Parsed();
  EXPECT_EQ(models["data"].size(), 2U);
  EXPECT_EQ(models["data"][0]["id"], "demo");
  EXPECT_EQ(models["data"][0]["max_model_len"], 512);
  EXPECT_EQ(Get(api, "/v1/models/demo").Parsed()["id"], "demo");
  EXPECT_EQ(Get(api, "/v1/models/x").Parsed()["error"]["param"], "model");
  EXPECT_EQ(Get(api, "/version").Parsed()["version"], "1.2");
  EXPECT_EQ(Get(api, "/health").body, "");
  EXPECT_EQ(Post(api, "/ping", "").status, 200);
  healthy = false;
  EXPECT_EQ(Get(api, "/health").status, 503);
}

TEST(Api, AModelWithoutTokenizerServesTokenIds) {
  ScriptedApi api(ByteEngine("hi"), {}, false);
  const Json choice = Complete(api, R"("prompt":[1,2],"logprobs":1)").Parsed()["choices"][0];
  EXPECT_EQ(choice["text"], "");
  EXPECT_EQ(choice["token_ids"], Json({104, 105, kEos}));
  EXPECT_EQ(choice["logprobs"]["tokens"][0], "token_id:104");
  for (const TestResponse& refused :
       {Complete(api, R"("prompt":"text")"), Chat(api), Post(api, "/tokenize", R"({"prompt":"x"})"),
        Complete(api, R"("prompt":[1],"stop":"x")"), Post(api, "/detokenize", R"({"tokens":[1]})")}) {
    EXPECT_EQ(refused.status, 400);
    EXPECT_THAT(refused.body, HasSubstr("no tokenizer"));
  }
}

TEST(Api, CountsInMetrics) {
  ScriptedApi api(ByteEngine("hello"));
  EXPECT_EQ(Complete(api, R"("prompt":"abc","n":2)").status, 200);
  api.server->AddMetrics([] { return std::string("added_metric 1\n"); });
  const std::string page = Get(api, "/metrics").body;
  const std::string labels = R"({engine="0",model_name="demo"})";
  EXPECT_THAT(page, HasSubstr("vllm:generation_tokens_total" + labels + " 12\n"));
  EXPECT_THAT(page, HasSubstr("vllm:prompt_tokens_total" + labels + " 8\n"));
  EXPECT_THAT(page, HasSubstr("vllm:time_to_first_token_seconds_count" + labels + " 2\n"));
  EXPECT_THAT(page, HasSubstr("vllm:inter_token_latency_seconds_count" + labels + " 10\n"));
  EXPECT_THAT(page, HasSubstr("vllm:request_queue_time_seconds_count" + labels + " 2\n"));
  EXPECT_THAT(page, HasSubstr("vllm:num_requests_running" + labels + " 0\n"));
  EXPECT_THAT(
      page,
      HasSubstr(R"(vllm:request_success_total{engine="0",finished_reason="stop",model_name="demo"} 2)"));
  EXPECT_THAT(page,
              HasSubstr(R"(http_requests_total{handler="/v1/completions",method="POST",status="200"} 1)"));
  EXPECT_THAT(page, HasSubstr("added_metric 1\n"));
}

TEST(Api, ServesTheRecordedRequestsOfRealClients) {
  ScriptedApi api(ByteEngine("Hello"));
  const auto text = ReadFile(ELASTICMOE_TESTDATA "/clients/recorded.json");
  ASSERT_TRUE(text) << text.error().message;
  const Json recorded = ParseJson(*text).value();
  int served = 0, refused = 0;
  for (const Json& client : recorded) {
    for (const Json& request : client["requests"]) {
      std::string headers;
      for (const auto& [name, value] : request["headers"].items())
        headers += fmt::format("{}: {}\r\n", name, value.get<std::string>());
      const std::string path = request["url"];
      const std::string body = request["body"].is_null() ? "" : DumpJson(request["body"]);
      const TestResponse response =
          TestClient(api.server->Port()).Call(request["method"].get<std::string>(), path, body, headers);
      SCOPED_TRACE(client["client"].get<std::string>() + ": " + response.body);
      EXPECT_TRUE(response.complete);
      // What we do not do: forced tools, guided decoding, other APIs and models, empty conversations.
      const Json& b = request["body"];
      const bool forced = b.is_object() && b.contains("tool_choice") && b["tool_choice"] != "auto";
      const bool guided = b.is_object() && b.contains("response_format");
      const bool empty = b.is_object() && b.contains("messages") && b["messages"].empty();
      const bool elsewhere = path.starts_with("/api/") || path == "/v1/responses" || path == "/v1/models/x" ||
                             (b.is_object() && b.contains("model") && b["model"] != "demo");
      const int expected = elsewhere ? 404 : forced || guided || empty ? 400 : 200;
      EXPECT_EQ(response.status, expected);
      ++(expected == 200 ? served : refused);
      if (expected != 200) {
        EXPECT_TRUE(response.Parsed()["error"]["message"].is_string());
      } else if (b.is_object() && b.value("stream", false)) {
        EXPECT_EQ(response.Events().back(), "[DONE]");
      }
    }
  }
  EXPECT_GE(served, 15);
  EXPECT_GE(refused, 10);
}

}  // namespace
}  // namespace elasticmoe::server
