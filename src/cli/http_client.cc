#include "cli/http_client.h"

#include <sys/socket.h>

#include <algorithm>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/connect.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http/parser.hpp>
#include <cerrno>
#include <chrono>
#include <list>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "base/clock.h"

namespace elasticmoe::cli {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using asio::ip::tcp;
using ErrorValue = boost::system::error_code;
using Clock = std::chrono::steady_clock;

constexpr std::size_t kReadBytes = 16 << 10;
constexpr std::size_t kHeadLimitBytes = 64 << 10;
constexpr std::size_t kFetchLimitBytes = 64 << 20;

Clock::time_point Point(TimeNs when) {
  return Clock::time_point(std::chrono::nanoseconds(when));
}

// Body bytes gathered until they are handed on; nothing is reserved on the word of a header.
struct PieceBody {
  using value_type = std::string;
  class reader {
   public:
    template <bool is_request, class Fields>
    reader(http::header<is_request, Fields>&, value_type& body) : body_(body) {}
    void init(const boost::optional<std::uint64_t>&, ErrorValue& error) { error = {}; }
    template <class Buffers>
    std::size_t put(const Buffers& buffers, ErrorValue& error) {
      error = {};
      std::size_t total = 0;
      for (auto it = asio::buffer_sequence_begin(buffers); it != asio::buffer_sequence_end(buffers); ++it) {
        const asio::const_buffer piece(*it);
        body_.append(static_cast<const char*>(piece.data()), piece.size());
        total += piece.size();
      }
      return total;
    }
    void finish(ErrorValue& error) { error = {}; }

   private:
    value_type& body_;
  };
};

}  // namespace

struct EventLoop::Impl {
  asio::io_context context{1};
  std::list<asio::posix::stream_descriptor> watched;

  void Wait(asio::posix::stream_descriptor& descriptor, std::function<void()> fn) {
    descriptor.async_wait(asio::posix::stream_descriptor::wait_read,
                          [this, &descriptor, fn = std::move(fn)](const ErrorValue& error) {
                            if (error) return;
                            fn();
                            Wait(descriptor, fn);
                          });
  }
  ~Impl() {
    for (auto& descriptor : watched) descriptor.release();
  }
};

EventLoop::EventLoop() : impl_(std::make_unique<Impl>()) {}
EventLoop::~EventLoop() = default;
TimeNs EventLoop::Now() const {
  return elasticmoe::Now();
}
void EventLoop::Run() {
  impl_->context.restart();
  impl_->context.run();
}
void EventLoop::Stop() {
  impl_->context.stop();
}

void EventLoop::OnReadable(int fd, std::function<void()> fn) {
  impl_->watched.emplace_back(impl_->context, fd);
  impl_->Wait(impl_->watched.back(), std::move(fn));
}

struct Timer::Impl {
  explicit Impl(asio::io_context& context) : timer(context) {}
  asio::steady_timer timer;
  std::uint64_t started = 0;  // tells a callback that is already on its way that it was cancelled
};

Timer::Timer(EventLoop& loop) : impl_(std::make_shared<Impl>(loop.impl_->context)) {}
Timer::~Timer() {
  Cancel();
}

void Timer::At(TimeNs when, std::function<void()> fn) {
  impl_->timer.expires_at(Point(when));
  impl_->timer.async_wait([weak = std::weak_ptr<Impl>(impl_), fn = std::move(fn),
                           start = ++impl_->started](const ErrorValue& error) {
    const auto impl = weak.lock();
    if (!error && impl && impl->started == start) fn();
  });
}

void Timer::Cancel() {
  ++impl_->started;
  impl_->timer.cancel();
}

namespace {

class Call;

// What the calls of a client share; it outlives the client while they wind up.
struct Shared {
  Shared(asio::io_context& io, Url u, HttpClientOptions o)
      : context(io), url(std::move(u)), options(std::move(o)) {
    const bool ipv6 = url.host.find(':') != std::string::npos;
    fixed_headers = fmt::format("Host: {}{}{}:{}\r\nUser-Agent: elasticmoe\r\nAccept: */*\r\n",
                                ipv6 ? "[" : "", url.host, ipv6 ? "]" : "", url.port);
    if (!options.api_key.empty())
      fixed_headers += fmt::format("Authorization: Bearer {}\r\n", options.api_key);
  }

  asio::io_context& context;
  Url url;
  HttpClientOptions options;
  std::string fixed_headers;
  std::vector<tcp::endpoint> endpoints;  // resolved once
  std::vector<tcp::socket> idle;
  std::set<Call*> running;
};

class Call final : public HttpCall, public std::enable_shared_from_this<Call> {
 public:
  Call(std::shared_ptr<Shared> shared, HttpRequest request, HttpHandlers handlers)
      : shared_(std::move(shared)),
        handlers_(std::move(handlers)),
        deadline_ns_(Now() + request.timeout_ns),
        timer_(shared_->context),
        resolver_(shared_->context) {
    text_ = fmt::format("{} {}{} HTTP/1.1\r\n{}", request.method, shared_->url.path, request.target,
                        shared_->fixed_headers);
    if (!request.body.empty() || request.method == "POST")
      text_ += fmt::format("Content-Type: application/json\r\nContent-Length: {}\r\n", request.body.size());
    text_ += "\r\n";
    text_ += request.body;
    shared_->running.insert(this);
  }

  void Cancel() override { Abort(ErrorCode::kCancelled); }

  // The client is gone: end quietly.
  void Forget() {
    handlers_ = {};
    Abort(ErrorCode::kCancelled);
  }

  static asio::awaitable<void> Run(std::shared_ptr<Call> self) {
    Status status = co_await self->Exchange();
    self->ended_ = true;
    self->timer_.cancel();
    self->shared_->running.erase(self.get());
    const HttpHandlers handlers = std::exchange(self->handlers_, {});
    self->socket_.reset();
    if (handlers.done) handlers.done(std::move(status));
  }

 private:
  asio::awaitable<Status> Exchange() {
    if (aborted_) co_return Why("", {});
    Arm(deadline_ns_);
    if (!TakeKept())
      if (Status connected = co_await Connect(); !connected) co_return connected;
    if (aborted_) co_return Why("", {});
    co_return co_await Transfer();
  }

  // A kept connection that the server has not closed meanwhile. A request is never sent twice: it might count
  // twice.
  bool TakeKept() {
    while (!shared_->idle.empty()) {
      socket_.emplace(std::move(shared_->idle.back()));
      shared_->idle.pop_back();
      char byte;
      if (::recv(socket_->native_handle(), &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && errno == EAGAIN)
        return true;
    }
    return false;
  }

  asio::awaitable<Status> Connect() {
    Arm(std::min(deadline_ns_, Now() + shared_->options.connect_timeout_ns));
    const std::string doing = fmt::format("connecting to {}", ToString(shared_->url));
    ErrorValue error;
    if (shared_->endpoints.empty()) {
      const auto address = asio::ip::make_address(shared_->url.host, error);
      if (!error) {
        shared_->endpoints.emplace_back(address, shared_->url.port);
      } else {
        const auto found =
            co_await resolver_.async_resolve(shared_->url.host, std::to_string(shared_->url.port),
                                             asio::redirect_error(asio::use_awaitable, error));
        if (error || aborted_) co_return Why(doing, error);
        for (const auto& entry : found) shared_->endpoints.push_back(entry.endpoint());
      }
    }
    const std::vector<tcp::endpoint> endpoints = shared_->endpoints;
    for (const tcp::endpoint& endpoint : endpoints) {
      socket_.emplace(shared_->context);
      co_await socket_->async_connect(endpoint, asio::redirect_error(asio::use_awaitable, error));
      if (!error || aborted_) break;
    }
    if (error || aborted_) co_return Why(doing, error);
    socket_->set_option(tcp::no_delay(true), error);
    Arm(deadline_ns_);
    co_return Status();
  }

  asio::awaitable<Status> Transfer() {
    ErrorValue error;
    co_await asio::async_write(*socket_, asio::buffer(text_),
                               asio::redirect_error(asio::use_awaitable, error));
    if (aborted_) co_return Why("", {});
    // A server may answer and close without reading the body (413, 429): its answer counts, not our write's
    // error.
    http::response_parser<PieceBody> parser;
    parser.eager(true);
    parser.body_limit(boost::none);
    parser.header_limit(kHeadLimitBytes);
    boost::beast::flat_buffer buffer;
    bool answered = false, told_head = false;
    while (!parser.is_done()) {
      const std::size_t n = co_await socket_->async_read_some(
          buffer.prepare(kReadBytes), asio::redirect_error(asio::use_awaitable, error));
      const TimeNs at = Now();
      if (aborted_) co_return Why("", {});
      if (error == asio::error::eof && answered) {
        parser.put_eof(error);
        if (!error) break;
      }
      if (error) {
        if (answered)
          co_return Fail(ErrorCode::kDataLoss,
                         "reading the answer: the connection ended before it was whole ({})",
                         error.message());
        co_return Fail(ErrorCode::kDataLoss, "waiting for an answer of {}: the connection ended ({})",
                       ToString(shared_->url), error.message());
      }
      answered = true;
      buffer.commit(n);
      while (buffer.size() > 0 && !parser.is_done()) {
        const std::size_t used = parser.put(buffer.data(), error);
        buffer.consume(used);
        if (error == http::error::need_more) {
          error = {};
          break;
        }
        if (error) {
          co_return Fail(ErrorCode::kDataLoss, "reading the answer: {} is no HTTP/1.1 answer ({})",
                         ToString(shared_->url), error.message());
        }
      }
      HandOn(parser, told_head, at);
      if (aborted_) co_return Why("", {});
    }
    HandOn(parser, told_head, Now());
    if (parser.keep_alive() && buffer.size() == 0) shared_->idle.push_back(*std::move(socket_));
    co_return Status();
  }

  void HandOn(http::response_parser<PieceBody>& parser, bool& told_head, TimeNs at) {
    if (!parser.is_header_done()) return;
    if (!std::exchange(told_head, true) && handlers_.head)
      handlers_.head({.status = static_cast<int>(parser.get().result_int()),
                      .content_type = std::string(parser.get()[http::field::content_type])});
    std::string& piece = parser.get().body();
    if (!piece.empty() && handlers_.data) handlers_.data(piece, at);
    piece.clear();
  }

  void Arm(TimeNs when) {
    timer_.expires_at(Point(when));
    timer_.async_wait([weak = weak_from_this()](const ErrorValue& error) {
      const auto self = weak.lock();
      // A wait that had already ended when the time was moved: not its time any more.
      if (!error && self && self->timer_.expiry() <= Clock::now()) self->Abort(ErrorCode::kDeadlineExceeded);
    });
  }

  void Abort(ErrorCode why) {
    if (aborted_ || ended_) return;
    aborted_ = why;
    ErrorValue ignored;
    if (socket_) socket_->close(ignored);
    resolver_.cancel();
    timer_.cancel();
  }

  Status Why(std::string_view doing, const ErrorValue& error) const {
    if (aborted_ == ErrorCode::kCancelled) return Fail(ErrorCode::kCancelled, "cancelled");
    const std::string_view what = doing.empty() ? std::string_view("waiting for the answer") : doing;
    if (aborted_) return Fail(ErrorCode::kDeadlineExceeded, "{}: timed out", what);
    return Fail(ErrorCode::kUnavailable, "{}: {}", what, error.message());
  }

  std::shared_ptr<Shared> shared_;
  HttpHandlers handlers_;
  TimeNs deadline_ns_;
  std::string text_;
  asio::steady_timer timer_;
  tcp::resolver resolver_;
  std::optional<tcp::socket> socket_;
  std::optional<ErrorCode> aborted_;
  bool ended_ = false;
};

}  // namespace

struct HttpClient::State : Shared {
  using Shared::Shared;
};

HttpClient::HttpClient(EventLoop& loop, Url url, HttpClientOptions options)
    : loop_(loop), state_(std::make_shared<State>(loop.impl_->context, std::move(url), std::move(options))) {}

HttpClient::~HttpClient() {
  const std::set<Call*> running = state_->running;
  for (Call* call : running) call->Forget();
  state_->idle.clear();
}

const Url& HttpClient::Target() const {
  return state_->url;
}

std::shared_ptr<HttpCall> HttpClient::Send(HttpRequest request, HttpHandlers handlers) {
  auto call = std::make_shared<Call>(state_, std::move(request), std::move(handlers));
  asio::co_spawn(state_->context, Call::Run(call), asio::detached);
  return call;
}

Expected<HttpAnswer> HttpClient::Fetch(HttpRequest request) {
  HttpAnswer answer;
  std::optional<Status> ended;
  bool too_large = false;
  std::shared_ptr<HttpCall> call;
  HttpHandlers handlers;
  handlers.head = [&](const HttpHead& head) { answer.status = head.status; };
  handlers.data = [&](std::string_view piece, TimeNs) {
    too_large = too_large || answer.body.size() + piece.size() > kFetchLimitBytes;
    if (too_large)
      call->Cancel();
    else
      answer.body += piece;
  };
  handlers.done = [&](Status status) {
    ended = std::move(status);
    loop_.Stop();
  };
  call = Send(std::move(request), std::move(handlers));
  while (!ended) loop_.Run();
  if (too_large)
    return Fail(ErrorCode::kResourceExhausted, "reading the answer: larger than {} bytes", kFetchLimitBytes);
  if (!*ended) return tl::unexpected<Error>(std::move(ended->error()));
  return answer;
}

}  // namespace elasticmoe::cli
