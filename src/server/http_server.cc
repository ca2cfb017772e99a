#include "server/http_server.h"

#include <sys/resource.h>
#include <sys/socket.h>

#include <array>
#include <atomic>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http.hpp>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <mutex>
#include <random>
#include <set>
#include <thread>

#include "base/check.h"
#include "base/log.h"
#include "base/rng.h"
#include "server/api_error.h"

namespace elasticmoe::server {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using asio::ip::tcp;
using boost::system::error_code;
using SteadyClock = std::chrono::steady_clock;
constexpr auto kTuple = asio::as_tuple(asio::use_awaitable);
constexpr auto kNever = SteadyClock::time_point::max();

// Refused connections that we keep for a moment so that the client reads its 503 before the reset.
constexpr int kMaxLingering = 256;
constexpr auto kLinger = std::chrono::milliseconds(1000);
constexpr std::size_t kMaxLingerBytes = std::size_t{64} << 20;
// What a client may send ahead (pipelined) while its answer is being made.
constexpr std::size_t kMaxAheadBytes = 64 << 10;
constexpr int kReservedDescriptors = 128;  // files, pipes and sockets of the rest of the process

class Session;

// One thread, its connections and its inbox of tasks from other threads.
struct Loop {
  std::set<Session*> sessions;  // before `context`: frames that it destroys leave the set
  std::mutex mutex;
  std::vector<std::function<void()>> inbox;
  bool posted = false;
  bool closed = false;
  asio::io_context context{1};
  asio::steady_timer sweep{context};
  std::thread thread;
  std::time_t date_s = 0;
  std::string date;

  void Post(std::function<void()> task) {
    {
      std::lock_guard lock(mutex);
      if (closed) return;
      inbox.push_back(std::move(task));
      if (std::exchange(posted, true)) return;
    }
    asio::post(context, [this] { Drain(); });
  }

  void Drain() {
    std::vector<std::function<void()>> tasks;
    {
      std::lock_guard lock(mutex);
      tasks.swap(inbox);
      posted = false;
    }
    for (auto& task : tasks) task();
  }

  // Tasks keep exchanges and those keep this: cut the ring.
  void CloseInbox() {
    std::vector<std::function<void()>> tasks;
    std::lock_guard lock(mutex);
    closed = true;
    tasks.swap(inbox);
  }

  const std::string& Date() {
    const std::time_t now = std::time(nullptr);
    if (now != date_s) {
      date_s = now;
      std::tm tm{};
      gmtime_r(&now, &tm);
      char text[64];
      date.assign(text, std::strftime(text, sizeof text, "%a, %d %b %Y %H:%M:%S GMT", &tm));
    }
    return date;
  }
};

// What connections share.
struct Shared {
  HttpOptions options;
  const Router& router;
  std::atomic<int> connections{0};
  std::atomic<int> lingering{0};
  std::atomic<bool> stopping{false};
  std::atomic<std::uint64_t> request_count{0};
  std::uint64_t id_seed = 0;
  asio::thread_pool helpers;

  Shared(HttpOptions o, const Router& r)
      : options(std::move(o)), router(r), helpers(static_cast<std::size_t>(options.helper_threads)) {}
};

bool IsPrintableId(std::string_view id) {
  if (id.empty() || id.size() > 128) return false;
  for (char c : id)
    if (c <= ' ' || c > '~') return false;
  return true;
}

class ExchangeImpl final : public Exchange, public std::enable_shared_from_this<ExchangeImpl> {
 public:
  ExchangeImpl(std::shared_ptr<Loop> loop, Shared& shared, asio::steady_timer& signal, tcp::socket& socket,
               HttpRequest request)
      : loop_(std::move(loop)),
        request_(std::move(request)),
        max_buffer_(shared.options.max_stream_buffer_bytes),
        helpers_(shared.helpers.get_executor()),
        signal_(&signal),
        socket_(&socket) {}

  const HttpRequest& Request() const override { return request_; }

  void Respond(HttpResponse response) override {
    if (closed_) return;
    EM_CHECK(!begun, "an exchange was answered twice");
    head = std::move(response);
    begun = ended = true;
    Wake();
  }

  void Begin(HttpResponse response) override {
    if (closed_) return;
    EM_CHECK(!begun, "an exchange was answered twice");
    head = std::move(response);
    out = std::move(head.body);
    begun = streaming = true;
    Wake();
  }

  void Write(std::string_view bytes) override {
    if (closed_ || bytes.empty()) return;
    EM_CHECK(begun && !ended, "write outside of a stream");
    out += bytes;
    if (out.size() > max_buffer_) {
      Close();  // a client that never reads
      return;
    }
    Wake();
  }

  void End() override {
    if (closed_) return;
    EM_CHECK(begun, "end of a stream that was not begun");
    ended = true;
    Wake();
  }

  bool Closed() const override { return closed_; }

  void OnClosed(std::function<void()> closed) override {
    if (closed_) {
      if (!ended) loop_->Post(std::move(closed));
    } else {
      on_closed_ = std::move(closed);
    }
  }

  void Post(std::function<void()> task) override { loop_->Post(std::move(task)); }

  void Offload(std::function<void()> work) override { asio::post(helpers_, std::move(work)); }

  // The connection is lost or given up: its operations end, the handler learns of it.
  void Close() {
    if (closed_) return;
    closed_ = true;
    if (!ended && on_closed_) loop_->Post(std::move(on_closed_));
    on_closed_ = nullptr;
    if (socket_ != nullptr) {
      error_code ignored;
      socket_->cancel(ignored);
    }
    Wake();
  }

  // The session is done with this exchange.
  void Detach() {
    signal_ = nullptr;
    socket_ = nullptr;
    Close();
  }

  // For the session.
  HttpResponse head;
  std::string out;  // stream bytes that are not yet handed to the kernel
  bool begun = false;
  bool ended = false;
  bool streaming = false;

 private:
  void Wake() {
    if (signal_ != nullptr) signal_->cancel();
  }

  std::shared_ptr<Loop> loop_;
  HttpRequest request_;
  std::size_t max_buffer_;
  asio::thread_pool::executor_type helpers_;
  asio::steady_timer* signal_;  // nullptr once detached
  tcp::socket* socket_;
  bool closed_ = false;
  std::function<void()> on_closed_;
};

class Session : public std::enable_shared_from_this<Session> {
 public:
  Session(std::shared_ptr<Loop> loop, Shared& shared, tcp::socket socket)
      : loop_(std::move(loop)),
        shared_(shared),
        socket_(std::move(socket)),
        signal_(loop_->context),
        buffer_(shared.options.max_header_bytes + 2 * kMaxAheadBytes) {
    loop_->sessions.insert(this);
    ++shared_.connections;
  }

  ~Session() {
    loop_->sessions.erase(this);
    --shared_.connections;
    if (loop_->sessions.empty() && shared_.stopping) loop_->sweep.cancel();
  }

  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  asio::awaitable<void> Run(std::shared_ptr<Session> self) {
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
  asio::awaitable<void> Refuse(std::shared_ptr<Session> self) {
    co_await SendSimple(
        {.status = 503,
         .message = fmt::format("too many connections (limit={})", shared_.options.max_connections),
         .code = "too_many_connections",
         .retry_after_s = 1});
    co_await Linger();
    error_code ignored;
    socket_.close(ignored);
    --shared_.lingering;
    self.reset();
  }

  void CheckDeadline(SteadyClock::time_point now) {
    if (now < deadline_) return;
    expired_ = true;
    deadline_ = kNever;
    error_code ignored;
    socket_.cancel(ignored);
  }

  void BeginStop() {
    error_code ignored;
    if (idle_) socket_.cancel(ignored);
  }

  void StopNow() {
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
    auto exchange = std::make_shared<ExchangeImpl>(loop_, shared_, signal_, socket_,
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

  std::shared_ptr<const Route> Dispatch(const std::shared_ptr<ExchangeImpl>& exchange) {
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
  asio::awaitable<bool> Deliver(ExchangeImpl& exchange, const Route* route, bool keep_alive, bool chunked) {
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
  asio::awaitable<void> Watch(std::shared_ptr<Session> self) {
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

  std::shared_ptr<Loop> loop_;
  Shared& shared_;
  tcp::socket socket_;
  asio::steady_timer signal_;  // cancelled = something for Deliver to look at
  boost::beast::flat_buffer buffer_;
  SteadyClock::time_point deadline_ = kNever;
  bool expired_ = false;
  bool idle_ = false;
  bool linger_ = false;
  bool watching_ = false;
  bool stop_watching_ = false;
  ExchangeImpl* exchange_ = nullptr;
};

// Raises the soft limit of descriptors as far as `connections` needs and the hard limit allows; returns how
// many connections fit.
int FitConnections(int connections) {
  const rlim_t wanted = static_cast<rlim_t>(connections) + kMaxLingering + kReservedDescriptors;
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return connections;
  if (limit.rlim_cur < wanted) {
    limit.rlim_cur = std::min<rlim_t>(wanted, limit.rlim_max);
    setrlimit(RLIMIT_NOFILE, &limit);
    getrlimit(RLIMIT_NOFILE, &limit);
  }
  if (limit.rlim_cur >= wanted) return connections;
  const int fitting = std::max(16, static_cast<int>(limit.rlim_cur) - kMaxLingering - kReservedDescriptors);
  LogWarn("max_connections lowered: wanted={} fitting={} (RLIMIT_NOFILE={}); raise ulimit -n", connections,
          fitting, limit.rlim_cur);
  return fitting;
}

}  // namespace

struct HttpServer::Impl {
  Shared shared;
  std::vector<std::shared_ptr<Loop>> loops;
  std::unique_ptr<tcp::acceptor> acceptor;
  std::unique_ptr<asio::steady_timer> accept_pause;
  int port = 0;
  std::mutex wait_mutex;
  bool joined = false;

  Impl(HttpOptions options, const Router& router) : shared(std::move(options), router) {}

  Status Listen() {
    const HttpOptions& options = shared.options;
    asio::io_context& context = loops[0]->context;
    error_code ec;
    tcp::resolver resolver(context);
    const auto found = resolver.resolve(options.host, std::to_string(options.port),
                                        tcp::resolver::passive | tcp::resolver::numeric_service, ec);
    if (ec || found.empty())
      return Fail(ErrorCode::kInvalidArgument,
                  "listening: host={} cannot be resolved ({}); give an address of this machine", options.host,
                  ec.message());
    const tcp::endpoint endpoint = found.begin()->endpoint();
    acceptor = std::make_unique<tcp::acceptor>(context);
    accept_pause = std::make_unique<asio::steady_timer>(context);
    acceptor->open(endpoint.protocol(), ec);
    if (!ec) acceptor->set_option(asio::socket_base::reuse_address(true), ec);
    if (!ec) acceptor->bind(endpoint, ec);
    if (!ec) acceptor->listen(4096, ec);
    if (ec) {
      const bool in_use = ec == boost::system::errc::address_in_use;
      const bool denied = ec == boost::system::errc::permission_denied;
      return Fail(in_use ? ErrorCode::kUnavailable : ErrorCode::kInvalidArgument,
                  "listening on {}:{}: {}; {}", options.host, options.port, ec.message(),
                  in_use   ? "stop the program that uses it or choose another with --port"
                  : denied ? "ports below 1024 need privileges, choose another with --port"
                           : "give an address of this machine with --host");
    }
    port = acceptor->local_endpoint().port();
    return {};
  }

  asio::awaitable<void> Accept() {
    std::size_t next = 0;
    for (;;) {
      const std::shared_ptr<Loop>& loop = loops[next++ % loops.size()];
      tcp::socket socket(loop->context);
      auto [ec] = co_await acceptor->async_accept(socket, kTuple);
      if (shared.stopping) co_return;
      if (ec == asio::error::operation_aborted) co_return;
      if (ec) {  // EMFILE, ENFILE, ENOMEM, ...: waiting is better than spinning
        if (ec != boost::system::errc::connection_aborted) {
          LogWarn("accepting a connection: {}; trying again in 100 ms", ec.message());
          accept_pause->expires_after(std::chrono::milliseconds(100));
          co_await accept_pause->async_wait(kTuple);
        }
        continue;
      }
      const bool full = shared.connections - shared.lingering >= shared.options.max_connections;
      if (full && shared.lingering >= kMaxLingering) {
        static constexpr std::string_view kBusy =
            "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: "
            "close\r\n\r\n";
        (void)!::send(socket.native_handle(), kBusy.data(), kBusy.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
        continue;
      }
      if (full) ++shared.lingering;
      auto start = [loop, full, this, socket = std::make_shared<tcp::socket>(std::move(socket))] {
        if (shared.stopping) return;
        auto session = std::make_shared<Session>(loop, shared, std::move(*socket));
        asio::co_spawn(loop->context, full ? session->Refuse(session) : session->Run(session),
                       asio::detached);
      };
      if (loop == loops[0])
        start();
      else
        loop->Post(std::move(start));
    }
  }

  asio::awaitable<void> Sweep(Loop& loop) {
    const HttpOptions& o = shared.options;
    const auto shortest = std::min({o.idle_timeout, o.header_timeout, o.body_timeout, o.write_timeout});
    const auto period =
        std::clamp(shortest / 4, std::chrono::milliseconds(5), std::chrono::milliseconds(250));
    while (!(shared.stopping && loop.sessions.empty())) {
      loop.sweep.expires_after(period);
      co_await loop.sweep.async_wait(kTuple);
      const auto now = SteadyClock::now();
      for (Session* session : loop.sessions) session->CheckDeadline(now);
    }
  }

  // `now`: close connections instead of letting them finish.
  void Stop(bool now) {
    shared.stopping = true;
    for (std::size_t i = 0; i < loops.size(); ++i) {
      loops[i]->Post([this, i, now, loop = loops[i].get()] {
        if (i == 0) {
          error_code ignored;
          acceptor->close(ignored);
          accept_pause->cancel();
        }
        for (Session* session : loop->sessions) now ? session->StopNow() : session->BeginStop();
        if (loop->sessions.empty()) loop->sweep.cancel();
      });
    }
  }
};

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Expected<std::unique_ptr<HttpServer>> HttpServer::Start(HttpOptions options, const Router& router) {
  EM_CHECK(options.threads > 0 && options.helper_threads > 0 && options.max_connections > 0);
  options.max_connections = FitConnections(options.max_connections);
  auto impl = std::make_unique<Impl>(std::move(options), router);
  impl->shared.id_seed = (std::uint64_t{std::random_device{}()} << 32) | std::random_device{}();
  for (int i = 0; i < impl->shared.options.threads; ++i) impl->loops.push_back(std::make_shared<Loop>());
  EM_RETURN_IF_ERROR(impl->Listen());
  asio::co_spawn(impl->loops[0]->context, impl->Accept(), asio::detached);
  for (auto& loop : impl->loops) {
    asio::co_spawn(loop->context, impl->Sweep(*loop), asio::detached);
    loop->thread = std::thread([loop = loop.get()] { loop->context.run(); });
  }
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

HttpServer::~HttpServer() {
  StopNow();
  Wait();
}

int HttpServer::Port() const {
  return impl_->port;
}
int HttpServer::Connections() const {
  return impl_->shared.connections;
}
int HttpServer::MaxConnections() const {
  return impl_->shared.options.max_connections;
}
void HttpServer::BeginStop() {
  impl_->Stop(false);
}
void HttpServer::StopNow() {
  impl_->Stop(true);
}

void HttpServer::Wait() {
  std::lock_guard lock(impl_->wait_mutex);
  if (std::exchange(impl_->joined, true)) return;
  for (auto& loop : impl_->loops) loop->thread.join();
  impl_->shared.helpers.join();
  for (auto& loop : impl_->loops) loop->CloseInbox();
}

}  // namespace elasticmoe::server
