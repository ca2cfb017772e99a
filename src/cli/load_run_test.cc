// The client and the load generator against a server whose bytes the test decides.
#include "cli/load_run.h"

#include <gmock/gmock.h>

#include <atomic>
#include <set>

#include "cli/client.h"
#include "cli/load_report.h"
#include "cli/testing/fake_server.h"

namespace elasticmoe::cli {
namespace {

using ::testing::HasSubstr;
using State = RequestResult::State;
constexpr TimeNs kMs = 1'000'000;

struct Bench {
  explicit Bench(const std::string& url) : client(loop, *ParseUrl(url), {}) {}
  LoadResult Run(LoadOptions options) {
    options.model = "m";
    return LoadRun(loop, client, std::move(options)).Run();
  }
  EventLoop loop;
  HttpClient client;
};

std::string Token(int id, std::string_view finish = "null") {
  return fmt::format(R"({{"choices":[{{"index":0,"text":"t","token_ids":[{}],"finish_reason":{}}}]}})", id,
                     finish);
}

int MaxTokens(const FakeRequest& request) {
  return ParseJson(request.body)->at("max_tokens").get<int>();
}

// Streams max_tokens tokens, two in each piece, then the usage.
void AnswerWell(const FakeRequest& request, FakePeer& peer) {
  const int count = MaxTokens(request);
  peer.BeginEvents();
  for (int i = 0; i < count; i += 2) {
    const int n = std::min(2, count - i);
    Json ids = Json::array();
    for (int j = 0; j < n; ++j) ids.push_back(i + j);
    peer.Event(DumpJson(
        {{"choices", Json::array({{{"text", "ab"},
                                   {"token_ids", ids},
                                   {"finish_reason", i + n == count ? Json("length") : Json()}}})}}));
  }
  peer.Event(fmt::format(R"({{"choices":[],"usage":{{"prompt_tokens":5,"completion_tokens":{}}}}})", count));
  peer.Event("[DONE]");
  peer.EndEvents();
}

TEST(LoadRun, AClosedLoopCountsTokensGapsAndKeepsItsConnections) {
  FakeServer server(AnswerWell);
  Bench bench(server.Url());
  const LoadResult result =
      bench.Run({.shape = {.output = {7, 7}}, .concurrency = 3, .requests = 20, .keep_outputs = true});
  ASSERT_EQ(result.requests.size(), 20U);
  for (const RequestResult& request : result.requests) {
    EXPECT_EQ(request.state, State::kCompleted) << request.error_message;
    EXPECT_EQ(request.input_tokens, 5);
    EXPECT_EQ(request.output_tokens, 7);
    EXPECT_EQ(request.gaps_ms.size(), 3U);  // four pieces
    EXPECT_THAT(request.token_ids, ::testing::ElementsAre(0, 1, 2, 3, 4, 5, 6));
    EXPECT_LE(request.due_ns, request.first_token_ns);
    EXPECT_LE(request.first_token_ns, request.last_token_ns);
    EXPECT_LE(request.last_token_ns, request.done_ns);
  }
  EXPECT_LE(server.Connections(), 3);
  LoadReport report = Summarize(result, {});
  EXPECT_EQ(report.output_tokens, 140U);
  EXPECT_EQ(report.itl_ms.Count(), 60U);
}

TEST(LoadRun, TwoRunsOfOneSeedSendTheSameRequests) {
  std::mutex mutex;
  std::vector<std::multiset<std::string>> sent(3);
  std::atomic<int> run{0};
  FakeServer server([&](const FakeRequest& request, FakePeer& peer) {
    {
      const std::scoped_lock lock(mutex);
      sent[static_cast<std::size_t>(run)].insert(request.body);
    }
    AnswerWell(request, peer);
  });
  for (const std::uint64_t seed : {5, 5, 6}) {
    Bench bench(server.Url());
    bench.Run(
        {.shape = {.seed = seed, .input = {4, 40}, .output = {1, 9}}, .concurrency = 4, .requests = 12});
    ++run;
  }
  EXPECT_EQ(sent[0].size(), 12U);
  EXPECT_EQ(sent[0], sent[1]);
  EXPECT_NE(sent[0], sent[2]);
}

TEST(LoadRun, EachKindOfFailureIsCountedAsOne) {
  // What the n-th request meets.
  std::atomic<int> number{0};
  FakeServer server([&](const FakeRequest& request, FakePeer& peer) {
    switch (number++) {
      case 0:  // killed in the middle of the stream
        peer.BeginEvents();
        peer.Event(Token(1));
        return peer.Reset();
      case 1:  // closed in order, but early
        peer.BeginEvents();
        peer.Event(Token(1));
        return peer.Close();
      case 2:  // ended in order, without a reason
        peer.BeginEvents();
        peer.Event(Token(1));
        return peer.EndEvents();
      case 3:
        return peer.Answer(429, R"({"error":{"message":"too many"}})");
      case 4:  // an error in the stream
        peer.BeginEvents();
        peer.Event(Token(1));
        peer.Event(R"({"error":{"message":"worker died"}})");
        return peer.AwaitHangUp();
      case 5:
        peer.BeginEvents();
        peer.Event("no json");
        return peer.AwaitHangUp();
      case 6:
        peer.Write("SSH-2.0-x\r\n\r\n");
        return peer.AwaitHangUp();
      case 7:
        return peer.Close();  // not a byte
      case 8:                 // never ends
        peer.BeginEvents();
        peer.Event(Token(1));
        return peer.AwaitHangUp();
      default:
        return AnswerWell(request, peer);
    }
  });
  Bench bench(server.Url());
  const LoadResult result =
      bench.Run({.shape = {.output = {4, 4}}, .concurrency = 1, .requests = 11, .timeout_ns = 200 * kMs});
  std::vector<std::string> kinds;
  for (const RequestResult& request : result.requests) kinds.push_back(request.error_kind);
  EXPECT_THAT(kinds, ::testing::ElementsAre("reset", "reset", "cut short", "http 429", "server error",
                                            "protocol", "reset", "reset", "timeout", "", ""));
  EXPECT_THAT(result.requests[3].error_message, HasSubstr("too many"));
  EXPECT_THAT(result.requests[4].error_message, HasSubstr("worker died"));
  LoadReport report = Summarize(result, {});
  EXPECT_EQ(report.failed, 9U);
  EXPECT_EQ(report.completed, 2U);
  EXPECT_EQ(report.errors["reset"], 4U);
  EXPECT_EQ(report.output_tokens, 8U);
}

TEST(LoadRun, AServerThatIsNotThereFailsEveryRequest) {
  std::string url;
  { url = FakeServer(AnswerWell).Url(); }  // its port is free again
  Bench bench(url);
  const LoadResult result = bench.Run({.concurrency = 2, .requests = 2});
  ASSERT_EQ(result.requests.size(), 2U);
  for (const RequestResult& request : result.requests) EXPECT_EQ(request.error_kind, "connect");
  const auto models = ListModels(bench.client);
  ASSERT_FALSE(models);
  EXPECT_THAT(models.error().message, HasSubstr("is a server running there?"));
}

TEST(LoadRun, AnOpenLoopCountsTheWaitBehindAStallInEachRequestsTime) {
  // All three are due at once, but one at a time may run, and the first is answered only when the client has
  // gone: by its timeout. The others' time must hold the stall.
  std::atomic<int> number{0};
  FakeServer server([&](const FakeRequest& request, FakePeer& peer) {
    if (number++ == 0) return peer.AwaitHangUp();
    AnswerWell(request, peer);
  });
  Bench bench(server.Url());
  LoadOptions options{
      .shape = {.trace = {{0, 4, 2}, {0, 4, 2}, {0, 4, 2}}}, .concurrency = 1, .timeout_ns = 100 * kMs};
  options.arrivals = Arrivals::FromTrace(options.shape);
  const LoadResult result = bench.Run(std::move(options));
  ASSERT_EQ(result.requests.size(), 3U);
  EXPECT_EQ(result.requests[0].error_kind, "timeout");
  for (const std::size_t i : {1, 2}) {
    EXPECT_EQ(result.requests[i].state, State::kCompleted);
    EXPECT_GE(result.requests[i].first_token_ns - result.requests[i].due_ns, 99 * kMs);
  }
}

TEST(LoadRun, AnInterruptEndsTheRunAndHangsUp) {
  std::atomic<int> hung_up{0};
  FakeServer server([&](const FakeRequest&, FakePeer& peer) {
    peer.BeginEvents();
    peer.Event(Token(1));
    peer.AwaitHangUp();
    ++hung_up;
  });
  {
    Bench bench(server.Url());
    LoadOptions options{.shape = {.output = {4, 4}}, .concurrency = 2, .requests = 1000};
    LoadRun run(bench.loop, bench.client, std::move(options));
    run.OnProgress(5 * kMs, [&](const LoadProgress& now) {
      if (now.output_tokens == 2) run.Interrupt();
    });
    const LoadResult result = run.Run();
    EXPECT_TRUE(result.interrupted);
    ASSERT_EQ(result.requests.size(), 2U);
    for (const RequestResult& request : result.requests) EXPECT_EQ(request.state, State::kCancelled);
  }
  while (hung_up < 2) std::this_thread::yield();
}

TEST(LoadRun, AChatsFirstPieceWithoutTextIsNotItsFirstToken) {
  FakeServer server([&](const FakeRequest& request, FakePeer& peer) {
    EXPECT_THAT(request.line, HasSubstr("/v1/chat/completions"));
    peer.BeginEvents();
    peer.Event(R"({"choices":[{"delta":{"role":"assistant","content":""}}]})");
    peer.Event(R"({"choices":[{"delta":{"content":"a"}}]})");
    peer.Event(R"({"choices":[{"delta":{"content":"b"}}]})");
    peer.Event(R"({"choices":[{"delta":{},"finish_reason":"length"}]})");
    peer.EndEvents();
  });
  Bench bench(server.Url());
  const LoadResult result = bench.Run({.concurrency = 1, .requests = 1, .chat = true});
  EXPECT_EQ(result.requests[0].state, State::kCompleted) << result.requests[0].error_message;
  EXPECT_EQ(result.requests[0].output_tokens, 2);  // pieces, where the server counts nothing
  EXPECT_EQ(result.requests[0].gaps_ms.size(), 1U);
}

TEST(LoadRun, AnswersThatAreNotStreamedAreCountedToo) {
  FakeServer server([](const FakeRequest& request, FakePeer& peer) {
    EXPECT_EQ(request.body.find("\"stream\""), request.body.npos);
    peer.Answer(
        200,
        R"({"choices":[{"text":"abc","finish_reason":"length"}],"usage":{"prompt_tokens":9,"completion_tokens":3}})");
  });
  Bench bench(server.Url());
  const LoadResult result = bench.Run({.concurrency = 1, .requests = 2, .stream = false});
  for (const RequestResult& request : result.requests) {
    EXPECT_EQ(request.state, State::kCompleted) << request.error_message;
    EXPECT_EQ(request.output_tokens, 3);
  }
}

TEST(HttpClient, ReadsBodiesOfEveryFramingAndSendsTheKey) {
  FakeServer server([](const FakeRequest& request, FakePeer& peer) {
    EXPECT_THAT(request.head, HasSubstr("Authorization: Bearer secret\r\n"));
    EXPECT_THAT(request.head, HasSubstr("Host: 127.0.0.1:"));
    if (request.line.find("/length") != std::string::npos) return peer.Answer(200, "by length");
    if (request.line.find("/chunks") != std::string::npos)
      return peer.Write(
          "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nby \r\n6;x=y\r\nchunks\r\n0\r\nT: "
          "t\r\n\r\n");
    if (request.line.find("/none") != std::string::npos) return peer.Write("HTTP/1.1 204 No Content\r\n\r\n");
    peer.Write("HTTP/1.0 200 OK\r\n\r\nby its end");
    peer.Close();
  });
  EventLoop loop;
  HttpClient client(loop, *ParseUrl(server.Url()), {.api_key = "secret"});
  EXPECT_EQ(client.Fetch({.target = "/length"})->body, "by length");
  EXPECT_EQ(client.Fetch({.target = "/chunks"})->body, "by chunks");
  EXPECT_EQ(client.Fetch({.target = "/none"})->status, 204);
  EXPECT_EQ(server.Connections(), 1);
  EXPECT_EQ(client.Fetch({.target = "/end"})->body, "by its end");
  EXPECT_EQ(client.Fetch({.target = "/length"})->body, "by length");  // the closed one is not used again
}

TEST(HttpClient, LyingAndEndlessAnswersAreErrors) {
  FakeServer server([](const FakeRequest& request, FakePeer& peer) {
    if (request.line.find("/long") != std::string::npos) {
      peer.Write("HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551615\r\n\r\nshort");
    } else if (request.line.find("/head") != std::string::npos) {
      peer.Write("HTTP/1.1 200 OK\r\nX: " + std::string(100'000, 'x') + "\r\n\r\n");
    } else if (request.line.find("/chunk") != std::string::npos) {
      peer.Write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n");
    } else {
      peer.Write("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf");
    }
    peer.Close();
  });
  EventLoop loop;
  HttpClient client(loop, *ParseUrl(server.Url()), {});
  for (const char* target : {"/long", "/head", "/chunk", "/half"}) {
    const auto answer = client.Fetch({.target = target});
    ASSERT_FALSE(answer) << target;
    EXPECT_EQ(answer.error().code, ErrorCode::kDataLoss) << target << ": " << answer.error().message;
  }
}

TEST(HttpClient, ItsEndCancelsWhatRunsWithoutAWord) {
  FakeServer server([](const FakeRequest&, FakePeer& peer) { peer.AwaitHangUp(); });
  EventLoop loop;
  bool called = false;
  {
    HttpClient client(loop, *ParseUrl(server.Url()), {});
    HttpHandlers handlers;
    handlers.done = [&](Status) { called = true; };
    client.Send({.target = "/"}, std::move(handlers));
    Timer timer(loop);
    timer.At(loop.Now() + 20 * kMs, [&] { loop.Stop(); });
    loop.Run();
  }
  loop.Run();
  EXPECT_FALSE(called);
}

}  // namespace
}  // namespace elasticmoe::cli
