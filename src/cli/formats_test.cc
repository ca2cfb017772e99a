// The pure readers of what servers and files say.
#include <gmock/gmock.h>

#include <cmath>

#include "cli/http_client.h"
#include "cli/openai_answer.h"
#include "cli/prometheus_text.h"
#include "cli/sse.h"
#include "cli/status_view.h"
#include "cli/trace_csv.h"

namespace elasticmoe::cli {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

std::vector<std::string> Events(const std::vector<std::string_view>& pieces) {
  SseParser parser;
  std::vector<std::string> events;
  for (std::string_view piece : pieces)
    EXPECT_TRUE(
        parser.Feed(piece, [&](const SseEvent& event) { events.push_back(event.name + "|" + event.data); }));
  return events;
}

TEST(SseParser, GivesTheSameEventsWhereverTheBytesAreCut) {
  const std::string text =
      "\xEF\xBB\xBF"
      "data: {\"a\": 1}\n\n"
      ": a comment\r\n"
      "event: error\r\ndata:first\r\ndata: second\r\n\r\n"
      "id: 7\rdata\r\r"
      "retry: 10\n\n"
      "data:  two blanks\n\n"
      "data: [DONE]\n\n"
      "data: never ended";
  const std::vector<std::string> want = {"|{\"a\": 1}", "error|first\nsecond", "|", "| two blanks",
                                         "|[DONE]"};
  EXPECT_EQ(Events({text}), want);
  for (std::size_t cut = 0; cut <= text.size(); ++cut)
    EXPECT_EQ(Events({std::string_view(text).substr(0, cut), std::string_view(text).substr(cut)}), want)
        << cut;
  std::vector<std::string_view> bytes;
  for (std::size_t i = 0; i < text.size(); ++i) bytes.push_back(std::string_view(text).substr(i, 1));
  EXPECT_EQ(Events(bytes), want);
}

TEST(SseParser, RefusesAnEventBeyondItsLimit) {
  const auto ignore = [](const SseEvent&) {};
  SseParser line(64);
  EXPECT_TRUE(line.Feed(std::string(40, 'x'), ignore));
  EXPECT_EQ(line.Feed(std::string(40, 'x'), ignore).error().code, ErrorCode::kResourceExhausted);
  SseParser data(64);
  Status status;
  for (int i = 0; i < 20 && status; ++i) status = data.Feed("data: 12345\n", ignore);
  ASSERT_FALSE(status);
}

TEST(TraceCsv, ReadsCalendarTimesAndSortsThem) {
  const auto rows = ParseTraceCsv(
      "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
      "2023-11-16 18:15:46.6805900,374,44\r\n"
      "2023-11-16 18:15:50.9951690,396,109\r\n"
      "2023-11-16T18:15:45,1,0\n\n");
  ASSERT_TRUE(rows) << rows.error().message;
  ASSERT_EQ(rows->size(), 3U);
  EXPECT_EQ((*rows)[0].at_ns, 0);
  EXPECT_EQ((*rows)[0].generated_tokens, 0);
  EXPECT_EQ((*rows)[1].at_ns, 1'680'590'000);
  EXPECT_EQ((*rows)[2].at_ns, 5'995'169'000);
  EXPECT_EQ((*rows)[2].context_tokens, 396);
}

TEST(TraceCsv, CrossesMidnightAndLeapDays) {
  const auto rows = ParseTraceCsv(
      "GeneratedTokens,x,TIMESTAMP,ContextTokens\n"
      "2,a,2024-02-28 23:59:59,1\n2,a,2024-03-01 00:00:00Z,1\n");
  ASSERT_TRUE(rows) << rows.error().message;
  EXPECT_EQ((*rows)[1].at_ns, 86'401'000'000'000);
}

TEST(TraceCsv, ReadsSecondsAsNumbers) {
  const auto rows = ParseTraceCsv("TIMESTAMP,ContextTokens,GeneratedTokens\n10.5,1,2\n12,3,4");
  ASSERT_TRUE(rows) << rows.error().message;
  EXPECT_EQ((*rows)[1].at_ns, 1'500'000'000);
}

TEST(TraceCsv, NamesTheLineThatIsWrong) {
  const std::string head = "TIMESTAMP,ContextTokens,GeneratedTokens\n1,2,3\n";
  const auto message = [](const std::string& text) {
    const auto rows = ParseTraceCsv(text);
    return rows ? "accepted" : rows.error().message;
  };
  EXPECT_THAT(message(head + "yesterday,2,3\n"), HasSubstr("line 3: TIMESTAMP='yesterday'"));
  EXPECT_THAT(message(head + "\n2023-13-01 00:00:00,2,3\n"), HasSubstr("line 4: TIMESTAMP="));
  EXPECT_THAT(message(head + "2,x,3\n"), HasSubstr("line 3: ContextTokens='x'"));
  EXPECT_THAT(message(head + "2,-1,3\n"), HasSubstr("line 3: ContextTokens='-1'"));
  EXPECT_THAT(message(head + "2,1\n"), HasSubstr("line 3: GeneratedTokens=''"));
  EXPECT_THAT(message(head + "2,1,99999999999\n"), HasSubstr("line 3: GeneratedTokens="));
  EXPECT_THAT(message(head + "1e300,1,1\n"), HasSubstr("line 3: TIMESTAMP="));
  EXPECT_THAT(message(head + "nan,1,1\n"), HasSubstr("line 3: TIMESTAMP="));
  EXPECT_THAT(message("a,b\n1,2\n"), HasSubstr("line 1 names no column TIMESTAMP"));
  EXPECT_THAT(message("TIMESTAMP,ContextTokens,GeneratedTokens\n"), HasSubstr("holds no request"));
  EXPECT_THAT(message(""), HasSubstr("holds no request"));
}

TEST(PrometheusText, ReadsNamesLabelsAndValues) {
  const auto samples = ParsePrometheusText(
      "# HELP a text\n# TYPE a counter\n"
      "a 1\n"
      "a{x=\"1\",y=\"q\\\"\\\\\\n{},\"} 2.5e3 1700000000\r\n"
      "b_bucket{le=\"+Inf\",} +Inf\n"
      "vllm:c NaN\n"
      "d{} -Inf\n\n");
  ASSERT_TRUE(samples) << samples.error().message;
  ASSERT_EQ(samples->size(), 5U);
  EXPECT_EQ((*samples)[1].labels.at("y"), "q\"\\\n{},");
  EXPECT_EQ((*samples)[1].value, 2500);
  EXPECT_EQ((*samples)[2].labels.at("le"), "+Inf");
  EXPECT_TRUE(std::isnan((*samples)[3].value));
  EXPECT_EQ((*samples)[4].value, -HUGE_VAL);
  EXPECT_EQ(SumOf(*samples, "a"), 2501);
  EXPECT_EQ(SumOf(*samples, "none"), std::nullopt);
}

TEST(PrometheusText, NamesTheLineThatIsWrong) {
  for (const char* line :
       {"a", "a{x=1} 2", "a{x=\"1} 2", "a{x=\"1\" y=\"2\"} 2", "a one", "{} 1", "a{x=\"\\", "a{"}) {
    const auto samples = ParsePrometheusText(fmt::format("ok 1\n{}", line));
    ASSERT_FALSE(samples) << line;
    EXPECT_THAT(samples.error().message, HasSubstr("line 2 ")) << line;
  }
}

TEST(OpenAiAnswer, ReadsCompletionsAndChatsAndUsage) {
  auto part =
      ParseAnswerPart(R"({"choices":[{"index":0,"text":"ab","token_ids":[5,6],"finish_reason":null}]})");
  ASSERT_TRUE(part);
  EXPECT_EQ(part->text, "ab");
  EXPECT_THAT(part->token_ids, ElementsAre(5, 6));
  EXPECT_EQ(part->finish_reason, "");

  part = ParseAnswerPart(
      R"({"choices":[{"delta":{"role":"assistant","content":"hi"},"finish_reason":"stop"}],"usage":null})");
  ASSERT_TRUE(part);
  EXPECT_EQ(part->text, "hi");
  EXPECT_EQ(part->finish_reason, "stop");
  EXPECT_FALSE(part->usage);

  part = ParseAnswerPart(R"({"choices":[{"delta":{"content":null,"reasoning_content":"hm"}}]})");
  ASSERT_TRUE(part);
  EXPECT_TRUE(part->is_reasoning);

  part = ParseAnswerPart(R"({"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":7}})");
  ASSERT_TRUE(part);
  EXPECT_FALSE(part->has_choice);
  EXPECT_EQ(part->usage->completion_tokens, 7);
}

TEST(OpenAiAnswer, TakesAnyShapeWithoutHarm) {
  for (const char* text :
       {R"({"choices":1})", R"({"choices":[1]})", R"({"choices":[{"text":3,"token_ids":[1.5,-1,"x",9e30]}]})",
        R"({"choices":[{"delta":[]}],"usage":[]})", R"({"usage":{"prompt_tokens":1e300}})"}) {
    const auto part = ParseAnswerPart(text);
    ASSERT_TRUE(part) << text;
    EXPECT_TRUE(part->token_ids.empty()) << text;
  }
  EXPECT_EQ(ParseAnswerPart("[]").error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(ParseAnswerPart("{").error().code, ErrorCode::kInvalidArgument);
  const auto error = ParseAnswerPart(R"({"error":{"message":"worker died","code":500}})");
  EXPECT_EQ(error.error().code, ErrorCode::kInternal);
  EXPECT_EQ(error.error().message, "worker died");
}

TEST(OpenAiAnswer, ShowsTheServersOwnMessage) {
  EXPECT_EQ(ServerMessage(400, R"({"error":{"message":"prompt: too long","param":"prompt"}})"),
            "prompt: too long (HTTP 400)");
  EXPECT_EQ(ServerMessage(400, R"({"object":"error","message":"old shape"})"), "old shape (HTTP 400)");
  EXPECT_EQ(ServerMessage(404, R"({"detail":"Not Found"})"), "Not Found (HTTP 404)");
  EXPECT_EQ(ServerMessage(502, "<html>bad\nmore"), "<html>bad (HTTP 502)");
  EXPECT_EQ(ServerMessage(503, ""), "HTTP 503");
}

TEST(Url, ReadsHostPortAndPrefix) {
  const auto shown = [](std::string_view text) {
    const auto url = ParseUrl(text);
    return url ? ToString(*url) : url.error().message;
  };
  EXPECT_EQ(shown("http://127.0.0.1:8000"), "http://127.0.0.1:8000");
  EXPECT_EQ(shown("localhost:8000/v1/"), "http://localhost:8000");
  EXPECT_EQ(shown("http://host"), "http://host:80");
  EXPECT_EQ(shown("http://host/a/b/"), "http://host:80/a/b");
  EXPECT_EQ(shown("http://[::1]:9"), "http://[::1]:9");
  EXPECT_THAT(shown("https://host"), HasSubstr("TLS"));
  EXPECT_THAT(shown("ftp://host"), HasSubstr("another scheme"));
  EXPECT_THAT(shown(""), HasSubstr("names no host"));
  for (const char* text : {"host:", "host:0", "host:65536", "host:80x", "host:-1"})
    EXPECT_THAT(shown(text), HasSubstr("no port")) << text;
  for (const char* text :
       {"http://a b", "http://a\r\nX: y", "http://u@h", "http://h?q", "http://[::1", "[::1]x"})
    EXPECT_FALSE(ParseUrl(text)) << text;
}

TEST(StatusView, ShowsRatesAndDevicesAndToleratesWhatIsMissing) {
  ServerState state{.url = "http://x", .health = "ok"};
  EXPECT_EQ(RenderStatus(state, std::nullopt), "server    http://x  ok\n");
  const auto metrics = [](int tokens) {
    return *ParsePrometheusText(
        fmt::format("vllm:num_requests_running{{m=\"a\"}} 3\nvllm:generation_tokens_total {}\n"
                    "elasticmoe_device_rows_total{{device=\"0\"}} 5\n"
                    "elasticmoe_device_rows_total{{device=\"1\"}} 6\n",
                    tokens));
  };
  ServerState before = state;
  before.metrics = metrics(100);
  state.metrics = metrics(300);
  state.at_ns = 2'000'000'000;
  std::string text = RenderStatus(state, before);
  EXPECT_THAT(text, HasSubstr("requests  3 running\n"));
  EXPECT_THAT(text, HasSubstr("300 generated (100/s)"));
  EXPECT_THAT(text, HasSubstr("  device  rows\n       0     5\n       1     6\n"));
  state.cluster =
      *ParseJson(R"({"epoch":4,"desired":2,"devices":[{"device":0,"state":"active","memory_bytes":1536},
                                 {"device":1,"state":"standby","pid":7},3]})");
  text = RenderStatus(state, std::nullopt);
  EXPECT_THAT(text, HasSubstr("epoch 4, desired 2"));
  EXPECT_THAT(text, HasSubstr("active  1.5 KiB"));
  EXPECT_THAT(text, Not(HasSubstr("rows")));
  state.cluster = *ParseJson(
      R"({"epoch":4,"replicas":1,"desired":2,"active":2,"max_devices":4,"kv_blocks":81800000,"kv_usage":0.5,
          "operation":{"state":"preparing","phase":"preparing","progress":0.25}})");
  text = RenderStatus(state, std::nullopt);
  EXPECT_THAT(text, HasSubstr("\n          kv"));  // goes on in the next line, below its label
  EXPECT_THAT(text, HasSubstr("resize    preparing 25 %\n"));
  state.cluster = Json{{"devices", 3}};
  EXPECT_THAT(RenderStatus(state, std::nullopt), HasSubstr("devices 3\n"));
}

}  // namespace
}  // namespace elasticmoe::cli
