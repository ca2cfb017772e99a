// Inside of the HTTP server, not for others: one connection from accept to close.
#pragma once

#include <boost/asio/ip/tcp.hpp>
#include <chrono>
#include <memory>

#include "server/http_loop.h"

namespace elasticmoe::server {

// Refused connections that we keep for a moment so that the client reads its 503 before the reset.
inline constexpr int kMaxLingering = 256;

// Lives on its loop's thread, owned by its own coroutine, and is in HttpLoop::sessions while it lives.
class HttpSession {
 public:
  virtual ~HttpSession() = default;
  virtual void CheckDeadline(std::chrono::steady_clock::time_point now) = 0;
  virtual void BeginStop() = 0;  // ends now if it is idle, else after its answer
  virtual void StopNow() = 0;
};

// Serves the connection, or answers 503 (`refuse`; then it counts as lingering). On the loop's thread.
void StartHttpSession(std::shared_ptr<HttpLoop> loop, HttpShared& shared, asio::ip::tcp::socket socket,
                      bool refuse);

}  // namespace elasticmoe::server
