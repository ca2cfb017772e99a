// A small HTTP/1.1 client on one thread: many requests at a time, bodies as they stream in, connections kept
// alive. No TLS, no redirects, no compression. Effects: sockets and timers. Not thread-safe: all of it
// belongs to the thread that runs the EventLoop, and every callback comes from EventLoop::Run (or Fetch,
// which calls it).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "base/error.h"
#include "base/ids.h"

namespace elasticmoe::cli {

struct Url {
  std::string host;  // an IPv6 address without its brackets
  std::uint16_t port = 80;
  std::string path;  // "" or "/prefix", without a slash at its end
};

// The base URL of a server: `[http://]host[:port][/prefix]`. A "/v1" at its end is dropped, since OpenAI's
// clients are given it and our paths begin with it. kInvalidArgument says what is wrong.
Expected<Url> ParseUrl(std::string_view text);
std::string ToString(const Url& url);

class EventLoop {
 public:
  EventLoop();
  ~EventLoop();
  EventLoop(const EventLoop&) = delete;

  TimeNs Now() const;  // monotonic
  void Run();          // until Stop, or until nothing is left that could happen
  void Stop();
  // Calls `fn` each time `fd` has something to read; `fn` reads it. Run ends by Stop alone from then on.
  // `fd` stays the caller's and must outlive the loop.
  void OnReadable(int fd, std::function<void()> fn);

 private:
  friend class Timer;
  friend class HttpClient;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// One shot; may be started again, also from its own callback. Its end cancels it.
class Timer {
 public:
  explicit Timer(EventLoop& loop);
  ~Timer();
  void At(TimeNs when, std::function<void()> fn);
  void Cancel();

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

struct HttpRequest {
  std::string method = "GET";
  std::string target;                  // "/v1/models"; the URL's prefix goes before it
  std::string body;                    // JSON, where there is one
  TimeNs timeout_ns = 30'000'000'000;  // for all of it, from the call of Send to the last byte
};

struct HttpHead {
  int status = 0;
  std::string content_type;
};

struct HttpHandlers {
  std::function<void(const HttpHead&)> head;
  // A piece of the body, and when it came.
  std::function<void(std::string_view, TimeNs)> data;
  // Once, the last of them, never from within Send or Cancel. kUnavailable: no connection. kDeadlineExceeded.
  // kCancelled. kDataLoss: the connection ended before the answer did, or the answer is no HTTP.
  std::function<void(Status)> done;
};

class HttpCall {
 public:
  virtual ~HttpCall() = default;
  // Closes the connection, which tells the server that nobody waits any more. Nothing happens after done.
  virtual void Cancel() = 0;
};

struct HttpAnswer {
  int status = 0;
  std::string body;
};

struct HttpClientOptions {
  std::string api_key;  // sent as a bearer token where not empty
  TimeNs connect_timeout_ns = 10'000'000'000;
};

class HttpClient {
 public:
  HttpClient(EventLoop& loop, Url url, HttpClientOptions options);
  ~HttpClient();  // cancels what runs; no handler is called any more

  const Url& Target() const;
  std::shared_ptr<HttpCall> Send(HttpRequest request, HttpHandlers handlers);
  // Runs the loop until the answer is there. Bodies beyond 64 MiB are kResourceExhausted.
  Expected<HttpAnswer> Fetch(HttpRequest request);

 private:
  struct State;
  EventLoop& loop_;
  std::shared_ptr<State> state_;
};

}  // namespace elasticmoe::cli
