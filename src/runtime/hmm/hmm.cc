#include "runtime/hmm/hmm.h"

#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <list>
#include <optional>
#include <thread>

#include "base/clock.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/log.h"
#include "model/gguf/gguf.h"
#include "runtime/channel.h"
#include "runtime/hmm/memory_owner.h"
#include "runtime/process.h"

namespace elasticmoe::runtime {
namespace {

constexpr std::int64_t kPollNs = 1'000'000'000;
constexpr std::chrono::seconds kFirstPatience{10};  // for the first coordinator, who has started it
constexpr std::int64_t kIdleNs = 300'000'000;  // this long after a request, work on standby memory begins
constexpr std::int64_t kStandbyPause = 1;      // times as long as a piece of it took

struct Connection {
  Channel channel;
  bool coordinator = false;
  int device = -1;
};

class Hmm {
 public:
  Hmm(const HmmOptions& options, Listener listener)
      : options_(options), fingerprint_(HmmFingerprint(options)), listener_(std::move(listener)) {}

  int Serve() {
    auto alone_since = std::chrono::steady_clock::now();
    std::chrono::seconds patience = std::max(kFirstPatience, std::chrono::seconds(options_.linger_seconds));
    while (!stopping_) {
      std::vector<pollfd> polled{{listener_.fd(), POLLIN, 0}};
      for (const Connection& connection : connections_)
        polled.push_back({connection.channel.fd(), POLLIN, 0});
      if (::poll(polled.data(), polled.size(), static_cast<int>(standby_wait_ns_ / 1'000'000)) == 0)
        BackStandby();
      else
        standby_wait_ns_ = kIdleNs;
      if (polled[0].revents != 0)
        if (auto channel = listener_.Accept()) connections_.push_back(Connection{std::move(*channel)});
      std::size_t index = 1;
      for (auto at = connections_.begin(); at != connections_.end() && index < polled.size() && !stopping_;
           ++index) {
        const bool alive = polled[index].revents == 0 || Answer(*at);
        at = alive ? std::next(at) : connections_.erase(at);
      }
      const auto now = std::chrono::steady_clock::now();
      for (const Connection& connection : connections_)
        if (connection.coordinator) {
          alone_since = now;
          patience = std::chrono::seconds(options_.linger_seconds);
        }
      if (now - alone_since > patience) {
        LogInfo("no coordinator for {} s: giving the memory back", options_.linger_seconds);
        break;
      }
    }
    return 0;
  }

 private:
  enum class State { kEmpty, kLoading, kReady, kFailed };

  // While nobody asks for anything, and a part of the time only: clearing memory takes a core and bandwidth
  // from the devices.
  void BackStandby() {
    const std::int64_t begin = Now();
    const bool more = state_.load(std::memory_order_acquire) == State::kReady && owner_->BackStandby();
    standby_wait_ns_ =
        more ? std::clamp<std::int64_t>(kStandbyPause * (Now() - begin), 1'000'000, kIdleNs) : kPollNs;
  }

  Expected<Json> Load(const Json& request) {
    if (owner_) return Fail(ErrorCode::kFailedPrecondition, "loading: it is done or under way");
    EM_ASSIGN_OR_RETURN(const core::Placement placement, PlacementFromJson(request.at("placement")));
    EM_ASSIGN_OR_RETURN(owner_, MemoryOwner::Create(options_, placement));
    recorded_ = request.at("placement");
    state_.store(State::kLoading, std::memory_order_release);
    loader_ = std::jthread([this] {
      const auto start = std::chrono::steady_clock::now();
      if (Status status = owner_->Load(); !status) {
        failure_ = status.error();
        state_.store(State::kFailed, std::memory_order_release);
        return;
      }
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      LogInfo("loaded {:.1f} MiB in {:.2f} s", static_cast<double>(owner_->TotalBytes()) / (1 << 20),
              seconds);
      state_.store(State::kReady, std::memory_order_release);
    });
    return Json::object();
  }

  // False where the connection has ended.
  bool Answer(Connection& connection) {
    auto message = connection.channel.Receive(0);
    if (!message) return message.error().code == ErrorCode::kDeadlineExceeded;
    std::vector<int> fds;
    auto answer = Handle(connection, message->body, fds);
    return connection.channel.Send(answer ? *answer : ErrorBody(answer.error()), fds).has_value();
  }

  Expected<Json> Handle(Connection& connection, const Json& request, std::vector<int>& fds) {
    try {
      const std::string op = request.at("op").get<std::string>();
      if (op == "hello") {
        connection.coordinator = request.at("role") == "coordinator";
        connection.device = request.value("device", -1);
        return Json::object();
      }
      if (op == "status") return StatusBody();
      if (op == "load") return Load(request);
      if (op == "recorded") return Json{{"placement", recorded_}};
      if (op == "shutdown") {
        stopping_ = true;
        return Json::object();
      }
      const State state = state_.load(std::memory_order_acquire);
      if (state == State::kFailed) return tl::unexpected<Error>(failure_);
      if (state == State::kEmpty) return Fail(ErrorCode::kFailedPrecondition, "{}: nothing is loaded", op);
      if (state == State::kLoading)
        return Fail(ErrorCode::kUnavailable, "{}: the weights are being loaded", op);
      return Operate(op, request, fds);
    } catch (const nlohmann::json::exception& e) {
      return Fail(ErrorCode::kInvalidArgument, "reading a request to the hmm: {}", e.what());
    }
  }

  Json StatusBody() const {
    const State state = state_.load(std::memory_order_acquire);
    Json body = {{"state", state == State::kEmpty     ? "empty"
                           : state == State::kLoading ? "loading"
                           : state == State::kReady   ? "ready"
                                                      : "failed"},
                 {"loaded_bytes", owner_ ? owner_->LoadedBytes() : 0},
                 {"total_bytes", owner_ ? owner_->TotalBytes() : 0},
                 {"fingerprint", fingerprint_},
                 {"pid", ::getpid()}};
    if (state == State::kFailed) body["failure"] = ErrorBody(failure_)["error"];
    return body;
  }

  Json Described(std::vector<int>& fds) const {
    const MemoryMap map = owner_->Describe();
    for (const DomainMap& domain : map.domains) fds.push_back(owner_->DomainFd(domain.domain));
    return ToJson(map);
  }

  static std::vector<ExpertId> Experts(const Json& request) {
    std::vector<ExpertId> experts;
    for (const Json& pair : request.at("experts"))
      experts.push_back({pair.at(0).get<int>(), pair.at(1).get<int>()});
    return experts;
  }

  static std::vector<int> Cpus(const Json& request) { return request.value("cpus", std::vector<int>{}); }

  Expected<Json> Operate(const std::string& op, const Json& request, std::vector<int>& fds) {
    const auto domain = [&](const char* key) { return DomainId(request.at(key).get<int>()); };
    if (op == "describe") return Described(fds);
    if (op == "accounts") {
      Json attached = Json::array();
      for (const Connection& connection : connections_)
        if (connection.device >= 0) attached.push_back(connection.device);
      return Json{
          {"domains", owner_->Accounts()}, {"attached", attached}, {"standby_bytes", owner_->StandbyBytes()}};
    }
    if (op == "set_kv") {
      EM_ASSIGN_OR_RETURN(const auto chunks,
                          owner_->SetKvChunks(domain("domain"), DeviceId(request.at("device").get<int>()),
                                              request.at("chunks").get<int>()));
      return Json{{"kv_chunks", chunks}};
    }
    if (op == "open_domain") {
      EM_RETURN_IF_ERROR(owner_->OpenDomain(domain("domain")));
      return Json{{"shared_bytes", owner_->SharedBytes()}};
    }
    if (op == "shared_bytes") return Json{{"shared_bytes", owner_->SharedBytes()}};
    if (op == "copy_shared") {
      EM_ASSIGN_OR_RETURN(const CopyReport report,
                          owner_->CopyShared(domain("to"), request.at("offset").get<std::uint64_t>(),
                                             request.at("bytes").get<std::uint64_t>(), Cpus(request)));
      return Json{{"bytes", report.bytes}, {"ns", report.duration_ns}};
    }
    if (op == "close_domain") {
      EM_RETURN_IF_ERROR(owner_->CloseDomain(domain("domain")));
      return Json{{"shared_bytes", owner_->SharedBytes()}};
    }
    if (op == "record") {
      EM_RETURN_IF_ERROR(PlacementFromJson(request.at("placement")));
      recorded_ = request.at("placement");
      return Json::object();
    }
    if (op == "copy_experts") {
      EM_ASSIGN_OR_RETURN(const CopyReport report,
                          owner_->CopyExperts(domain("from"), domain("to"), Experts(request), Cpus(request)));
      return Json{{"bytes", report.bytes}, {"ns", report.duration_ns}, {"offsets", report.offsets}};
    }
    if (op == "drop_experts") {
      EM_ASSIGN_OR_RETURN(const int pages, owner_->DropExperts(domain("domain"), Experts(request)));
      return Json{{"pages", pages}};
    }
    if (op == "move_experts") {
      EM_RETURN_IF_ERROR(owner_->MoveExperts(DeviceId(request.at("device").get<int>()), Experts(request)));
      return Json::object();
    }
    if (op == "copy_kv") {
      std::vector<KvPair> pairs;
      for (const Json& p : request.at("blocks"))
        pairs.push_back({DomainId(p.at(0).get<int>()), BlockId(p.at(1).get<int>()),
                         DomainId(p.at(2).get<int>()), BlockId(p.at(3).get<int>())});
      EM_ASSIGN_OR_RETURN(const CopyReport report, owner_->CopyKv(pairs));
      return Json{{"bytes", report.bytes}, {"ns", report.duration_ns}};
    }
    return Fail(ErrorCode::kInvalidArgument, "reading a request to the hmm: op={} is unknown", op);
  }

  HmmOptions options_;
  std::string fingerprint_;
  Listener listener_;
  std::unique_ptr<MemoryOwner> owner_;  // none before `load`
  std::list<Connection> connections_;
  Json recorded_;
  std::atomic<State> state_{State::kEmpty};
  Error failure_;  // written before state_ becomes kFailed
  bool stopping_ = false;
  std::int64_t standby_wait_ns_ = kIdleNs;
  std::jthread loader_;
};

}  // namespace

std::string HmmFingerprint(const HmmOptions& options) {
  std::error_code code;
  const auto canonical = std::filesystem::weakly_canonical(options.model, code);
  std::uint64_t hash = HashBytes(canonical.string());
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(canonical, code))
    if (entry.path().extension() == ".safetensors" || entry.path().filename() == "config.json")
      files.push_back(entry.path());
  if (model::IsGgufPath(canonical))
    if (auto gguf = model::OpenGguf(canonical)) files = std::move(gguf->files);
  std::sort(files.begin(), files.end());
  for (const auto& file : files) {
    hash = HashBytes(file.string(), hash);
    hash = HashCombine(hash, std::filesystem::file_size(file, code));
    hash = HashCombine(hash, static_cast<std::uint64_t>(
                                 std::filesystem::last_write_time(file, code).time_since_epoch().count()));
  }
  for (std::uint64_t value : {std::uint64_t(options.max_devices), std::uint64_t(options.domain_per_device),
                              std::uint64_t(options.kv_element_bytes), std::uint64_t(options.kv_memory_bytes),
                              std::uint64_t(options.device_memory_bytes), std::uint64_t(options.pages),
                              std::uint64_t(options.weights)})
    hash = HashCombine(hash, value);
  return fmt::format("{:016x}", hash);
}

int RunHmm(const HmmOptions& options) {
  ::prctl(PR_SET_NAME, "elasticmoe-hmm");
  auto listener = Listener::Bind(options.socket);
  if (!listener) {
    LogError("{}", listener.error().message);
    return 1;
  }
  Hmm hmm(options, std::move(*listener));
  return hmm.Serve();
}

}  // namespace elasticmoe::runtime
