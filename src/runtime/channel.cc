#include "runtime/channel.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <cstring>
#include <optional>

namespace elasticmoe::runtime {
namespace {

constexpr std::uint32_t kMaxFrame = 64u << 20;
constexpr std::uint32_t kMaxFds = 250;  // SCM_MAX_FD is 253

sockaddr_un AbstractAddress(const std::string& name, socklen_t& length) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::size_t count = std::min(name.size(), sizeof(address.sun_path) - 1);
  std::memcpy(address.sun_path + 1, name.data(), count);  // leading NUL = abstract
  length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + count);
  return address;
}

Status SendAll(int fd, const char* data, std::size_t size) {
  while (size > 0) {
    const ssize_t sent = ::send(fd, data, size, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0)
      return Fail(ErrorCode::kUnavailable, "sending a control message: {}", std::strerror(errno));
    data += sent;
    size -= static_cast<std::size_t>(sent);
  }
  return {};
}

Status ReceiveAll(int fd, char* data, std::size_t size) {
  while (size > 0) {
    const ssize_t got = ::recv(fd, data, size, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got == 0) return Fail(ErrorCode::kUnavailable, "receiving a control message: the peer is gone");
    if (got < 0)
      return Fail(ErrorCode::kUnavailable, "receiving a control message: {}", std::strerror(errno));
    data += got;
    size -= static_cast<std::size_t>(got);
  }
  return {};
}

std::optional<ucred> PeerOf(int fd) {
  ucred peer{};
  socklen_t length = sizeof(peer);
  if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0) return std::nullopt;
  return peer;
}

bool SameUser(int fd) {
  const auto peer = PeerOf(fd);
  return peer && peer->uid == ::geteuid();
}

}  // namespace

Expected<std::pair<Channel, Fd>> Channel::Pair() {
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0)
    return Fail(ErrorCode::kResourceExhausted, "making a socket pair: {}", std::strerror(errno));
  ::fcntl(ends[1], F_SETFD, 0);
  return std::pair<Channel, Fd>(Channel(Fd(ends[0])), Fd(ends[1]));
}

int Channel::PeerPid() const {
  const auto peer = PeerOf(socket_.get());
  return peer ? peer->pid : -1;
}

Expected<Channel> Channel::Connect(const std::string& name) {
  Fd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!socket) return Fail(ErrorCode::kResourceExhausted, "making a socket: {}", std::strerror(errno));
  socklen_t length = 0;
  const sockaddr_un address = AbstractAddress(name, length);
  if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0)
    return Fail(ErrorCode::kUnavailable, "connecting to @{}: {}", name, std::strerror(errno));
  if (!SameUser(socket.get()))
    return Fail(ErrorCode::kFailedPrecondition, "connecting to @{}: the socket belongs to another user",
                name);
  return Channel(std::move(socket));
}

Status Channel::Send(const Json& body, const std::vector<int>& fds) {
  const std::string text = DumpJson(body);
  const std::uint32_t head[2] = {static_cast<std::uint32_t>(text.size()),
                                 static_cast<std::uint32_t>(fds.size())};
  if (text.size() > kMaxFrame || fds.size() > kMaxFds)
    return Fail(ErrorCode::kInvalidArgument, "sending a control message: bytes={} fds={} (limit={}, {})",
                text.size(), fds.size(), kMaxFrame, kMaxFds);
  iovec part{const_cast<std::uint32_t*>(head), sizeof(head)};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  std::vector<char> control;
  if (!fds.empty()) {
    control.resize(CMSG_SPACE(fds.size() * sizeof(int)));
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
    std::memcpy(CMSG_DATA(header), fds.data(), fds.size() * sizeof(int));
  }
  ssize_t sent;
  do sent = ::sendmsg(socket_.get(), &message, MSG_NOSIGNAL);
  while (sent < 0 && errno == EINTR);
  if (sent < 0) return Fail(ErrorCode::kUnavailable, "sending a control message: {}", std::strerror(errno));
  EM_RETURN_IF_ERROR(SendAll(socket_.get(), reinterpret_cast<const char*>(head) + sent, sizeof(head) - sent));
  return SendAll(socket_.get(), text.data(), text.size());
}

Expected<Message> Channel::Receive(int timeout_ms) {
  pollfd poll_fd{socket_.get(), POLLIN, 0};
  int ready;
  do ready = ::poll(&poll_fd, 1, timeout_ms);
  while (ready < 0 && errno == EINTR);
  if (ready == 0)
    return Fail(ErrorCode::kDeadlineExceeded, "receiving a control message: none within {} ms", timeout_ms);

  std::uint32_t head[2];
  iovec part{head, sizeof(head)};
  std::vector<char> control(CMSG_SPACE(kMaxFds * sizeof(int)));
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  ssize_t got;
  do got = ::recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC);
  while (got < 0 && errno == EINTR);
  if (got == 0) return Fail(ErrorCode::kUnavailable, "receiving a control message: the peer is gone");
  if (got < 0) return Fail(ErrorCode::kUnavailable, "receiving a control message: {}", std::strerror(errno));

  Message result;
  for (cmsghdr* c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
      result.fds.emplace_back(fd);
    }
  }
  EM_RETURN_IF_ERROR(ReceiveAll(socket_.get(), reinterpret_cast<char*>(head) + got, sizeof(head) - got));
  if (head[0] > kMaxFrame)
    return Fail(ErrorCode::kDataLoss, "receiving a control message: bytes={} (limit={})", head[0], kMaxFrame);
  if (head[1] != result.fds.size())
    return Fail(ErrorCode::kDataLoss,
                "receiving a control message: {} of {} descriptors came; raise ulimit -n", result.fds.size(),
                head[1]);
  std::string text(head[0], '\0');
  EM_RETURN_IF_ERROR(ReceiveAll(socket_.get(), text.data(), text.size()));
  EM_ASSIGN_OR_RETURN(result.body, ParseJson(text));
  return result;
}

Expected<Message> Channel::Call(const Json& body, int timeout_ms, const std::vector<int>& fds) {
  EM_RETURN_IF_ERROR(Send(body, fds));
  EM_ASSIGN_OR_RETURN(Message answer, Receive(timeout_ms));
  EM_RETURN_IF_ERROR(StatusOf(answer.body));
  return answer;
}

Expected<Listener> Listener::Bind(const std::string& name) {
  Fd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!socket) return Fail(ErrorCode::kResourceExhausted, "making a socket: {}", std::strerror(errno));
  socklen_t length = 0;
  const sockaddr_un address = AbstractAddress(name, length);
  if (::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0)
    return Fail(errno == EADDRINUSE ? ErrorCode::kAlreadyExists : ErrorCode::kUnavailable,
                "listening on @{}: {}", name, std::strerror(errno));
  if (::listen(socket.get(), 64) != 0)
    return Fail(ErrorCode::kUnavailable, "listening on @{}: {}", name, std::strerror(errno));
  return Listener(std::move(socket));
}

Expected<Channel> Listener::Accept() {
  Fd socket(::accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC));
  if (!socket)
    return Fail(ErrorCode::kUnavailable, "accepting a control connection: {}", std::strerror(errno));
  if (!SameUser(socket.get()))
    return Fail(ErrorCode::kFailedPrecondition, "accepting a control connection: the peer is another user");
  return Channel(std::move(socket));
}

Json ErrorBody(const Error& error) {
  return {{"error", {{"code", static_cast<int>(error.code)}, {"message", error.message}}}};
}

Status StatusOf(const Json& body) {
  if (!body.is_object() || !body.contains("error")) return {};
  const Json& error = body["error"];
  return tl::unexpected<Error>(
      Error{static_cast<ErrorCode>(error.value("code", static_cast<int>(ErrorCode::kInternal))),
            error.value("message", "")});
}

}  // namespace elasticmoe::runtime
