// A blocking HTTP client over a raw socket, for tests: sees exactly what comes over the wire.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/json.h"

namespace elasticmoe::server {

struct TestResponse {
  int status = 0;                              // 0: the connection ended before a whole head
  std::map<std::string, std::string> headers;  // names in lower case
  std::string body;
  bool complete = false;  // the body ended as its framing says

  Json Parsed() const { return ParseJson(body).value_or(Json()); }
  // Data of the SSE events in the body.
  std::vector<std::string> Events() const {
    std::vector<std::string> events;
    std::size_t at = 0;
    for (std::size_t end; (end = body.find("\n\n", at)) != body.npos; at = end + 2) {
      std::string_view line(body.data() + at, end - at);
      if (line.starts_with("data: ")) events.emplace_back(line.substr(6));
    }
    return events;
  }
};

class TestClient {
 public:
  // `receive_buffer`: of the kernel, bytes; 0 = its default.
  explicit TestClient(int port, int receive_buffer = 0)
      : fd_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    EM_CHECK(fd_ >= 0);
    if (receive_buffer > 0) ::setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer);
    const timeval limit{.tv_sec = 60, .tv_usec = 0};  // a hung test fails instead of hanging
    ::setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<std::uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    connected_ = ::connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0;
  }
  ~TestClient() { Close(); }
  TestClient(TestClient&& other) noexcept
      : fd_(std::exchange(other.fd_, -1)), connected_(other.connected_), buffer_(std::move(other.buffer_)) {}
  TestClient& operator=(TestClient&&) = delete;

  bool Connected() const { return connected_; }
  void Close() {
    if (fd_ >= 0) ::close(std::exchange(fd_, -1));
  }

  bool Send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t n = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (n <= 0) return false;
      bytes.remove_prefix(static_cast<std::size_t>(n));
    }
    return true;
  }

  static std::string Text(std::string_view method, std::string_view path, std::string_view body = "",
                          std::string_view headers = "") {
    std::string text = fmt::format("{} {} HTTP/1.1\r\nHost: test\r\n{}", method, path, headers);
    if (!body.empty() || method == "POST") text += fmt::format("Content-Length: {}\r\n", body.size());
    return fmt::format("{}\r\n{}", text, body);
  }

  TestResponse Call(std::string_view method, std::string_view path, std::string_view body = "",
                    std::string_view headers = "") {
    Send(Text(method, path, body, headers));
    return Read(method == "HEAD");
  }

  // One response; `head_only`: it has no body whatever its headers say.
  TestResponse Read(bool head_only = false) {
    TestResponse response;
    std::size_t end;
    while ((end = buffer_.find("\r\n\r\n")) == buffer_.npos)
      if (!Fill()) return response;
    ParseHead(buffer_.substr(0, end), response);
    buffer_.erase(0, end + 4);
    if (head_only || response.status == 204 || response.status == 100) {
      response.complete = true;
    } else if (response.headers.contains("content-length")) {
      const std::size_t length = std::strtoull(response.headers["content-length"].c_str(), nullptr, 10);
      while (buffer_.size() < length && Fill()) {
      }
      response.complete = buffer_.size() >= length;
      response.body = buffer_.substr(0, length);
      buffer_.erase(0, length);
    } else if (response.headers.contains("transfer-encoding")) {
      ReadChunks(response);
    } else {
      while (Fill()) {
      }
      response.body = std::exchange(buffer_, {});
      response.complete = true;
    }
    return response;
  }

  // The next `n` bytes of the wire, fewer at its end.
  std::string ReadBytes(std::size_t n) {
    while (buffer_.size() < n && Fill()) {
    }
    std::string out = buffer_.substr(0, n);
    buffer_.erase(0, out.size());
    return out;
  }
  // Reads until `text` was seen; false at the end of the connection.
  bool ReadUntil(std::string_view text) {
    std::size_t at;
    while ((at = buffer_.find(text)) == buffer_.npos)
      if (!Fill()) return false;
    buffer_.erase(0, at + text.size());
    return true;
  }
  // True when the server has closed; what still comes before is thrown away.
  bool ReadToEnd() {
    while (Fill()) buffer_.clear();
    return true;
  }

 private:
  bool Fill() {
    char bytes[16384];
    const ssize_t n = ::recv(fd_, bytes, sizeof bytes, 0);
    if (n <= 0) return false;
    buffer_.append(bytes, static_cast<std::size_t>(n));
    return true;
  }

  static void ParseHead(std::string_view head, TestResponse& response) {
    const auto line_end = std::min(head.find("\r\n"), head.size());
    response.status = std::atoi(std::string(head.substr(9, 3)).c_str());
    for (std::size_t at = line_end + 2; at < head.size();) {
      const auto end = std::min(head.find("\r\n", at), head.size());
      const std::string_view line = head.substr(at, end - at);
      const auto colon = line.find(": ");
      std::string name(line.substr(0, colon));
      std::ranges::transform(name, name.begin(),
                             [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
      response.headers[name] = std::string(line.substr(colon + 2));
      at = end + 2;
    }
  }

  void ReadChunks(TestResponse& response) {
    for (;;) {
      std::size_t end;
      while ((end = buffer_.find("\r\n")) == buffer_.npos)
        if (!Fill()) return;
      const std::size_t size = std::strtoull(buffer_.c_str(), nullptr, 16);
      while (buffer_.size() < end + 2 + size + 2)
        if (!Fill()) {
          response.body += buffer_.substr(end + 2, size);
          return;
        }
      response.body += buffer_.substr(end + 2, size);
      buffer_.erase(0, end + 2 + size + 2);
      if (size == 0) {
        response.complete = true;
        return;
      }
    }
  }

  int fd_;
  bool connected_ = false;
  std::string buffer_;
};

}  // namespace elasticmoe::server
