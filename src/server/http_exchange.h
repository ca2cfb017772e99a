// Inside of the HTTP server, not for others: an exchange over a connection. The handler fills it, the session
// empties it; both on the connection's thread.
#pragma once

#include <boost/asio/ip/tcp.hpp>
#include <memory>
#include <string>
#include <utility>

#include "base/check.h"
#include "server/http_loop.h"

namespace elasticmoe::server {

class SocketExchange final : public Exchange, public std::enable_shared_from_this<SocketExchange> {
 public:
  SocketExchange(std::shared_ptr<HttpLoop> loop, HttpShared& shared, asio::steady_timer& signal,
                 asio::ip::tcp::socket& socket, HttpRequest request)
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
      boost::system::error_code ignored;
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

  std::shared_ptr<HttpLoop> loop_;
  HttpRequest request_;
  std::size_t max_buffer_;
  asio::thread_pool::executor_type helpers_;
  asio::steady_timer* signal_;  // nullptr once detached
  asio::ip::tcp::socket* socket_;
  bool closed_ = false;
  std::function<void()> on_closed_;
};

}  // namespace elasticmoe::server
