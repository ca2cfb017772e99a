// An HTTP server for tests whose every byte the test decides: each connection has a thread, each request is
// given to the test's function together with the socket. Loopback only.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "base/check.h"

namespace elasticmoe::cli {

struct FakeRequest {
  std::string line;  // "POST /v1/completions HTTP/1.1"
  std::string head;
  std::string body;
};

class FakePeer {
 public:
  explicit FakePeer(int fd) : fd_(fd) {}

  void Write(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t n = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (n <= 0) return;
      bytes.remove_prefix(static_cast<std::size_t>(n));
    }
  }
  void Answer(int status, std::string_view body, std::string_view type = "application/json") {
    Write(fmt::format("HTTP/1.1 {} X\r\nContent-Type: {}\r\nContent-Length: {}\r\n\r\n{}", status, type,
                      body.size(), body));
  }
  void BeginEvents() {
    Write("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n");
  }
  void Event(std::string_view data) {
    const std::string text = fmt::format("data: {}\n\n", data);
    Write(fmt::format("{:x}\r\n{}\r\n", text.size(), text));
  }
  void EndEvents() { Write("0\r\n\r\n"); }
  // The connection dies as if the process had been killed.
  void Reset() {
    const linger now{.l_onoff = 1, .l_linger = 0};
    ::setsockopt(fd_, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    ended_ = true;
  }
  void Close() { ended_ = true; }
  // Until the client closes its end.
  void AwaitHangUp() {
    char bytes[256];
    while (::recv(fd_, bytes, sizeof bytes, 0) > 0) {
    }
    ended_ = true;
  }
  bool Ended() const { return ended_; }

 private:
  int fd_;
  bool ended_ = false;
};

class FakeServer {
 public:
  using Handler = std::function<void(const FakeRequest&, FakePeer&)>;

  explicit FakeServer(Handler handler) : handler_(std::move(handler)) {
    listener_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EM_CHECK(::bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
    EM_CHECK(::listen(listener_, 128) == 0);
    socklen_t size = sizeof address;
    EM_CHECK(::getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size) == 0);
    port_ = ntohs(address.sin_port);
    acceptor_ = std::thread([this] { Accept(); });
  }

  ~FakeServer() {
    ::shutdown(listener_, SHUT_RDWR);
    acceptor_.join();
    {
      const std::scoped_lock lock(mutex_);
      for (const int fd : open_) ::shutdown(fd, SHUT_RDWR);
    }
    for (std::thread& thread : threads_) thread.join();
    ::close(listener_);
  }

  std::string Url() const { return fmt::format("http://127.0.0.1:{}", port_); }
  int Port() const { return port_; }
  int Connections() const { return connections_; }

 private:
  void Accept() {
    for (;;) {
      const int fd = ::accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
      if (fd < 0) return;
      ++connections_;
      const std::scoped_lock lock(mutex_);
      open_.push_back(fd);
      threads_.emplace_back([this, fd] { Serve(fd); });
    }
  }

  void Serve(int fd) {
    FakePeer peer(fd);
    std::string buffer;
    FakeRequest request;
    while (!peer.Ended() && Read(fd, buffer, request)) handler_(request, peer);
    const std::scoped_lock lock(mutex_);
    std::erase(open_, fd);
    ::close(fd);
  }

  static bool Read(int fd, std::string& buffer, FakeRequest& request) {
    const auto fill = [&] {
      char bytes[16384];
      const ssize_t n = ::recv(fd, bytes, sizeof bytes, 0);
      if (n > 0) buffer.append(bytes, static_cast<std::size_t>(n));
      return n > 0;
    };
    std::size_t end;
    while ((end = buffer.find("\r\n\r\n")) == buffer.npos)
      if (!fill()) return false;
    request.head = buffer.substr(0, end + 2);
    request.line = request.head.substr(0, request.head.find("\r\n"));
    buffer.erase(0, end + 4);
    std::size_t length = 0;
    if (const auto at = request.head.find("Content-Length: "); at != request.head.npos)
      length = std::strtoull(request.head.c_str() + at + 16, nullptr, 10);
    while (buffer.size() < length)
      if (!fill()) return false;
    request.body = buffer.substr(0, length);
    buffer.erase(0, length);
    return true;
  }

  Handler handler_;
  int listener_ = -1;
  int port_ = 0;
  std::atomic<int> connections_{0};
  std::thread acceptor_;
  std::mutex mutex_;
  std::vector<int> open_;
  std::vector<std::thread> threads_;
};

}  // namespace elasticmoe::cli
