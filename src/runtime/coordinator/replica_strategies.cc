// How a set of engines changes its size by replacing or adding engines (see replica_set.h). Each is done as
// fast as this code can: workers start up while weights are loaded, nothing is waited for that need not be.
#include <algorithm>
#include <chrono>

#include "base/clock.h"
#include "base/log.h"
#include "runtime/coordinator/replica_set.h"

namespace elasticmoe::runtime {
namespace {

constexpr std::chrono::milliseconds kPoll{5};
constexpr std::chrono::seconds kAccountEvery{60};
constexpr std::chrono::seconds kKvPatience{20};          // for the old engine to give up half of its KV
constexpr std::chrono::seconds kFirstTokenPatience{30};  // where no request comes, there is none to wait for

}  // namespace

void ReplicaSet::Publish(const core::ResizeReport& report) {
  const std::scoped_lock lock(mutex_);
  core::ResizeReport& mine = reports_.back();
  const auto first_capacity = report.first_capacity ? report.first_capacity : mine.first_capacity;
  mine = report;
  mine.first_capacity = first_capacity;
  mine.refused = static_cast<int>(refused_);
  mine.failed = static_cast<int>(failed_);
  mine.longest_step_gap = longest_gap_;
  changed_.notify_all();
}

Status ReplicaSet::Traced(std::string name, const std::function<Status()>& task) {
  TraceSpan span{std::move(name), "engines", Now(), 0};
  Status status = task();
  span.end = Now();
  if (!status) span.args["error"] = status.error().message;
  trace_.Add(std::move(span));
  return status;
}

void ReplicaSet::Loop(const std::stop_token& stop) {
  for (;;) {
    core::ResizeReport report;
    {
      std::unique_lock lock(mutex_);
      while (!changed_.wait_for(lock, stop, kAccountEvery, [&] { return running_.has_value(); })) {
        if (stop.stop_requested()) return;
        lock.unlock();
        (void)Stats();  // reads the energy counters before they wrap
        lock.lock();
      }
      report = reports_.back();
    }
    Status status = Run(report);
    report.finished = Now();
    report.state = status ? core::ResizeState::kDone : core::ResizeState::kAborted;
    if (!status) report.error = status.error();
    LogInfo("resize {} ({}) {} after {:.1f} ms: {} -> {} devices{}", report.operation, report.strategy,
            core::ToString(report.state), static_cast<double>(*report.finished - report.started) / 1e6,
            report.from.size(), Devices(), status ? "" : "; " + status.error().message);
    trace_.Add({fmt::format("{} -> {} devices ({})", report.from.size(), report.to.size(), report.strategy),
                "operation", report.started, *report.finished});
    Publish(report);
    Ended(report);
    bool requests = false;
    {
      const std::scoped_lock lock(mutex_);
      running_.reset();
      changed_.notify_all();
      requests = !routes_.empty();
    }
    // They came while it fell asleep.
    if (const auto primary = Primary(); requests && primary && primary->engine->Asleep()) WakeForRequests();
  }
}

Status ReplicaSet::Run(core::ResizeReport& report) {
  const int devices = static_cast<int>(report.to.size());
  if (report.strategy == "sleep") return Sleep(report);
  if (report.strategy == "wake") return Wake(report, devices);
  if (report.strategy == "cold-restart") return ColdRestart(report, devices);
  if (report.strategy == "horizontal") return Horizontal(report, devices);
  return ReplaceBeside(report, devices, report.strategy == "colocated");
}

void ReplicaSet::Serves(core::ResizeReport& report) {
  report.serving = Now();
  report.stages_committed = 1;
  report.state = core::ResizeState::kSettling;
  Publish(report);
}

// Where requests are there; whoever comes later is noted when the operation has ended.
void ReplicaSet::AwaitFirstToken(core::ResizeReport& report, MemberId id) {
  std::unique_lock lock(mutex_);
  awaits_token_ = {report.operation, id};
  changed_.wait_for(lock, thread_.get_stop_token(), kFirstTokenPatience,
                    [&] { return members_.at(id).first_token.has_value() || routes_.empty(); });
  report.first_capacity = members_.at(id).first_token;
}

Expected<ReplicaSet::MemberId> ReplicaSet::Add(EngineOptions options) {
  std::unique_ptr<ElasticEngine> engine;
  EM_RETURN_IF_ERROR(
      Traced(fmt::format("load and start an engine of {} devices", options.devices), [&]() -> Status {
        EM_ASSIGN_OR_RETURN(engine, ElasticEngine::Start(options, [](std::uint64_t, std::uint64_t) {}));
        return {};
      }));
  auto replica = Wrap(std::move(engine));
  const std::scoped_lock lock(mutex_);
  if (stopping_) return Fail(ErrorCode::kUnavailable, "the server is stopping");
  members_[next_member_].replica = std::move(replica);
  return next_member_++;
}

EngineOptions ReplicaSet::Beside(int devices, bool other_cores) {
  EngineOptions options = options_;
  options.devices = devices;
  options.hmm_socket = fmt::format("{}/{}", options_.hmm_socket, ++beside_);
  if (other_cores) options.first_cpu = options_.first_cpu + Devices() * options_.threads_per_device;
  return options;
}

void ReplicaSet::DrainAndEnd(MemberId id) {
  std::shared_ptr<Replica> replica;
  (void)Traced("drain the old engine", [&]() -> Status {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, thread_.get_stop_token(), [&] { return members_.at(id).requests == 0; });
    replica = std::move(members_.at(id).replica);
    members_.erase(id);
    return {};
  });
  (void)Traced("end the old engine", [&]() -> Status {
    replica.reset();
    return {};
  });
}

Status ReplicaSet::ResizeWithin(const core::ResizeReport& report, int devices) {
  const auto primary = Primary();
  core::ResizeCommand command;
  command.count = devices;
  command.operation = fmt::format("{}/{}", report.operation, devices);
  EM_RETURN_IF_ERROR(primary->controller->Start(command));
  while (!thread_.get_stop_token().stop_requested()) {
    const auto now = primary->controller->Await(command.operation, TimeNs{100'000'000});
    if (!now || !now->finished) continue;
    if (now->error) return tl::unexpected<Error>(*now->error);
    return {};
  }
  return Fail(ErrorCode::kUnavailable, "the server is stopping");
}

Status ReplicaSet::Sleep(core::ResizeReport& report) {
  if (Primary()->controller->Running())
    return Fail(ErrorCode::kFailedPrecondition, "going to sleep: a resize has just begun");
  if (report.from.size() > 1) EM_RETURN_IF_ERROR(ResizeWithin(report, 1));
  EM_RETURN_IF_ERROR(Traced("give memory up", [&] { return Primary()->engine->Sleep(); }));
  Serves(report);
  return {};
}

Status ReplicaSet::Wake(core::ResizeReport& report, int devices) {
  const auto primary = Primary();
  MemberId id = 0;
  {
    const std::scoped_lock lock(mutex_);
    id = members_.begin()->first;
    members_.begin()->second.first_token.reset();
  }
  if (Status woken = Traced("attach", [&] { return primary->engine->Wake(); }); !woken) {
    primary->engine->FailWaiting("the server could not wake: " + woken.error().message);
    return woken;
  }
  if (devices > 1) EM_RETURN_IF_ERROR(ResizeWithin(report, devices));
  Serves(report);
  AwaitFirstToken(report, id);
  return {};
}

Status ReplicaSet::ColdRestart(core::ResizeReport& report, int devices) {
  std::shared_ptr<Replica> old;
  {
    const std::scoped_lock lock(mutex_);
    old = std::move(members_.begin()->second.replica);
    members_.clear();
  }
  const TimeNs down_since = Now();
  old->engine->FailAll("the server is restarted at another size");
  const std::string socket = old->engine->options().hmm_socket;
  (void)Traced("end the old engine", [&]() -> Status {
    old.reset();
    return {};
  });
  EngineOptions options = options_;
  options.hmm_socket = socket;
  options.devices = devices;
  auto added = Add(options);
  if (!added) {  // back to the size that is known to work
    LogError("{}", added.error().message);
    options.devices = static_cast<int>(report.from.size());
    EM_RETURN_IF_ERROR(Add(options));
    return tl::unexpected<Error>(std::move(added.error()));
  }
  {
    const std::scoped_lock lock(mutex_);
    if (refused_ + failed_ > 0) longest_gap_ = std::max(longest_gap_, Now() - down_since);
  }
  Serves(report);
  AwaitFirstToken(report, *added);
  return {};
}

Status ReplicaSet::ReplaceBeside(core::ResizeReport& report, int devices, bool colocated) {
  const MemberId old = Accepting().front();
  EngineOptions options = Beside(devices, !colocated);
  const std::size_t kv = options_.kv_memory_bytes;
  const auto primary = Primary();
  const auto give_back = [&] { primary->controller->SetKvMemory(kv); };
  if (colocated) {
    options.kv_memory_bytes = kv / 2;
    options.kv_room_bytes = kv;
    const std::uint64_t blocks = primary->engine->Stats().kv_blocks;
    primary->controller->SetKvMemory(kv / 2);
    const auto deadline = std::chrono::steady_clock::now() + kKvPatience;
    // A chunk more may stay: halves are rounded.
    while (primary->engine->Stats().kv_blocks > blocks * 3 / 4) {
      if (std::chrono::steady_clock::now() > deadline) {
        give_back();
        return Fail(ErrorCode::kResourceExhausted,
                    "colocating: the old engine could not give up half of its KV memory");
      }
      std::this_thread::sleep_for(kPoll);
    }
  }
  auto added = Add(options);
  if (!added) {
    if (colocated) give_back();
    return tl::unexpected<Error>(std::move(added.error()));
  }
  {
    const std::scoped_lock lock(mutex_);
    members_.at(old).accepts = false;
  }
  Serves(report);
  DrainAndEnd(old);
  if (colocated) Primary()->controller->SetKvMemory(kv);
  AwaitFirstToken(report, *added);
  return {};
}

Status ReplicaSet::Horizontal(core::ResizeReport& report, int devices) {
  const int size = static_cast<int>(report.from.size()) / Replicas();
  std::optional<MemberId> added;
  while (Replicas() * size < devices) {
    EM_ASSIGN_OR_RETURN(added, Add(Beside(size, true)));
  }
  std::vector<MemberId> accepting = Accepting();
  std::vector<MemberId> ending;
  {
    const std::scoped_lock lock(mutex_);
    while (static_cast<int>(accepting.size()) * size > devices) {
      ending.push_back(accepting.back());
      members_.at(accepting.back()).accepts = false;
      accepting.pop_back();
    }
  }
  Serves(report);
  for (const MemberId id : ending) DrainAndEnd(id);
  if (added) AwaitFirstToken(report, *added);
  return {};
}

}  // namespace elasticmoe::runtime
