#include "cli/server_child.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>

#include "base/clock.h"
#include "cli/http_client.h"
#include "runtime/fd.h"

namespace elasticmoe::cli {
namespace {

namespace fs = std::filesystem;

constexpr std::chrono::milliseconds kSampleEvery{10};
constexpr int kSamplesATree = 20;  // finding the processes takes milliseconds of a core that the server needs
constexpr std::chrono::milliseconds kHealthPoll{10};
constexpr int kEndPatienceMs = 30'000;

Expected<int> FreePort() {
  const runtime::Fd socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  if (!socket || ::bind(socket.get(), reinterpret_cast<sockaddr*>(&address), size) != 0 ||
      ::getsockname(socket.get(), reinterpret_cast<sockaddr*>(&address), &size) != 0)
    return Fail(ErrorCode::kUnavailable, "finding a free port on 127.0.0.1 failed");
  return ntohs(address.sin_port);
}

// Parent of each process.
std::map<int, int> Parents() {
  std::map<int, int> parents;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator("/proc", ignored)) {
    const std::string name = entry.path().filename().string();
    int pid = 0;
    if (std::from_chars(name.data(), name.data() + name.size(), pid).ec != std::errc()) continue;
    std::ifstream file(entry.path() / "stat");
    std::string line;
    if (!std::getline(file, line)) continue;
    const std::size_t after = line.rfind(") ");
    if (after == std::string::npos || after + 4 >= line.size()) continue;
    parents[pid] = std::atoi(line.c_str() + after + 4);  // ") S PPID ..."
  }
  return parents;
}

std::vector<int> Tree(int root) {
  const std::map<int, int> parents = Parents();
  std::vector<int> tree{root};
  for (std::size_t i = 0; i < tree.size(); ++i)
    for (const auto& [pid, parent] : parents)
      if (parent == tree[i]) tree.push_back(pid);
  return tree;
}

std::uint64_t OwnMemory(int pid) {
  std::ifstream status(fmt::format("/proc/{}/status", pid));
  std::string word;
  std::uint64_t kilobytes = 0;
  while (status >> word)
    if (word == "RssAnon:" && status >> kilobytes) return kilobytes << 10;
  return 0;
}

// Paths in /proc of the process's shared memory objects.
std::vector<fs::path> MemoryObjects(int pid) {
  std::vector<fs::path> found;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(fmt::format("/proc/{}/fd", pid), ignored))
    if (fs::read_symlink(entry.path(), ignored).string().starts_with("/memfd:"))
      found.push_back(entry.path());
  return found;
}

// What they hold, each object once.
class ObjectBytes {
 public:
  std::uint64_t Of(const fs::path& path) {
    struct stat info {};
    const bool first = ::stat(path.c_str(), &info) == 0 && seen_.emplace(info.st_dev, info.st_ino).second;
    return first ? static_cast<std::uint64_t>(info.st_blocks) * 512 : 0;
  }

 private:
  std::set<std::pair<dev_t, ino_t>> seen_;
};

}  // namespace

Expected<std::unique_ptr<ServerChild>> ServerChild::Start(std::vector<std::string> arguments,
                                                          TimeNs timeout_ns) {
  EM_ASSIGN_OR_RETURN(const int port, FreePort());
  std::unique_ptr<ServerChild> child(new ServerChild());
  child->url_ = fmt::format("http://127.0.0.1:{}", port);
  runtime::SpawnOptions spawn;
  spawn.arguments = {"serve"};
  spawn.arguments.insert(spawn.arguments.end(), arguments.begin(), arguments.end());
  for (const char* more : {"--host", "127.0.0.1", "--linger", "1", "--log-level", "error", "--port"})
    spawn.arguments.emplace_back(more);
  spawn.arguments.push_back(std::to_string(port));
  spawn.quiet = true;
  EM_ASSIGN_OR_RETURN(child->process_, runtime::SpawnSelf(spawn));
  EventLoop loop;
  HttpClient client(loop, *ParseUrl(child->url_), {});
  const TimeNs deadline = loop.Now() + timeout_ns;
  for (;;) {
    const auto health = client.Fetch({.target = "/health", .timeout_ns = 2'000'000'000});
    if (health && health->status == 200) return child;
    if (child->process_.Ended())
      return Fail(ErrorCode::kUnavailable, "starting the server: it ended; its lines above say why");
    if (loop.Now() > deadline)
      return Fail(ErrorCode::kDeadlineExceeded, "starting the server: it is not ready after {} s",
                  timeout_ns / 1'000'000'000);
    std::this_thread::sleep_for(kHealthPoll);
  }
}

ServerChild::~ServerChild() {
  if (process_.pid < 0) return;
  process_.Signal(SIGTERM);
  if (process_.WaitEnd(kEndPatienceMs)) return;
  process_.Signal(SIGKILL);
  process_.WaitEnd(kEndPatienceMs);
}

TreeUsage UsageOfTree(int root_pid) {
  TreeUsage usage;
  ObjectBytes objects;
  for (const int pid : Tree(root_pid)) {
    ++usage.processes;
    usage.memory_bytes += OwnMemory(pid);
    std::ifstream maps(fmt::format("/proc/{}/maps", pid));
    usage.mappings += static_cast<int>(
        std::count(std::istreambuf_iterator<char>(maps), std::istreambuf_iterator<char>(), '\n'));
    std::error_code ignored;
    usage.descriptors +=
        static_cast<int>(std::distance(fs::directory_iterator(fmt::format("/proc/{}/fd", pid), ignored), {}));
    for (const fs::path& path : MemoryObjects(pid)) usage.memory_bytes += objects.Of(path);
  }
  return usage;
}

MemorySampler::MemorySampler(int root_pid)
    : thread_([this, root_pid](const std::stop_token& stop) {
        std::vector<std::pair<int, std::vector<fs::path>>> tree;
        while (!stop.stop_requested()) {
          if (samples_.size() % kSamplesATree == 0) {
            tree.clear();
            for (const int pid : Tree(root_pid)) tree.emplace_back(pid, MemoryObjects(pid));
          }
          MemorySample sample{Now(), 0};
          ObjectBytes objects;
          for (const auto& [pid, paths] : tree) {
            sample.bytes += OwnMemory(pid);
            for (const fs::path& path : paths) sample.bytes += objects.Of(path);
          }
          samples_.push_back(sample);
          std::this_thread::sleep_for(kSampleEvery);
        }
      }) {}

MemorySampler::~MemorySampler() = default;

std::vector<MemorySample> MemorySampler::Stop() {
  thread_.request_stop();
  if (thread_.joinable()) thread_.join();
  return std::move(samples_);
}

}  // namespace elasticmoe::cli
