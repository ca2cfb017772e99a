#include "server/http_session.h"

#include <array>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http.hpp>

#include "base/log.h"
#include "base/rng.h"
#include "server/api_error.h"
#include "server/http_exchange.h"

namespace elasticmoe::server {
namespace {

namespace http = boost::beast::http;
using asio::ip::tcp;
using boost::system::error_code;
using SteadyClock = std::chrono::steady_clock;
constexpr auto kTuple = asio::as_tuple(asio::use_awaitable);
constexpr auto kNever = SteadyClock::time_point::max();

constexpr auto kLinger = std::chrono::milliseconds(1000);
constexpr std::size_t kMaxLingerBytes = std::size_t{64} << 20;
// What a client may send ahead (pipelined) while its answer is being made.
constexpr std::size_t kMaxAheadBytes = 64 << 10;

bool IsPrintableId(std::string_view id) {
  if (id.empty() || id.size() > 128) return false;
  for (char c : id)
    if (c <= ' ' || c > '~') return false;
  return true;
}

class SocketSession final : public HttpSession, public std::enable_shared_from_this<SocketSession> {
 public:
  SocketSession(std::shared_ptr<HttpLoop> loop, HttpShared& shared, tcp::socket socket)
      : loop_(std::move(loop)),
        shared_(shared),
        socket_(std::move(socket)),
        signal_(loop_->context),
        buffer_(shared.options.max_header_bytes + 2 * kMaxAheadBytes) {
    loop_->sessions.insert(this);
    ++shared_.connections;
  }

  ~SocketSession() override {
    loop_->sessions.erase(this);
    --shared_.connections;
    if (loop_->sessions.empty() && shared_.stopping) loop_->sweep.cancel();
  }

  SocketSession(const SocketSession&) = delete;
  SocketSession& operator=(const SocketSession&) = delete;

  asio::awaitable<void> Run(std::shared_ptr<SocketSession> self) {
    error_code ignored;
    socket_.set_option(tcp::no_delay(true), ignored);
    socket_.set_option(asio::socket_base::keep_alive(true), ignored);
    for (;;) {
      const bool again = co_await ServeOne();
      if (!again) break;
    }
    if (linger_) co_await Linger();
    socket_.close(ignored);
    self.reset();
  }

  // Over the limit of connections: the answer is sent, the rest is read and thrown away.
  asio::awaitable<void> Refuse(std::shared_ptr<SocketSession> self) {
    // A named value: g++ 12 destroys a braced temporary of a co_await expression twice.
    const ApiError full{
        .status = 503,
        .message = fmt::format("too many connections (limit={})", shared_.options.max_connections),
        .code = "too_many_connections",
        .retry_after_s = 1};
    co_await SendSimple(full);
    co_await Linger();
    error_code ignored;
    socket_.close(ignored);
    --shared_.lingering;
    self.reset();
  }

  void CheckDeadline(SteadyClock::time_point now) override {
    if (now < deadline_) return;
    expired_ = true;
    deadline_ = kNever;
    error_code ignored;
    socket_.cancel(ignored);
  }

  void BeginStop() override {
    error_code ignored;
    if (idle_) socket_.cancel(ignored);
  }

  void StopNow() override {
    linger_ = false;
    if (exchange_ != nullptr) exchange_->Close();
    error_code ignored;
    socket_.close(ignored);
  }

 private:
  void SetDeadline(std::chrono::milliseconds timeout) { deadline_ = SteadyClock::now() + timeout; }

  // One request and its answer; false when the connection is to be closed.
  asio::awaitable<bool> ServeOne() {
    const HttpOptions& options = shared_.options;
    if (buffer_.size() == 0) {
      if (shared_.stopping) co_return false;
      if (buffer_.capacity() > (16 << 10)) buffer_.shrink_to_fit();
      idle_ = true;
      SetDeadline(options.idle_timeout);
      auto [ec, n] = co_await socket_.async_read_some(buffer_.prepare(2048), kTuple);
      idle_ = false;
      if (ec) co_return false;
      buffer_.commit(n);
    }

    http::request_parser<http::string_body> parser;
    parser.header_limit(static_cast<std::uint32_t>(options.max_header_bytes));
    parser.body_limit(options.max_body_bytes);
    SetDeadline(options.header_timeout);
    auto [header_ec, header_n] = co_await http::async_read_header(socket_, buffer_, parser, kTuple);
    if (header_ec) {
      co_await SendParseError(header_ec, "header");
      co_return false;
    }
    const TimeNs arrival_ns = SteadyClock::now().time_since_epoch().count();
    if (!parser.is_done()) {
      SetDeadline(options.body_timeout);
      if (boost::beast::iequals(parser.get()[http::field::expect], "100-continue")) {
        static constexpr std::string_view kContinue = "HTTP/1.1 100 Continue\r\n\r\n";
        auto [ec, n] = co_await asio::async_write(socket_, asio::buffer(kContinue), kTuple);
        if (ec) co_return false;
      }
      auto [ec, n] = co_await http::async_read(socket_, buffer_, parser, kTuple);
      if (ec) {
        co_await SendParseError(ec, "body");
        co_return false;
      }
    }
    deadline_ = kNever;

    const bool keep_alive = parser.keep_alive();
    const bool chunked = parser.get().version() >= 11;
    auto exchange = std::make_shared<SocketExchange>(loop_, shared_, signal_, socket_,
                                                     ToRequest(parser.release(), arrival_ns));
    exchange_ = exchange.get();
    const std::shared_ptr<const Route> route = Dispatch(exchange);
    const bool again = co_await Deliver(*exchange, route.get(), keep_alive, chunked);
    exchange_ = nullptr;
    exchange->Detach();
    co_return again;
  }

  HttpRequest ToRequest(http::request<http::string_body>&& message, TimeNs arrival_ns) {
    HttpRequest request;
    request.arrival_ns = arrival_ns;
    request.method = std::string(message.method_string());
    std::string_view target(message.target().data(), message.target().size());
    if (!target.starts_with('/')) {  // absolute form: what a proxy gets
      const auto scheme = target.find("://");
      const auto slash = scheme == target.npos ? target.npos : target.find('/', scheme + 3);
      if (slash != target.npos) target.remove_prefix(slash);
    }
    const auto mark = target.find('?');
    request.path = PercentDecode(target.substr(0, mark));
    if (mark != target.npos) request.query = std::string(target.substr(mark + 1));
    for (const auto& field : message) {
      std::string name(field.name_string());
      for (char& c : name)
        if (c >= 'A' && c <= 'Z') c += 'a' - 'A';
      request.headers.emplace_back(std::move(name), std::string(field.value()));
    }
    request.id = std::string(request.Header("x-request-id"));
    if (!IsPrintableId(request.id))
      request.id = fmt::format("{:016x}", Mix64(shared_.id_seed + ++shared_.request_count));
    request.body = std::move(message.body());
    return request;
  }

  std::shared_ptr<const Route> Dispatch(const std::shared_ptr<SocketExchange>& exchange) {
    if (shared_.stopping) {
      exchange->Respond(ErrorResponse(
          {.status = 503, .message = "the server is stopping", .code = "stopping", .retry_after_s = 1}));
      return nullptr;
    }
    auto match = shared_.router.Find(exchange->Request());
    if (match.route == nullptr) {
      exchange->Respond(std::move(match.refusal));
      return nullptr;
    }
    const_cast<HttpRequest&>(exchange->Request()).rest = std::move(match.rest);
    try {
      match.route->handler(exchange);
    } catch (const std::exception& e) {  // bad_alloc, or a library's: one request fails, not the server
      LogError("answering {} {}: {}", exchange->Request().method, exchange->Request().path, e.what());
      if (!exchange->begun)
        exchange->Respond(
            ErrorResponse({.status = 500, .message = "internal error", .code = "internal_error"}));
      else
        exchange->Close();
    }
    return match.route;
  }

  std::string HeadText(const HttpResponse& response, const HttpRequest& request, bool keep_alive,
                       std::string_view framing) {
    std::string text;
    text.reserve(512);
    auto line = [&text](std::string_view name, std::string_view value) {
      text.append(name).append(": ").append(value).append("\r\n");
    };
    text = fmt::format("HTTP/1.1 {} {}\r\n", response.status, StatusPhrase(response.status));
    line("Date", loop_->Date());
    line("Server", "elasticmoe");
    if (!response.content_type.empty()) line("Content-Type", response.content_type);
    if (!request.id.empty()) line("X-Request-Id", request.id);
    if (const std::string& origin = shared_.options.cors_origin; !origin.empty()) {
      line("Access-Control-Allow-Origin", origin);
      line("Access-Control-Expose-Headers", "X-Request-Id, Retry-After");
      if (request.method == "OPTIONS") {
        line("Access-Control-Allow-Methods", "GET, POST, HEAD, OPTIONS, DELETE, PUT");
        line("Access-Control-Allow-Headers", "*, Authorization");
        line("Access-Control-Max-Age", "600");
      }
    }
    for (const auto& [name, value] : response.headers) line(name, value);
    text += framing;
    line("Connection", keep_alive ? "keep-alive" : "close");
    text += "\r\n";
    return text;
  }

  // Writes the answer as it comes, and watches for the client's end meanwhile.
  asio::awaitable<bool> Deliver(SocketExchange& exchange, const Route* route, bool keep_alive, bool chunked) {
    bool head_sent = false;
    bool watched = false;
    const bool head_only = exchange.Request().method == "HEAD";
    while (!exchange.Closed()) {
      const bool ready = exchange.begun && (!head_sent || exchange.ended || !exchange.out.empty());
      if (!ready) {
        if (!std::exchange(watched, true)) {
          watching_ = true;
          stop_watching_ = false;
          asio::co_spawn(loop_->context, Watch(shared_from_this()), asio::detached);
        }
        signal_.expires_at(kNever);
        co_await signal_.async_wait(kTuple);
        continue;
      }
      std::string head, frame, body, tail;
      if (!head_sent) {
        head_sent = true;
        keep_alive = keep_alive && !shared_.stopping && (chunked || !exchange.streaming);
        std::string framing;
        if (exchange.streaming) {
          if (chunked) framing = "Transfer-Encoding: chunked\r\n";
        } else if (exchange.head.status != 204) {
          framing = fmt::format("Content-Length: {}\r\n", exchange.head.body.size());
        }
        head = HeadText(exchange.head, exchange.Request(), keep_alive, framing);
        if (!exchange.streaming && !head_only) body = std::move(exchange.head.body);
        if (shared_.options.on_response)
          shared_.options.on_response(exchange.Request().method, route ? std::string_view(route->path) : "",
                                      exchange.head.status);
      }
      const bool last = exchange.ended;
      if (exchange.streaming) {
        body = std::exchange(exchange.out, {});
        if (chunked && !body.empty()) {
          frame = fmt::format("{:x}\r\n", body.size());
          tail = "\r\n";
        }
        if (chunked && last) tail += "0\r\n\r\n";
      }
      const std::array<asio::const_buffer, 4> pieces{asio::buffer(head), asio::buffer(frame),
                                                     asio::buffer(body), asio::buffer(tail)};
      SetDeadline(shared_.options.write_timeout);
      auto [ec, n] = co_await asio::async_write(socket_, pieces, kTuple);
      deadline_ = kNever;
      if (ec) exchange.Close();
      if (last) break;
    }
    if (watching_) {
      stop_watching_ = true;
      error_code ignored;
      socket_.cancel(ignored);
      while (watching_) {
        signal_.expires_at(kNever);
        co_await signal_.async_wait(kTuple);
      }
    }
    if (exchange.Closed()) co_return false;
    linger_ = !keep_alive;
    co_return keep_alive;
  }

  // Reads ahead while an answer is being made: the only way to see that the client is gone.
  asio::awaitable<void> Watch(std::shared_ptr<SocketSession> self) {
    while (!stop_watching_ && buffer_.size() < kMaxAheadBytes) {
      auto [ec, n] = co_await socket_.async_read_some(buffer_.prepare(4096), kTuple);
      buffer_.commit(n);
      if (ec) {
        if (!stop_watching_ && exchange_ != nullptr) exchange_->Close();
        break;
      }
    }
    watching_ = false;
    signal_.cancel();
    self.reset();
  }

  asio::awaitable<void> SendParseError(error_code ec, std::string_view part) {
    const HttpOptions& options = shared_.options;
    ApiError error;
    if (expired_) {
      error = {.status = 408,
               .message = fmt::format("the request's {} did not arrive in time", part),
               .code = "timeout"};
    } else if (ec == http::error::body_limit) {
      error = {.status = 413,
               .message = fmt::format("the body is larger than {} bytes", options.max_body_bytes),
               .code = "body_too_large"};
    } else if (ec == http::error::header_limit || ec == http::error::buffer_overflow) {
      error = {.status = 431,
               .message = fmt::format("the header is larger than {} bytes", options.max_header_bytes),
               .code = "header_too_large"};
    } else if (ec == http::error::end_of_stream || ec == http::error::partial_message ||
               ec.category() != http::make_error_code(http::error::bad_method).category()) {
      co_return;  // the client is gone
    } else {
      error = {
          .status = 400, .message = fmt::format("not HTTP/1.1: {}", ec.message()), .code = "bad_request"};
    }
    co_await SendSimple(error);
    linger_ = true;
  }

  asio::awaitable<void> SendSimple(ApiError error) {
    const HttpResponse response = ErrorResponse(error);
    if (shared_.options.on_response) shared_.options.on_response("", "", response.status);
    const std::string text = HeadText(response, HttpRequest{}, false,
                                      fmt::format("Content-Length: {}\r\n", response.body.size())) +
                             response.body;
    SetDeadline(shared_.options.write_timeout);
    co_await asio::async_write(socket_, asio::buffer(text), kTuple);  // lost: the connection ends anyway
    deadline_ = kNever;
  }

  // Half-closes and reads what still comes for a moment: closing at once would reset the connection and could
  // take the answer from the client.
  asio::awaitable<void> Linger() {
    error_code ec;
    socket_.shutdown(tcp::socket::shutdown_send, ec);
    SetDeadline(kLinger);
    expired_ = false;
    buffer_.clear();
    std::size_t total = 0;
    while (!ec && !expired_ && total < kMaxLingerBytes) {
      auto [read_ec, n] = co_await socket_.async_read_some(buffer_.prepare(kMaxAheadBytes / 4), kTuple);
      ec = read_ec;
      total += n;
    }
    deadline_ = kNever;
  }

  std::shared_ptr<HttpLoop> loop_;
  HttpShared& shared_;
  tcp::socket socket_;
  asio::steady_timer signal_;  // cancelled = something for Deliver to look at
  boost::beast::flat_buffer buffer_;
  SteadyClock::time_point deadline_ = kNever;
  bool expired_ = false;
  bool idle_ = false;
  bool linger_ = false;
  bool watching_ = false;
  bool stop_watching_ = false;
  SocketExchange* exchange_ = nullptr;
};

}  // namespace

void StartHttpSession(std::shared_ptr<HttpLoop> loop, HttpShared& shared, tcp::socket socket, bool refuse) {
  asio::io_context& context = loop->context;
  auto session = std::make_shared<SocketSession>(std::move(loop), shared, std::move(socket));
  asio::co_spawn(context, refuse ? session->Refuse(session) : session->Run(session), asio::detached);
}

}  // namespace elasticmoe::server
