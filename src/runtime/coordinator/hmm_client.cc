#include "runtime/coordinator/hmm_client.h"

#include <poll.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "base/log.h"

namespace elasticmoe::runtime {
namespace {

constexpr int kCallTimeoutMs = 60'000;  // the longest call copies a domain's weights

bool Gone(int pidfd, int timeout_ms) {
  pollfd poll_fd{pidfd, POLLIN, 0};
  return ::poll(&poll_fd, 1, timeout_ms) == 1;
}

std::string PagesFlag(PageKind kind) {
  return kind == PageKind::kSmall ? "small" : kind == PageKind::kHugetlb ? "hugetlb" : "thp";
}

}  // namespace

int AttachedMemory::FdOf(DomainId domain) const {
  for (std::size_t i = 0; i < map.domains.size(); ++i)
    if (map.domains[i].domain == domain) return fds[i].get();
  return -1;
}

Status HmmClient::Hello() {
  EM_RETURN_IF_ERROR(channel_.Call({{"op", "hello"}, {"role", "coordinator"}}, kCallTimeoutMs));
  return {};
}

Expected<std::unique_ptr<HmmClient>> HmmClient::Connect(const std::string& socket) {
  EM_ASSIGN_OR_RETURN(Channel channel, Channel::Connect(socket));
  std::unique_ptr<HmmClient> client(new HmmClient());
  client->channel_ = std::move(channel);
  EM_RETURN_IF_ERROR(client->Hello());
  return client;
}

Expected<std::unique_ptr<HmmClient>> HmmClient::ConnectTo(const std::string& socket, int pid) {
  EM_ASSIGN_OR_RETURN(std::unique_ptr<HmmClient> client, Connect(socket));
  if (client->channel_.PeerPid() != pid)
    return Fail(ErrorCode::kUnavailable, "connecting to the hmm (pid {}): another (pid {}) has its name", pid,
                client->channel_.PeerPid());
  return client;
}

Expected<std::unique_ptr<HmmClient>> HmmClient::StartOrAdopt(const HmmOptions& options,
                                                             const core::Placement& placement) {
  if (auto connected = Connect(options.socket)) {
    std::unique_ptr<HmmClient> client = std::move(*connected);
    EM_ASSIGN_OR_RETURN(const Message status, client->channel_.Call({{"op", "status"}}, kCallTimeoutMs));
    client->pid_ = status.body.value("pid", -1);
    client->pidfd_ = Fd(static_cast<int>(::syscall(SYS_pidfd_open, client->pid_, 0)));
    client->adopted_ = true;
    const std::string state = status.body.value("state", "");
    if (status.body.value("fingerprint", "") == HmmFingerprint(options) &&
        (state == "loading" || state == "ready")) {
      LogInfo("adopting the running hmm (pid {}): its weights stay where they are", client->pid_);
      return client;
    }
    LogInfo("the running hmm (pid {}) holds another model or layout: it ends", client->pid_);
    client->Shutdown();
  }
  return Start(options, placement);
}

Expected<std::unique_ptr<HmmClient>> HmmClient::Start(const HmmOptions& options,
                                                      const core::Placement& placement) {
  SpawnOptions spawn;
  spawn.die_with_parent = false;  // it outlives a crashed coordinator, until --linger
  spawn.arguments = {"hmm",
                     "--socket",
                     options.socket,
                     "--model",
                     options.model.string(),
                     "--max-devices",
                     std::to_string(options.max_devices),
                     "--weights",
                     std::string(core::NameOf(options.weights)),
                     "--kv-element-bytes",
                     std::to_string(options.kv_element_bytes),
                     "--kv-memory",
                     std::to_string(options.kv_memory_bytes),
                     "--kv-room",
                     std::to_string(options.kv_room_bytes),
                     "--device-memory",
                     std::to_string(options.device_memory_bytes),
                     "--pages",
                     PagesFlag(options.pages),
                     "--linger",
                     std::to_string(options.linger_seconds),
                     "--load-threads",
                     std::to_string(options.load_threads),
                     "--log-level",
                     options.log_level};
  if (options.domain_per_device) spawn.arguments.push_back("--domain-per-device");
  if (options.standby_memory) spawn.arguments.push_back("--standby-memory");
  EM_ASSIGN_OR_RETURN(Process process, SpawnSelf(spawn));
  for (int attempt = 0; attempt < 2000; ++attempt) {
    if (auto connected = Connect(options.socket)) {
      std::unique_ptr<HmmClient> client = std::move(*connected);
      client->pid_ = process.pid;
      client->pidfd_ = std::move(process.pidfd);
      if (auto loading = client->Call({{"op", "load"}, {"placement", ToJson(placement)}}); !loading) {
        client->Shutdown();
        return tl::unexpected<Error>(loading.error());
      }
      return client;
    }
    if (Gone(process.pidfd.get(), 5)) {
      ::waitpid(process.pid, nullptr, WNOHANG);
      return Fail(ErrorCode::kUnavailable, "starting the hmm: it ended at once; its lines above say why");
    }
  }
  return Fail(ErrorCode::kDeadlineExceeded, "starting the hmm: it does not answer on @{}", options.socket);
}

Expected<bool> HmmClient::Ready(std::uint64_t& loaded_bytes, std::uint64_t& total_bytes) {
  EM_ASSIGN_OR_RETURN(const Message status, channel_.Call({{"op", "status"}}, kCallTimeoutMs));
  loaded_bytes = status.body.value("loaded_bytes", std::uint64_t{0});
  total_bytes = status.body.value("total_bytes", std::uint64_t{0});
  const std::string state = status.body.value("state", "");
  if (state == "failed")
    EM_RETURN_IF_ERROR(StatusOf(Json{{"error", status.body.value("failure", Json::object())}}));
  return state == "ready";
}

Status HmmClient::AwaitReady(const std::function<void(std::uint64_t, std::uint64_t)>& progress) {
  for (;;) {
    std::uint64_t loaded = 0, total = 0;
    EM_ASSIGN_OR_RETURN(const bool ready, Ready(loaded, total));
    progress(loaded, total);
    if (ready) return {};
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
}

Expected<AttachedMemory> HmmClient::Describe() {
  EM_ASSIGN_OR_RETURN(Message answer, Call({{"op", "describe"}}));
  AttachedMemory memory;
  EM_ASSIGN_OR_RETURN(memory.map, MemoryMapFromJson(answer.body));
  memory.fds = std::move(answer.fds);
  if (memory.fds.size() != memory.map.domains.size())
    return Fail(ErrorCode::kDataLoss, "describing memory: domains={} descriptors={}",
                memory.map.domains.size(), memory.fds.size());
  return memory;
}

Status HmmClient::Record(const core::Placement& placement) {
  EM_RETURN_IF_ERROR(Call({{"op", "record"}, {"placement", ToJson(placement)}}));
  return {};
}

Expected<core::Placement> HmmClient::Recorded() {
  EM_ASSIGN_OR_RETURN(const Message answer, Call({{"op", "recorded"}}));
  return PlacementFromJson(answer.body.value("placement", Json::object()));
}

Expected<Message> HmmClient::Call(const Json& request) {
  return channel_.Call(request, kCallTimeoutMs);
}

void HmmClient::Shutdown() {
  (void)channel_.Call({{"op", "shutdown"}}, 1000);
  channel_.Close();
  Gone(pidfd_.get(), 5000);
  ::waitpid(pid_, nullptr, WNOHANG);
}

}  // namespace elasticmoe::runtime
