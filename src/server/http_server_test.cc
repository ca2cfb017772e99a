#include "server/http_server.h"

#include <gtest/gtest.h>

#include <future>

#include "server/api_error.h"
#include "server/testing/test_client.h"

namespace elasticmoe::server {
namespace {

using std::chrono::milliseconds;

// A server with a few routes; "/held" hands its exchange to the test.
class Http : public testing::Test {
 protected:
  void StartServer(HttpOptions options = {}) {
    router_.Add({.method = "GET", .path = "/hello", .handler = Plain([](const HttpRequest& request) {
                                                      return HttpResponse{.content_type = "text/plain",
                                                                          .body = "hello " + request.query};
                                                    })});
    router_.Add({.method = "POST", .path = "/echo", .handler = Plain([](const HttpRequest& request) {
                                                      return HttpResponse{.content_type = "text/plain",
                                                                          .body = request.body};
                                                    })});
    router_.Add({.method = "GET", .path = "/below/*", .handler = Plain([](const HttpRequest& request) {
                                                        return HttpResponse{.content_type = "text/plain",
                                                                            .body = request.rest};
                                                      })});
    router_.Add({.method = "POST", .path = "/throw", .handler = [](const std::shared_ptr<Exchange>&) {
                   throw std::bad_alloc();
                 }});
    router_.Add(
        {.method = "POST", .path = "/held", .handler = [this](const std::shared_ptr<Exchange>& exchange) {
           held_.set_value(exchange);
         }});
    auto server = HttpServer::Listen(std::move(options), router_);
    ASSERT_TRUE(server) << server.error().message;
    server_ = *std::move(server);
    server_->Run();
  }
  TestClient Client(int receive_buffer = 0) { return TestClient(server_->Port(), receive_buffer); }

  // The exchange of the next request to /held.
  std::shared_ptr<Exchange> Held() {
    auto exchange = held_.get_future().get();
    held_ = {};
    return exchange;
  }
  // Runs `task` on the exchange's thread and waits for it.
  template <class Task>
  void On(const std::shared_ptr<Exchange>& exchange, Task task) {
    std::promise<void> done;
    exchange->Post([&] {
      task();
      done.set_value();
    });
    done.get_future().get();
  }
  std::future<void> Closed(const std::shared_ptr<Exchange>& exchange) {
    auto closed = std::make_shared<std::promise<void>>();
    On(exchange, [&] { exchange->OnClosed([closed] { closed->set_value(); }); });
    return closed->get_future();
  }

  Router router_;
  std::promise<std::shared_ptr<Exchange>> held_;
  std::unique_ptr<HttpServer> server_;
};

TEST_F(Http, KeepsTheConnectionAndAnswersInOrder) {
  StartServer();
  TestClient client = Client();
  for (int i = 0; i < 3; ++i) EXPECT_EQ(client.Call("GET", "/hello?a=1").body, "hello a=1");
  client.Send(TestClient::Text("GET", "/hello?1") + TestClient::Text("POST", "/echo", "two") +
              TestClient::Text("GET", "/hello?3"));
  EXPECT_EQ(client.Read().body, "hello 1");
  EXPECT_EQ(client.Read().body, "two");
  EXPECT_EQ(client.Read().body, "hello 3");
  const TestResponse last = client.Call("GET", "/hello", "", "Connection: close\r\n");
  EXPECT_EQ(last.headers.at("connection"), "close");
  EXPECT_TRUE(client.ReadToEnd());
}

TEST_F(Http, PipelinedRequestsWaitBehindARunningOne) {
  StartServer();
  TestClient client = Client();
  client.Send(TestClient::Text("POST", "/held", "x") + TestClient::Text("GET", "/hello?next"));
  auto exchange = Held();
  On(exchange, [&] { exchange->Respond({.body = "held"}); });
  EXPECT_EQ(client.Read().body, "held");
  EXPECT_EQ(client.Read().body, "hello next");
}

TEST_F(Http, AnswersHeadOptionsAndUnknownPaths) {
  StartServer();
  TestClient client = Client();
  const TestResponse head = client.Call("HEAD", "/hello?abc");
  EXPECT_EQ(head.status, 200);
  EXPECT_EQ(head.headers.at("content-length"), "9");
  const TestResponse options = client.Call("OPTIONS", "/echo");
  EXPECT_EQ(options.status, 204);
  EXPECT_EQ(options.headers.at("allow"), "POST, OPTIONS");
  EXPECT_EQ(options.headers.at("access-control-allow-origin"), "*");
  EXPECT_TRUE(options.headers.contains("access-control-allow-methods"));
  const TestResponse missing = client.Call("GET", "/nowhere");
  EXPECT_EQ(missing.status, 404);
  EXPECT_EQ(missing.Parsed()["error"]["type"], "invalid_request_error");
  const TestResponse wrong = client.Call("GET", "/echo");
  EXPECT_EQ(wrong.status, 405);
  EXPECT_EQ(wrong.headers.at("allow"), "POST, OPTIONS");
  EXPECT_EQ(client.Call("GET", "/below/a%2Fb%20c").body, "a/b c");
  EXPECT_EQ(client.Call("GET", "/below/").status, 404);
}

TEST_F(Http, EchoesOrMakesARequestId) {
  StartServer();
  TestClient client = Client();
  EXPECT_EQ(client.Call("GET", "/hello", "", "X-Request-Id: abc-1\r\n").headers.at("x-request-id"), "abc-1");
  const std::string made =
      client.Call("GET", "/hello", "", "X-Request-Id: a b\r\n").headers.at("x-request-id");
  EXPECT_EQ(made.size(), 16U);
  EXPECT_NE(client.Call("GET", "/hello").headers.at("x-request-id"), made);
}

TEST_F(Http, TakesChunkedBodiesAndExpect100) {
  StartServer();
  TestClient client = Client();
  client.Send(
      "POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: "
      "chunked\r\n\r\n3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n");
  EXPECT_EQ(client.Read().body, "abcdefg");
  client.Send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n");
  EXPECT_EQ(client.Read().status, 100);
  client.Send("ok");
  EXPECT_EQ(client.Read().body, "ok");
}

TEST_F(Http, RefusesLargeBodiesAndHeaders) {
  StartServer({.max_header_bytes = 1024, .max_body_bytes = 1000});
  {
    TestClient client = Client();
    EXPECT_EQ(client.Call("POST", "/echo", std::string(1000, 'x')).body.size(), 1000U);
    const TestResponse response = client.Call("POST", "/echo", std::string(1001, 'x'));
    EXPECT_EQ(response.status, 413);
    EXPECT_EQ(response.Parsed()["error"]["code"], "body_too_large");
    EXPECT_TRUE(client.ReadToEnd());
  }
  {
    TestClient client = Client();
    client.Send("POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n");
    for (int i = 0; i < 20; ++i) client.Send("64\r\n" + std::string(100, 'x') + "\r\n");
    EXPECT_EQ(client.Read().status, 413);
  }
  {
    TestClient client = Client();
    EXPECT_EQ(client.Call("GET", "/hello", "", "X-Long: " + std::string(2000, 'x') + "\r\n").status, 431);
  }
  TestClient client = Client();
  EXPECT_EQ(client.Call("GET", "/hello").status, 200);
}

TEST_F(Http, SurvivesBytesThatAreNoHttp) {
  StartServer();
  for (std::string_view bytes :
       {"\x16\x03\x01\x02 tls hello \r\n\r\n", "GET\r\n\r\n", "GET / HTTP/9.9\r\n\r\n",
        "POST /echo HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        "POST /echo HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        "POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"}) {
    TestClient client = Client();
    client.Send(bytes);
    const TestResponse response = client.Read();
    EXPECT_EQ(response.status, 400) << bytes;
    EXPECT_TRUE(client.ReadToEnd());
  }
  {
    TestClient client = Client();
    client.Send("GET /hel");  // and gone
  }
  EXPECT_EQ(Client().Call("GET", "/hello").status, 200);
}

TEST_F(Http, AHandlerThatThrowsIsA500) {
  StartServer();
  TestClient client = Client();
  EXPECT_EQ(client.Call("POST", "/throw").status, 500);
  EXPECT_EQ(client.Call("GET", "/hello").status, 200);
}

TEST_F(Http, StreamsPieces) {
  StartServer();
  TestClient client = Client();
  client.Send(TestClient::Text("POST", "/held", "x"));
  auto exchange = Held();
  On(exchange, [&] { exchange->Begin({.content_type = "text/event-stream"}); });
  On(exchange, [&] {
    exchange->Write("data: 1\n\n");
    exchange->Write("data: 2\n\n");
  });
  EXPECT_TRUE(client.ReadUntil("data: 2\n\n"));
  On(exchange, [&] {
    exchange->Write("data: 3\n\n");
    exchange->End();
  });
  EXPECT_TRUE(client.ReadUntil("data: 3\n\n"));
  EXPECT_TRUE(client.ReadUntil("0\r\n\r\n"));
  EXPECT_EQ(client.Call("GET", "/hello").status, 200);
}

TEST_F(Http, StreamsToHttp10ByClosing) {
  StartServer();
  TestClient client = Client();
  client.Send("POST /held HTTP/1.0\r\nContent-Length: 0\r\n\r\n");
  auto exchange = Held();
  On(exchange, [&] {
    exchange->Begin({});
    exchange->Write("abc");
    exchange->End();
  });
  const TestResponse response = client.Read();
  EXPECT_EQ(response.body, "abc");
  EXPECT_FALSE(response.headers.contains("transfer-encoding"));
}

TEST_F(Http, SeesThatTheClientHungUp) {
  StartServer();
  for (bool streaming : {false, true}) {
    TestClient client = Client();
    client.Send(TestClient::Text("POST", "/held", "x"));
    auto exchange = Held();
    auto closed = Closed(exchange);
    if (streaming) {
      On(exchange, [&] { exchange->Begin({}); });
      EXPECT_EQ(client.ReadBytes(12), "HTTP/1.1 200");
    }
    client.Close();
    closed.get();
    On(exchange, [&] {
      EXPECT_TRUE(exchange->Closed());
      exchange->Respond({});  // no-op
    });
  }
}

TEST_F(Http, DisconnectsAClientThatNeverReads) {
  StartServer({.max_stream_buffer_bytes = 64 << 10});
  TestClient client = Client(4096);
  client.Send(TestClient::Text("POST", "/held", "x"));
  auto exchange = Held();
  auto closed = Closed(exchange);
  On(exchange, [&] { exchange->Begin({}); });
  const std::string piece(16 << 10, 'x');
  std::size_t sent = 0;
  bool open = true;
  while (open) {
    On(exchange, [&] {
      exchange->Write(piece);
      open = !exchange->Closed();
    });
    sent += piece.size();
    ASSERT_LT(sent, std::size_t{64} << 20);
  }
  closed.get();
}

TEST_F(Http, DisconnectsAClientThatReadsTooSlowly) {
  StartServer({.max_stream_buffer_bytes = 64 << 20, .write_timeout = milliseconds(50)});
  TestClient client = Client(4096);
  client.Send(TestClient::Text("POST", "/held", "x"));
  auto exchange = Held();
  auto closed = Closed(exchange);
  On(exchange, [&] {
    exchange->Begin({});
    exchange->Write(std::string(32 << 20, 'x'));
  });
  closed.get();
}

TEST_F(Http, TimesOutIdleAndSlowConnections) {
  StartServer({.idle_timeout = milliseconds(40),
               .header_timeout = milliseconds(40),
               .body_timeout = milliseconds(40)});
  TestClient idle = Client(), header = Client(), body = Client();
  header.Send("GET /hello HTTP/1.1\r\nHo");
  body.Send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc");
  EXPECT_EQ(header.Read().status, 408);
  EXPECT_EQ(body.Read().status, 408);
  EXPECT_EQ(idle.Read().status, 0);  // closed without a word
}

TEST_F(Http, RefusesConnectionsOverTheLimit) {
  StartServer({.max_connections = 4});
  std::vector<TestClient> clients;
  for (int i = 0; i < 4; ++i) {
    clients.push_back(Client());
    EXPECT_EQ(clients.back().Call("GET", "/hello").status, 200);
  }
  for (int i = 0; i < 3; ++i) {
    TestClient over = Client();
    const TestResponse refused = over.Call("GET", "/hello");
    EXPECT_EQ(refused.status, 503);
    EXPECT_EQ(refused.headers.at("retry-after"), "1");
    EXPECT_EQ(refused.Parsed()["error"]["code"], "too_many_connections");
  }
  for (auto& client : clients) EXPECT_EQ(client.Call("GET", "/hello").status, 200);
  clients.pop_back();
  int status = 503;  // until the server has seen the end of the connection
  while (status == 503) status = Client().Call("GET", "/hello").status;
  EXPECT_EQ(status, 200);
}

TEST_F(Http, FinishesRunningRequestsWhenItStops) {
  StartServer();
  TestClient idle = Client(), running = Client(), later = Client();
  EXPECT_EQ(idle.Call("GET", "/hello").status, 200);
  later.Send(TestClient::Text("POST", "/held", "x"));
  auto first = Held();
  running.Send(TestClient::Text("POST", "/held", "x") + TestClient::Text("GET", "/hello"));
  auto second = Held();
  server_->BeginStop();
  EXPECT_EQ(idle.Read().status, 0);
  On(second, [&] { second->Respond({.body = "done"}); });
  const TestResponse done = running.Read();
  EXPECT_EQ(done.body, "done");
  EXPECT_EQ(done.headers.at("connection"), "close");
  EXPECT_FALSE(TestClient(server_->Port()).Connected());
  On(first, [&] { first->Begin({}); });
  On(first, [&] {
    first->Write("rest");
    first->End();
  });
  EXPECT_EQ(later.Read().body, "rest");
  server_->Wait();
}

TEST_F(Http, StopNowClosesRunningRequests) {
  StartServer();
  TestClient client = Client();
  client.Send(TestClient::Text("POST", "/held", "x"));
  auto exchange = Held();
  auto closed = Closed(exchange);
  server_->BeginStop();
  server_->StopNow();
  closed.get();
  EXPECT_TRUE(client.ReadToEnd());
  server_->Wait();
  exchange->Post([] { FAIL() << "the thread has ended"; });
}

TEST_F(Http, WorksWithSeveralThreads) {
  StartServer({.threads = 3});
  std::vector<TestClient> clients;
  for (int i = 0; i < 12; ++i) clients.push_back(Client());
  for (auto& client : clients) client.Send(TestClient::Text("POST", "/echo", "abc"));
  for (auto& client : clients) EXPECT_EQ(client.Read().body, "abc");
}

TEST_F(Http, SaysThatTheAddressIsInUse) {
  StartServer();
  auto second = HttpServer::Listen({.port = server_->Port()}, router_);
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code, ErrorCode::kUnavailable);
  EXPECT_NE(second.error().message.find("--port"), std::string::npos);
  auto nowhere = HttpServer::Listen({.host = "no such host"}, router_);
  ASSERT_FALSE(nowhere);
  EXPECT_EQ(nowhere.error().code, ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace elasticmoe::server
