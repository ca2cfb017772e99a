#include "runtime/coordinator/replica_set.h"

#include <algorithm>
#include <chrono>

#include "base/clock.h"
#include "base/log.h"

namespace elasticmoe::runtime {
namespace {

constexpr int kReportsKept = 64;
constexpr char kSleep[] = "sleep", kWake[] = "wake";  // not chosen by a caller: going to zero and back

bool HandledByController(const std::string& strategy) {
  return strategy == "elastic" || strategy == "drain" || strategy == "rebalance";
}

std::vector<DeviceId> DeviceRange(int count) {
  std::vector<DeviceId> devices;
  for (int i = 0; i < count; ++i) devices.emplace_back(i);
  return devices;
}

}  // namespace

ReplicaSet::Replica::~Replica() {
  controller.reset();  // it calls the engine
}

Expected<std::unique_ptr<ReplicaSet>> ReplicaSet::Start(const EngineOptions& options,
                                                        const Progress& progress) {
  std::unique_ptr<ReplicaSet> set(new ReplicaSet(options));
  EM_ASSIGN_OR_RETURN(auto engine, ElasticEngine::Start(options, progress));
  set->spec_ = engine->Spec();
  set->max_model_len_ = engine->MaxModelLen();
  set->members_[set->next_member_++].replica = set->Wrap(std::move(engine));
  set->Account();
  set->thread_ = std::jthread([set = set.get()](const std::stop_token& stop) { set->Loop(stop); });
  return set;
}

ReplicaSet::~ReplicaSet() {
  {
    const std::scoped_lock lock(mutex_);
    stopping_ = true;
  }
  thread_.request_stop();
  if (thread_.joinable()) thread_.join();
  std::map<MemberId, Member> members;
  {
    const std::scoped_lock lock(mutex_);
    members.swap(members_);
  }
}

std::shared_ptr<ReplicaSet::Replica> ReplicaSet::Wrap(std::unique_ptr<ElasticEngine> engine) {
  auto replica = std::make_shared<Replica>();
  replica->engine = std::move(engine);
  replica->engine->SetStepObserver(
      [this](const core::StepShape& shape, double seconds) { log_.Stepped(shape, seconds); });
  replica->controller = std::make_unique<ResizeController>(
      *replica->engine, [this](const core::ResizeReport& report) { Ended(report); });
  return replica;
}

void ReplicaSet::SetResizeObserver(std::function<void(const core::ResizeReport&)> observer) {
  const std::scoped_lock lock(observer_mutex_);
  observer_ = std::move(observer);
}

void ReplicaSet::Ended(const core::ResizeReport& report) {
  cost_.SetDevices(Now(), static_cast<int>((report.error ? report.from : report.to).size()));
  log_.Resized(report);
  const std::scoped_lock lock(observer_mutex_);
  if (observer_) observer_(report);
}

std::optional<Json> ReplicaSet::TraceOf(const std::string& operation) const {
  if (auto mine = trace_.Find(operation)) return mine;
  const auto primary = Primary();
  return primary ? primary->controller->Trace().Find(operation) : std::nullopt;
}

// ---------------------------------------------------------------- requests

Status ReplicaSet::Submit(core::GenerationRequest request, Sink sink) {
  MemberId id = 0;
  std::shared_ptr<Replica> replica;
  const RequestId request_id = request.id;
  log_.Arrived(request_id, Now(), static_cast<int>(request.prompt.size()));
  {
    const std::scoped_lock lock(mutex_);
    for (auto& [member_id, member] : members_)
      if (member.accepts && (id == 0 || member.requests < members_.at(id).requests)) id = member_id;
    if (id == 0) {
      ++refused_;
      log_.Refused(request_id, Now(), true);
      return Fail(ErrorCode::kUnavailable, "the server is being restarted at another size; try again later");
    }
    replica = members_.at(id).replica;
    if (routes_.empty()) last_token_ = Now();
    ++members_.at(id).requests;
    routes_[request_id] = id;
  }
  Status status = replica->engine->Submit(std::move(request),
                                          [this, id, sink = std::move(sink)](const core::TokenEvent& event) {
                                            Note(id, event);
                                            sink(event);
                                          });
  if (status && replica->engine->Asleep()) WakeForRequests();
  if (!status) {
    log_.Refused(request_id, Now(), status.error().code != ErrorCode::kInvalidArgument);
    const std::scoped_lock lock(mutex_);
    if (status.error().code == ErrorCode::kUnavailable) ++refused_;
    if (routes_.erase(request_id) > 0)
      if (const auto at = members_.find(id); at != members_.end()) --at->second.requests;
  }
  return status;
}

void ReplicaSet::Note(MemberId id, const core::TokenEvent& event) {
  log_.Event(event, Now());
  const std::scoped_lock lock(mutex_);
  const auto at = members_.find(id);
  if (!event.tokens.empty()) {
    const TimeNs now = Now();
    longest_gap_ = std::max(longest_gap_, now - last_token_);
    last_token_ = now;
    if (at != members_.end() && !at->second.first_token) {
      at->second.first_token = now;
      if (awaits_token_ && awaits_token_->second == id) {
        for (core::ResizeReport& report : reports_)
          if (report.operation == awaits_token_->first && !report.first_capacity) report.first_capacity = now;
        awaits_token_.reset();
      }
      changed_.notify_all();
    }
  }
  if (!event.finish) return;
  if (*event.finish == core::FinishReason::kError) ++failed_;
  if (routes_.erase(event.request) > 0 && at != members_.end()) {
    --at->second.requests;
    changed_.notify_all();
  }
}

void ReplicaSet::Cancel(RequestId request) {
  std::shared_ptr<Replica> replica;
  {
    const std::scoped_lock lock(mutex_);
    const auto route = routes_.find(request);
    if (route == routes_.end()) return;
    if (const auto member = members_.find(route->second); member != members_.end())
      replica = member->second.replica;
  }
  if (replica) replica->engine->Cancel(request);
}

EngineStats ReplicaSet::Stats() const {
  std::vector<std::shared_ptr<Replica>> replicas;
  {
    const std::scoped_lock lock(mutex_);
    for (const auto& [id, member] : members_) replicas.push_back(member.replica);
  }
  EngineStats sum;
  double used = 0;
  for (const auto& replica : replicas) {
    EngineStats one = replica->engine->Stats();
    sum.running += one.running;
    sum.waiting += one.waiting;
    used += one.kv_usage * static_cast<double>(one.kv_blocks);
    sum.kv_blocks += one.kv_blocks;
    sum.steps += one.steps;
    sum.step_ns += one.step_ns;
    sum.between_steps_ns += one.between_steps_ns;
    for (std::size_t i = 0; i < sum.steps_by_rows.size(); ++i) sum.steps_by_rows[i] += one.steps_by_rows[i];
    sum.step_rows += one.step_rows;
    sum.preemptions += one.preemptions;
    sum.prefix_queries += one.prefix_queries;
    sum.prefix_hits += one.prefix_hits;
    sum.epoch = std::max(sum.epoch, one.epoch);
    sum.recoveries += one.recoveries;
    sum.standby += one.standby;
    sum.devices.insert(sum.devices.end(), one.devices.begin(), one.devices.end());
    sum.domains.insert(sum.domains.end(), one.domains.begin(), one.domains.end());
    for (const auto& [device, phase] : replica->controller->Phases())
      ++sum.phases[std::string(core::ToString(phase))];
  }
  sum.resizing = RunningResize().has_value();
  Account();
  const ServingLog::Totals totals = log_.Sums();
  sum.cost = cost_.Read(Now(), totals.busy_device_s);
  sum.cost.requests = totals.requests;
  sum.cost.output_tokens = totals.output_tokens;
  sum.kv_usage = sum.kv_blocks == 0 ? 0 : used / static_cast<double>(sum.kv_blocks);
  return sum;
}

void ReplicaSet::StopAccepting() {
  const std::scoped_lock lock(mutex_);
  stopping_ = true;
  for (auto& [id, member] : members_) member.replica->engine->StopAccepting();
}

int ReplicaSet::Devices() const {
  return static_cast<int>(Stats().devices.size());
}

std::vector<ReplicaSet::MemberId> ReplicaSet::Accepting() const {
  const std::scoped_lock lock(mutex_);
  std::vector<MemberId> ids;
  for (const auto& [id, member] : members_)
    if (member.accepts) ids.push_back(id);
  return ids;
}

int ReplicaSet::Replicas() const {
  return static_cast<int>(Accepting().size());
}

std::shared_ptr<ReplicaSet::Replica> ReplicaSet::Primary() const {
  const std::scoped_lock lock(mutex_);
  return members_.empty() ? nullptr : members_.begin()->second.replica;
}

// ---------------------------------------------------------------- operations

Expected<core::ResizeReport> ReplicaSet::Resize(core::ResizeCommand command) {
  auto report = StartResize(std::move(command));
  if (report) {
    commanded_ = Now();
    Account();
  }
  return report;
}

Expected<core::ResizeReport> ReplicaSet::StartResize(core::ResizeCommand command) {
  const std::scoped_lock starting(start_mutex_);
  // Operations of the controller and of this set have ids of one kind.
  if (auto known = FindResize(command.operation);
      known && !(HandledByController(known->strategy) && HandledByController(command.strategy))) {
    const bool same =
        known->strategy == command.strategy ||
        (command.strategy == "elastic" && (known->strategy == kSleep || known->strategy == kWake));
    if (same && static_cast<int>(known->to.size()) == command.count) return *known;
    return Fail(ErrorCode::kAlreadyExists,
                "starting a resize: operation={} was started with another target; choose a new id",
                command.operation);
  }
  if (const auto running = RunningResize(); running && running->operation != command.operation)
    return Fail(
        ErrorCode::kFailedPrecondition,
        "starting a resize: operation={} from {} to {} devices runs (state={}); wait for it or cancel it",
        running->operation, running->from.size(), running->to.size(), core::ToString(running->state));
  const auto primary = Primary();
  if (!primary) return Fail(ErrorCode::kUnavailable, "starting a resize: the server is being restarted");
  const bool asleep = primary->engine->Asleep();
  if (command.strategy == "elastic" && (asleep || command.count == 0) && command.target.empty()) {
    if (!command.victims.empty() && asleep)
      return Fail(ErrorCode::kInvalidArgument, "remove: the server sleeps, it has no devices");
    command.strategy = command.count == 0 ? kSleep : kWake;
    command.victims.clear();
  } else if (asleep) {
    return Fail(ErrorCode::kFailedPrecondition,
                "starting a resize: the server sleeps; wake it first (devices=1, strategy=elastic)");
  }
  if (HandledByController(command.strategy)) {
    if (Replicas() > 1)
      return Fail(ErrorCode::kFailedPrecondition,
                  "starting a resize: {} replicas serve; go back to one by strategy=horizontal first",
                  Replicas());
    return primary->controller->Start(std::move(command));
  }
  const bool sleeps = command.strategy == kSleep && command.count == 0;
  if (!sleeps && !(command.strategy == kWake && asleep) && command.strategy != "cold-restart" &&
      command.strategy != "extravagant" && command.strategy != "colocated" &&
      command.strategy != "horizontal")
    return Fail(ErrorCode::kInvalidArgument,
                "strategy: {} is none of elastic, drain, cold-restart, extravagant, colocated, horizontal",
                command.strategy);
  const int present = Devices();
  if ((command.count < 1 && !sleeps) || command.count > options_.max_devices)
    return Fail(ErrorCode::kInvalidArgument, "devices: {} is not in 1..{} (--max-devices)", command.count,
                options_.max_devices);
  if (!command.victims.empty())
    return Fail(ErrorCode::kInvalidArgument, "remove: strategy={} cannot choose devices", command.strategy);
  const int size = present / std::max(Replicas(), 1);
  if (command.strategy == "horizontal" && command.count % size != 0)
    return Fail(ErrorCode::kInvalidArgument, "devices: {} is no multiple of {}, the size of a replica",
                command.count, size);
  if (command.strategy != "horizontal" && Replicas() > 1)
    return Fail(ErrorCode::kFailedPrecondition,
                "starting a resize: {} replicas serve; go back to one by strategy=horizontal first",
                Replicas());
  core::ResizeReport report;
  report.operation = command.operation;
  report.strategy = command.strategy;
  report.from = DeviceRange(present);
  report.to = DeviceRange(command.count);
  report.started = Now();
  report.state = core::ResizeState::kProvisioning;
  report.stages = 1;
  const std::scoped_lock lock(mutex_);
  if (stopping_) return Fail(ErrorCode::kUnavailable, "the server is stopping");
  running_ = command.operation;
  trace_.Begin(command.operation);
  refused_ = failed_ = 0;
  longest_gap_ = 0;
  last_token_ = Now();
  reports_.push_back(report);
  if (reports_.size() > kReportsKept) reports_.pop_front();
  changed_.notify_all();
  return report;
}

Expected<core::ResizeReport> ReplicaSet::CancelResize(const std::string& operation) {
  if (const auto known = FindResize(operation); known && !HandledByController(known->strategy))
    return Fail(ErrorCode::kFailedPrecondition, "cancelling a resize: strategy={} cannot be taken back",
                known->strategy);
  const auto primary = Primary();
  if (!primary) return Fail(ErrorCode::kNotFound, "cancelling a resize: operation={} is unknown", operation);
  return primary->controller->Cancel(operation);
}

std::optional<core::ResizeReport> ReplicaSet::FindResize(const std::string& operation) const {
  {
    const std::scoped_lock lock(mutex_);
    for (const core::ResizeReport& report : reports_)
      if (report.operation == operation) return report;
  }
  const auto primary = Primary();
  return primary ? primary->controller->Find(operation) : std::nullopt;
}

std::optional<core::ResizeReport> ReplicaSet::RunningResize() const {
  {
    const std::scoped_lock lock(mutex_);
    if (running_) return reports_.back();
  }
  const auto primary = Primary();
  return primary ? primary->controller->Running() : std::nullopt;
}

std::optional<core::ResizeReport> ReplicaSet::AwaitResize(const std::string& operation,
                                                          TimeNs timeout_ns) const {
  {
    std::unique_lock lock(mutex_);
    if (running_ == operation)
      changed_.wait_for(lock, std::chrono::nanoseconds(timeout_ns), [&] { return running_ != operation; });
  }
  const auto report = FindResize(operation);
  if (!report || !HandledByController(report->strategy)) return report;
  const auto primary = Primary();
  return primary ? primary->controller->Await(operation, timeout_ns) : report;
}

}  // namespace elasticmoe::runtime
