#include "runtime/coordinator/resize_controller.h"

#include <algorithm>
#include <chrono>

#include "base/clock.h"
#include "base/log.h"

namespace elasticmoe::runtime {
namespace {

constexpr std::string_view kDrain = "drain", kRebalance = "rebalance";
constexpr int kFitPause = 9;                    // times as long as a piece of work on KV memory took
constexpr std::chrono::milliseconds kTick{50};  // deadlines and repeated questions are looked at that often

std::optional<Error> ErrorOf(Status status) {
  if (status) return std::nullopt;
  return std::move(status.error());
}

}  // namespace

ResizeController::ResizeController(ElasticEngine& engine,
                                   std::function<void(const core::ResizeReport&)> on_ended)
    : engine_(engine), on_ended_(std::move(on_ended)), machine_({}, engine.PlacementNow()) {
  engine_.SetTrace(&trace_);
  engine_.SetObserver([this](const core::ResizeEvent& event) { Feed(event); });
  thread_ = std::jthread([this](const std::stop_token& stop) { Loop(stop); });
}

ResizeController::~ResizeController() {
  thread_.request_stop();
  changed_.notify_all();
  thread_.join();
  engine_.SetObserver({});
  engine_.SetTrace(nullptr);
}

void ResizeController::StepLocked(const core::ResizeEvent& event, std::vector<core::ResizeAction>& actions) {
  machine_.Step(Now(), event, actions);
  for (const core::ResizeAction& action : actions) {
    if (std::holds_alternative<core::ReplyAction>(action)) continue;
    if (const auto* ended = std::get_if<core::ReportAction>(&action)) {
      const core::ResizeReport& report = ended->report;
      LogInfo("resize {} {} after {:.1f} ms: {} -> {} devices{}", report.operation,
              core::ToString(report.state),
              static_cast<double>(report.finished.value_or(report.started) - report.started) / 1e6,
              report.from.size(), machine_.placement().members().size(),
              report.error ? "; " + report.error->message : "");
      if (report.strategy == kDrain) release_intake_ = true;
      TraceEnd(report);
      if (on_ended_) on_ended_(report);
      continue;
    }
    queue_.push_back(action);
  }
  changed_.notify_all();
}

void ResizeController::TraceEnd(const core::ResizeReport& report) {
  const TimeNs end = report.finished.value_or(report.started);
  trace_.Add({fmt::format("{} -> {} devices ({})", report.from.size(), report.to.size(), report.strategy),
              "operation",
              report.started,
              end,
              {{"state", std::string(core::ToString(report.state))},
               {"stages", report.stages},
               {"bytes_remapped", report.bytes_remapped},
               {"bytes_copied", report.bytes_copied},
               {"longest_step_gap_ms", static_cast<double>(report.longest_step_gap) / 1e6}}});
  if (report.serving) trace_.Add({"the new size serves", "operation", *report.serving, *report.serving});
  if (report.first_capacity)
    trace_.Add({"first token of a new device", "operation", *report.first_capacity, *report.first_capacity});
}

void ResizeController::Feed(const core::ResizeEvent& event) {
  const std::scoped_lock lock(mutex_);
  std::vector<core::ResizeAction> actions;
  StepLocked(event, actions);
}

Expected<core::ResizeReport> ResizeController::Submit(const core::ResizeEvent& event,
                                                      const std::string& operation) {
  const std::scoped_lock lock(mutex_);
  std::vector<core::ResizeAction> actions;
  StepLocked(event, actions);
  for (const core::ResizeAction& action : actions) {
    const auto* reply = std::get_if<core::ReplyAction>(&action);
    if (reply == nullptr || reply->operation != operation) continue;
    if (reply->error) return tl::unexpected<Error>(*reply->error);
    return reply->report;
  }
  return Fail(ErrorCode::kInternal, "resizing: operation {} got no reply", operation);
}

Expected<core::ResizeReport> ResizeController::Start(core::ResizeCommand command) {
  if (command.strategy != "elastic" && command.strategy != kDrain && command.strategy != kRebalance)
    return Fail(ErrorCode::kUnimplemented, "strategy: {} is not to be had; use elastic, drain or rebalance",
                command.strategy);
  if (command.count > engine_.options().max_devices)
    return Fail(ErrorCode::kInvalidArgument, "devices: {} is above --max-devices={}", command.count,
                engine_.options().max_devices);
  const std::string operation = command.operation;
  if (!Find(operation) && !Running()) EM_RETURN_IF_ERROR(engine_.CheckGrowth(command.count));
  core::PlanFacts facts = engine_.Facts(command.count);
  facts.even_load = command.strategy == kRebalance;
  if (!Running()) trace_.Begin(operation);
  return Submit(core::CommandEvent{std::move(command), facts}, operation);
}

Expected<core::ResizeReport> ResizeController::Cancel(const std::string& operation) {
  return Submit(core::CancelEvent{operation}, operation);
}

std::optional<core::ResizeReport> ResizeController::Find(const std::string& operation) const {
  const std::scoped_lock lock(mutex_);
  const core::ResizeReport* report = machine_.Find(operation);
  return report == nullptr ? std::nullopt : std::optional(*report);
}

std::optional<core::ResizeReport> ResizeController::Running() const {
  const std::scoped_lock lock(mutex_);
  return machine_.Running() ? std::optional(*machine_.Last()) : std::nullopt;
}

std::optional<core::ResizeReport> ResizeController::Await(const std::string& operation,
                                                          TimeNs timeout_ns) const {
  std::unique_lock lock(mutex_);
  const core::ResizeReport* report = nullptr;
  changed_.wait_for(lock, std::chrono::nanoseconds(timeout_ns), [&] {
    report = machine_.Find(operation);
    return report == nullptr || report->finished;
  });
  report = machine_.Find(operation);
  return report == nullptr ? std::nullopt : std::optional(*report);
}

void ResizeController::SetKvMemory(std::size_t bytes) {
  engine_.SetKvMemory(bytes);
  fit_kv_ = true;
  changed_.notify_all();
}

std::map<DeviceId, core::DevicePhase> ResizeController::Phases() const {
  const std::scoped_lock lock(mutex_);
  return machine_.devices();
}

void ResizeController::Loop(const std::stop_token& stop) {
  TimeNs fit_at = 0;  // KV memory is fitted to the devices when nothing else is to be done, not before then
  while (!stop.stop_requested()) {
    std::optional<core::ResizeAction> action;
    {
      std::unique_lock lock(mutex_);
      const auto wait = fit_kv_ ? std::chrono::nanoseconds(std::max<TimeNs>(fit_at - Now(), 0)) : kTick;
      changed_.wait_for(lock, std::min<std::chrono::nanoseconds>(wait, kTick),
                        [&] { return stop.stop_requested() || !queue_.empty(); });
      if (!queue_.empty()) {
        action = std::move(queue_.front());
        queue_.pop_front();
      } else if (machine_.Running()) {
        std::vector<core::ResizeAction> actions;
        StepLocked(core::TrafficEvent{engine_.TakeLongestGap(), 0, 0}, actions);
        actions.clear();
        StepLocked(core::TickEvent{}, actions);
      }
    }
    if (release_intake_.exchange(false)) (void)engine_.HoldIntake(false, stop);
    if (action) {
      Execute(*action, stop);
      fit_kv_ = true;
    } else if (fit_kv_ && Now() >= fit_at) {
      fit_kv_ = false;
      const TimeNs begin = Now();
      auto more = engine_.FitKv();
      if (!more) LogWarn("{}", more.error().message);
      if (more.value_or(false)) fit_kv_ = true;
      // Clearing memory takes a core and bandwidth from the devices: most of the time they have both.
      fit_at = Now() + kFitPause * (Now() - begin);
    }
  }
}

// The paper's switch-over: whoever runs finishes where it is, whoever comes waits.
Status ResizeController::Drain(const std::stop_token& stop) {
  if (Running().value_or(core::ResizeReport{}).strategy != kDrain) return {};
  return engine_.HoldIntake(true, stop);
}

void ResizeController::Execute(const core::ResizeAction& action, const std::stop_token& stop) {
  const TimeNs begin = Now();
  const auto answer = [&](core::Ticket ticket, Status status, std::string name, std::string lane,
                          Json args = {}) {
    if (!status) args["error"] = status.error().message;
    trace_.Add({std::move(name), std::move(lane), begin, Now(), std::move(args)});
    Feed(core::TrafficEvent{engine_.TakeLongestGap(), 0, 0, engine_.TakeCopyTime()});
    Feed(core::AnswerEvent{ticket, ErrorOf(std::move(status))});
    Feed(core::TickEvent{});  // the next action follows at once: a deadline that passed is seen here
  };
  if (const auto* a = std::get_if<core::ProvisionDevice>(&action)) {
    answer(a->ticket, engine_.EnsureStandby(), "provision", fmt::format("device {}", a->device));
  } else if (const auto* a = std::get_if<core::PrepareStage>(&action)) {
    answer(a->ticket, engine_.PrepareStage(a->stage, stop), fmt::format("prepare stage {}", a->index),
           "controller", {{"moves", a->stage.moves.size()}, {"drops", a->stage.drops.size()}});
  } else if (const auto* a = std::get_if<core::CommitStage>(&action)) {
    Status status = Drain(stop);
    if (status) status = engine_.Commit(a->placement);
    answer(a->ticket, std::move(status), "commit", "engine", {{"epoch", a->placement.epoch().value}});
  } else if (const auto* a = std::get_if<core::ReleaseStage>(&action)) {
    answer(a->ticket, engine_.ReleaseStage(a->drops), "release", "memory", {{"experts", a->drops.size()}});
  } else if (const auto* a = std::get_if<core::MoveSequences>(&action)) {
    Status status = a->leaving.empty() ? Status{} : Drain(stop);
    if (status) status = engine_.MoveSequences(a->leaving, stop);
    answer(a->ticket, std::move(status), "hand sequences over", "engine", {{"leaving", a->leaving.size()}});
  } else if (const auto* a = std::get_if<core::RollBack>(&action)) {
    answer(a->ticket, engine_.Forget(stop), "roll back", "controller");
  } else if (const auto* a = std::get_if<core::RetireDevice>(&action)) {
    answer(a->ticket, engine_.Retire(a->device), "retire", fmt::format("device {}", a->device));
  }
}

}  // namespace elasticmoe::runtime
