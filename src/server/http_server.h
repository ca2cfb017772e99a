// HTTP/1.1 over TCP: connections, limits, time-outs, keep-alive, streaming with back-pressure, graceful stop.
// What is answered is the router's business. Every I/O thread has its own event loop and its own
// connections; a connection lives on one thread, so its state needs no lock.
//
//   accept ─► idle ─► header ─► body ─► handler … answer ─► idle
//     │ full    │ 75 s   │ 10 s    │ 60 s    │ client gone, too slow: Exchange closes
//     ▼ 503     ▼        ▼ 408     ▼ 408     ▼
//   closed ◄────┴────────┴─────────┴─────────┘
#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>

#include "base/error.h"
#include "server/router.h"

namespace elasticmoe::server {

struct HttpOptions {
  std::string host = "127.0.0.1";
  int port = 0;            // 0 = one that is free
  int threads = 1;         // one is enough for 60k requests/s; more for TLS-like work in handlers
  int helper_threads = 1;  // for Exchange::Offload
  // Lowered to what RLIMIT_NOFILE leaves. Connections beyond it are answered 503 and closed.
  int max_connections = 4096;
  std::size_t max_header_bytes = 32 << 10;             // 431
  std::size_t max_body_bytes = std::size_t{16} << 20;  // 413
  std::size_t max_stream_buffer_bytes = 1 << 20;       // unsent bytes of one stream
  std::chrono::milliseconds idle_timeout{75'000};      // between requests of a connection
  std::chrono::milliseconds header_timeout{10'000};    // first to last byte of a header
  std::chrono::milliseconds body_timeout{60'000};      // a whole body
  std::chrono::milliseconds write_timeout{30'000};     // until the kernel takes a piece
  std::string cors_origin = "*";                       // "" = no CORS headers
  // Called on the I/O thread when an answer's status is known. `route` is the pattern, "" where none matched.
  std::function<void(std::string_view method, std::string_view route, int status)> on_response;
};

class HttpServer {
 public:
  // Binds the address; connections wait until Run. Errors: kUnavailable (address in use), kInvalidArgument
  // (no such host, no right to the port); the message says what to do. `router` must outlive the server.
  static Expected<std::unique_ptr<HttpServer>> Listen(HttpOptions options, const Router& router);
  void Run();     // starts the threads; once
  ~HttpServer();  // StopNow and Wait

  int Port() const;
  int Connections() const;     // open now; thread-safe
  int MaxConnections() const;  // the limit in force

  // No new connections; further requests on open ones are answered 503 with Retry-After; running ones finish.
  // Thread-safe, returns at once.
  void BeginStop();
  // Closes every connection; their exchanges see Closed. Thread-safe, returns at once.
  void StopNow();
  // Blocks until every connection has ended after BeginStop or StopNow, and the threads are joined.
  void Wait();

 private:
  struct Impl;
  explicit HttpServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace elasticmoe::server
