#include "server/http_server.h"

#include <sys/resource.h>
#include <sys/socket.h>

#include <algorithm>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <random>

#include "base/check.h"
#include "base/log.h"
#include "server/http_loop.h"
#include "server/http_session.h"

namespace elasticmoe::server {
namespace {

using asio::ip::tcp;
using boost::system::error_code;
using SteadyClock = std::chrono::steady_clock;
constexpr auto kTuple = asio::as_tuple(asio::use_awaitable);
constexpr int kReservedDescriptors = 128;  // files, pipes and sockets of the rest of the process

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
  HttpShared shared;
  std::vector<std::shared_ptr<HttpLoop>> loops;
  std::unique_ptr<tcp::acceptor> acceptor;
  std::unique_ptr<asio::steady_timer> accept_pause;
  int port = 0;
  std::mutex wait_mutex;
  bool joined = false;

  Impl(HttpOptions options, const Router& router) : shared(std::move(options), router) {}

  Status Bind() {
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
      const std::shared_ptr<HttpLoop>& loop = loops[next++ % loops.size()];
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
        if (!shared.stopping) StartHttpSession(loop, shared, std::move(*socket), full);
      };
      if (loop == loops[0])
        start();
      else
        loop->Post(std::move(start));
    }
  }

  asio::awaitable<void> Sweep(HttpLoop& loop) {
    const HttpOptions& o = shared.options;
    const auto shortest = std::min({o.idle_timeout, o.header_timeout, o.body_timeout, o.write_timeout});
    const auto period =
        std::clamp(shortest / 4, std::chrono::milliseconds(5), std::chrono::milliseconds(250));
    while (!(shared.stopping && loop.sessions.empty())) {
      loop.sweep.expires_after(period);
      co_await loop.sweep.async_wait(kTuple);
      const auto now = SteadyClock::now();
      for (HttpSession* session : loop.sessions) session->CheckDeadline(now);
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
        for (HttpSession* session : loop->sessions) now ? session->StopNow() : session->BeginStop();
        if (loop->sessions.empty()) loop->sweep.cancel();
      });
    }
  }
};

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Expected<std::unique_ptr<HttpServer>> HttpServer::Listen(HttpOptions options, const Router& router) {
  EM_CHECK(options.threads > 0 && options.helper_threads > 0 && options.max_connections > 0);
  options.max_connections = FitConnections(options.max_connections);
  auto impl = std::make_unique<Impl>(std::move(options), router);
  impl->shared.id_seed = (std::uint64_t{std::random_device{}()} << 32) | std::random_device{}();
  for (int i = 0; i < impl->shared.options.threads; ++i) impl->loops.push_back(std::make_shared<HttpLoop>());
  EM_RETURN_IF_ERROR(impl->Bind());
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

void HttpServer::Run() {
  asio::co_spawn(impl_->loops[0]->context, impl_->Accept(), asio::detached);
  for (auto& loop : impl_->loops) {
    asio::co_spawn(loop->context, impl_->Sweep(*loop), asio::detached);
    loop->thread = std::thread([loop = loop.get()] { loop->context.run(); });
  }
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
  for (auto& loop : impl_->loops)
    if (loop->thread.joinable()) loop->thread.join();
  impl_->shared.helpers.join();
  for (auto& loop : impl_->loops) loop->CloseInbox();
}

}  // namespace elasticmoe::server
