// Control messages between our processes of one host: JSON objects and file descriptors over a unix stream
// socket. For what happens a few times a second at most; tensors travel through shared memory.
//
// Frame: u32 length, u32 descriptor count, both little-endian; the JSON text follows, descriptors ride on the
// first byte. Peers of another user are refused. Not thread-safe, except that one thread may send while
// another receives.
//
// (Why not gRPC: descriptors can't be passed through it, and half of these messages carry some.)
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/json.h"
#include "runtime/fd.h"

namespace elasticmoe::runtime {

struct Message {
  Json body;
  std::vector<Fd> fds;
};

class Channel {
 public:
  Channel() = default;
  explicit Channel(Fd socket) : socket_(std::move(socket)) {}

  // A connected pair: the second end is for a child process (close-on-exec is off there).
  static Expected<std::pair<Channel, Fd>> Pair();
  // Connects to an abstract socket name (no file is left behind). kUnavailable if nobody listens.
  static Expected<Channel> Connect(const std::string& name);

  int fd() const { return socket_.get(); }
  int PeerPid() const;  // the process that listened on the name when this connected; -1 if not to be told
  explicit operator bool() const { return static_cast<bool>(socket_); }
  void Close() { socket_.Close(); }

  // kUnavailable when the peer is gone. Blocks while the socket's buffer is full.
  Status Send(const Json& body, const std::vector<int>& fds = {});
  // Blocks up to `timeout_ms` (-1 = for ever): kDeadlineExceeded; kUnavailable at the peer's end.
  Expected<Message> Receive(int timeout_ms = -1);
  // Send, then Receive; an answer with "error" becomes that error.
  Expected<Message> Call(const Json& body, int timeout_ms, const std::vector<int>& fds = {});

 private:
  Fd socket_;
};

class Listener {
 public:
  // kAlreadyExists if another process listens on the name.
  static Expected<Listener> Bind(const std::string& name);
  int fd() const { return socket_.get(); }
  Expected<Channel> Accept();

 private:
  explicit Listener(Fd socket) : socket_(std::move(socket)) {}
  Fd socket_;
};

// {"error": {"code", "message"}} and back.
Json ErrorBody(const Error& error);
Status StatusOf(const Json& body);

}  // namespace elasticmoe::runtime
