#include "core/control/resize.h"

#include <algorithm>
#include <type_traits>

#include "base/check.h"
#include "core/placement/plan_check.h"

namespace elasticmoe::core {
namespace {

bool SameCommand(const ResizeCommand& a, const ResizeCommand& b) {
  return a.count == b.count && a.victims == b.victims && a.target == b.target && a.strategy == b.strategy;
}

}  // namespace

std::string_view ToString(ResizeState state) {
  switch (state) {
    case ResizeState::kProvisioning:
      return "provisioning";
    case ResizeState::kPreparing:
      return "preparing";
    case ResizeState::kCommitting:
      return "committing";
    case ResizeState::kSettling:
      return "settling";
    case ResizeState::kDone:
      return "done";
    case ResizeState::kRollingBack:
      return "rolling-back";
    case ResizeState::kAborted:
      return "aborted";
  }
  return "?";
}

std::string_view ToString(DevicePhase phase) {
  switch (phase) {
    case DevicePhase::kDesired:
      return "desired";
    case DevicePhase::kAllocated:
      return "allocated";
    case DevicePhase::kAttached:
      return "attached";
    case DevicePhase::kActive:
      return "active";
    case DevicePhase::kRoutable:
      return "routable";
    case DevicePhase::kSafeToTerminate:
      return "safe-to-terminate";
  }
  return "?";
}

ResizeMachine::ResizeMachine(ResizeOptions options, Placement placement)
    : options_(options), placement_(std::move(placement)) {
  for (const DeviceId member : placement_.members()) devices_[member] = DevicePhase::kRoutable;
}

void ResizeMachine::Step(TimeNs now, const ResizeEvent& event, std::vector<ResizeAction>& actions) {
  now_ = now;
  actions_ = &actions;
  std::visit(
      [&](const auto& e) {
        using E = std::decay_t<decltype(e)>;
        if constexpr (std::is_same_v<E, CommandEvent>) OnCommand(e);
        if constexpr (std::is_same_v<E, CancelEvent>) OnCancel(e);
        if constexpr (std::is_same_v<E, TickEvent>) OnTick();
        if constexpr (std::is_same_v<E, AnswerEvent>) OnAnswer(e);
        if constexpr (std::is_same_v<E, WorkerDiedEvent>) OnDeath(e.device);
        if constexpr (std::is_same_v<E, WorkerRecoveredEvent>) OnRecovery(e.device);
        if constexpr (std::is_same_v<E, FirstTokenEvent>) {
          OnFirstToken(e.device);
        }
        if constexpr (std::is_same_v<E, TrafficEvent>) {
          if (!operation_) return;
          operation_->report.longest_step_gap =
              std::max(operation_->report.longest_step_gap, e.longest_step_gap);
          operation_->report.refused += e.refused;
          operation_->report.failed += e.failed;
        }
      },
      event);
  UpdateState();
  actions_ = nullptr;
}

void ResizeMachine::Reply(const std::string& operation, std::optional<Error> error,
                          const ResizeReport& report) {
  actions_->push_back(ReplyAction{operation, std::move(error), report});
}

// ---------------------------------------------------------------- commands

void ResizeMachine::OnCommand(const CommandEvent& event) {
  const ResizeCommand& command = event.command;
  const auto refuse = [&](Error error, const ResizeReport& report) {
    Reply(command.operation, std::move(error), report);
  };
  const auto again = [&](const ResizeCommand& before, const ResizeReport& report) {
    if (SameCommand(before, command)) return Reply(command.operation, std::nullopt, report);
    refuse({ErrorCode::kAlreadyExists,
            fmt::format("starting a resize: operation={} was started with another target; choose a new id",
                        command.operation)},
           report);
  };
  if (operation_ && operation_->command.operation == command.operation)
    return again(operation_->command, operation_->report);
  for (const Ended& ended : ended_)
    if (ended.command.operation == command.operation) return again(ended.command, ended.report);
  if (operation_) {
    const ResizeReport& running = operation_->report;
    return refuse(
        {ErrorCode::kFailedPrecondition,
         fmt::format("starting a resize: operation={} from {} to {} devices runs (state={}); wait for it or "
                     "cancel it",
                     running.operation, running.from.size(), running.to.size(), ToString(running.state))},
        running);
  }
  if (command.operation.empty())
    return refuse({ErrorCode::kInvalidArgument, "starting a resize: operation is empty; give it an id"}, {});

  PlanInput input{placement_, command.target, event.facts};
  if (command.count != 0 || command.target.empty()) {
    std::vector<DeviceId> available;
    for (const PlanDevice& device : event.facts.devices) available.push_back(device.device);
    auto members = ChooseMembers(placement_.members(), available, command.count, command.victims);
    if (!members) return refuse(std::move(members.error()), {});
    input.target = *std::move(members);
  }
  auto plan = PlanResize(input);
  if (!plan) return refuse(std::move(plan.error()), {});
  if (Status status = CheckPlan(input, *plan); !status) return refuse(std::move(status.error()), {});

  Operation& operation = operation_.emplace();
  operation.command = command;
  operation.facts = event.facts;
  operation.plan = *std::move(plan);
  const std::vector<DeviceId>& to = operation.plan.Final().members();
  for (const DeviceId device : to)
    if (!IsMember(device)) operation.joining.insert(device);
  for (const DeviceId device : placement_.members())
    if (operation.plan.Final().RankOf(device) < 0) operation.leaving.insert(device);
  ResizeReport& report = operation.report;
  report.operation = command.operation;
  report.strategy = command.strategy;
  report.from = placement_.members();
  report.to = to;
  report.started = now_;
  report.stages = static_cast<int>(operation.plan.stages.size());
  report.domain_peaks = operation.plan.domain_peaks;
  report.device_peaks = operation.plan.device_peaks;
  operation.moved = true;  // nothing is asked to move yet
  Reply(command.operation, std::nullopt, report);
  if (operation.plan.stages.empty()) return BeginFinish();
  for (const DeviceId device : operation.joining) Provision(device);
  if (operation.joining.empty()) BeginStage(0);
}

void ResizeMachine::OnCancel(const CancelEvent& event) {
  if (!operation_ || operation_->command.operation != event.operation) {
    const ResizeReport* report = Find(event.operation);
    if (report == nullptr)
      return Reply(event.operation,
                   Error{ErrorCode::kNotFound,
                         fmt::format("cancelling a resize: operation={} is unknown", event.operation)},
                   {});
    return Reply(event.operation,
                 Error{ErrorCode::kFailedPrecondition,
                       fmt::format("cancelling a resize: operation={} has ended (state={})", event.operation,
                                   ToString(report->state))},
                 *report);
  }
  if (PastTheLastCommit())
    return Reply(
        event.operation,
        Error{
            ErrorCode::kFailedPrecondition,
            fmt::format(
                "cancelling a resize: operation={} serves at its new size already; resize back to {} instead",
                event.operation, operation_->report.from.size())},
        operation_->report);
  Abort(ErrorCode::kCancelled, "cancelled");
  if (operation_) UpdateState();
  if (const ResizeReport* report = Find(event.operation)) Reply(event.operation, std::nullopt, *report);
}

const ResizeReport* ResizeMachine::Find(const std::string& operation) const {
  if (operation_ && operation_->command.operation == operation) return &operation_->report;
  for (const Ended& ended : ended_)
    if (ended.command.operation == operation) return &ended.report;
  return nullptr;
}

const ResizeReport* ResizeMachine::Last() const {
  if (operation_) return &operation_->report;
  return ended_.empty() ? nullptr : &ended_.back().report;
}

// ---------------------------------------------------------------- time, deaths

void ResizeMachine::OnTick() {
  std::erase_if(dead_, [&](const auto& entry) { return now_ - entry.second >= options_.recovery_wait_ns; });
  if (!operation_) return;
  const TimeNs deadline = operation_->command.deadline;
  if (deadline > 0 && now_ >= deadline && !operation_->abort && !PastTheLastCommit()) {
    Abort(ErrorCode::kDeadlineExceeded,
          fmt::format("the deadline passed after {} of {} stages", operation_->report.stages_committed,
                      operation_->report.stages));
    if (!operation_) return;
  }
  for (auto& [ticket, pending] : pending_) {
    if (now_ - pending.sent < options_.resend_ns) continue;
    pending.sent = now_;
    pending.hold = false;
    actions_->push_back(pending.action);
  }
  if (operation_->phase == Phase::kPrepare && !operation_->prepared && !Awaits<PrepareStage>()) AskPrepare();
}

// It may come after the end of the operation: that ends with the last commit, this with a step after it.
void ResizeMachine::OnFirstToken(DeviceId device) {
  ResizeReport* report = operation_ ? &operation_->report : ended_.empty() ? nullptr : &ended_.back().report;
  if (report == nullptr || report->first_capacity) return;
  const auto has = [&](const std::vector<DeviceId>& devices) {
    return std::find(devices.begin(), devices.end(), device) != devices.end();
  };
  if (has(report->to) && !has(report->from)) report->first_capacity = now_;
}

void ResizeMachine::OnDeath(DeviceId device) {
  const bool joining = operation_ && operation_->joining.count(device) > 0 && !IsMember(device);
  if (IsMember(device)) dead_[device] = now_;
  if (!operation_) return;
  Operation& operation = *operation_;
  if (joining && !operation.reverse && !operation.abort) {
    if (operation.phase == Phase::kCommit) dead_[device] = now_;  // a member soon, or the commit fails
    if (operation.phase == Phase::kProvision || operation.phase == Phase::kPrepare)
      OnProvisioned(device,
                    Error{ErrorCode::kUnavailable, fmt::format("device={} died while it joined", device)});
    return;
  }
  if (IsMember(device) && operation.phase == Phase::kPrepare) {
    // What its worker had mapped is gone with it.
    Withdraw<PrepareStage>();
    operation.prepared = false;
  }
}

void ResizeMachine::OnRecovery(DeviceId device) {
  if (dead_.erase(device) == 0 || !operation_) return;
  if (operation_->phase == Phase::kPrepare && !operation_->prepared && !Awaits<PrepareStage>()) AskPrepare();
}

// ---------------------------------------------------------------- state

bool ResizeMachine::PastTheLastCommit() const {
  return !operation_->reverse && !operation_->abort &&
         operation_->report.stages_committed == operation_->report.stages;
}

void ResizeMachine::UpdatePhases() {
  for (auto& [device, phase] : devices_) {
    const bool leaves = operation_ && std::find(operation_->moving.begin(), operation_->moving.end(),
                                                device) != operation_->moving.end();
    if (IsMember(device))
      phase = leaves ? DevicePhase::kActive : DevicePhase::kRoutable;
    else if (phase == DevicePhase::kActive || phase == DevicePhase::kRoutable)
      phase = DevicePhase::kSafeToTerminate;
  }
}

void ResizeMachine::UpdateState() {
  if (!operation_) return;
  ResizeState& state = operation_->report.state;
  if (operation_->reverse || operation_->abort) {
    state = ResizeState::kRollingBack;
    return;
  }
  switch (operation_->phase) {
    case Phase::kProvision:
      state = ResizeState::kProvisioning;
      break;
    case Phase::kPrepare:
      state = ResizeState::kPreparing;
      break;
    case Phase::kCommit:
    case Phase::kRelease:
      state = ResizeState::kCommitting;
      break;
    case Phase::kForget:
      state = ResizeState::kRollingBack;
      break;
    case Phase::kFinish:
      state = ResizeState::kSettling;
      break;
  }
}

void ResizeMachine::CheckIntegrity() const {
  for (const DeviceId member : placement_.members())
    EM_CHECK(devices_.count(member) > 0, "member={} is not allocated", member);
  if (!operation_) {
    EM_CHECK(devices_.size() == placement_.members().size(), "devices={} members={}", devices_.size(),
             placement_.members().size());
    for (const auto& [device, phase] : devices_)
      EM_CHECK(phase == DevicePhase::kRoutable, "device={} {}", device, ToString(phase));
    EM_CHECK(pending_.empty(), "answers awaited={}", pending_.size());
    return;
  }
  const Operation& operation = *operation_;
  for (const auto& [device, phase] : devices_) {
    EM_CHECK(IsMember(device) || operation.joining.count(device) > 0 || operation.leaving.count(device) > 0,
             "device={}", device);
    EM_CHECK(IsMember(device) == (phase == DevicePhase::kActive || phase == DevicePhase::kRoutable),
             "device={} {}", device, ToString(phase));
  }
  const ResizePlan& plan = Followed();
  const bool in_stage = operation.phase == Phase::kPrepare || operation.phase == Phase::kCommit ||
                        operation.phase == Phase::kRelease;
  if (in_stage) {
    EM_CHECK(operation.stage >= 0 && operation.stage < static_cast<int>(plan.stages.size()), "stage={}",
             operation.stage);
    const bool committed = operation.phase == Phase::kRelease;
    const Placement& expected = committed              ? plan.stages[operation.stage].placement
                                : operation.stage == 0 ? plan.base
                                                       : plan.stages[operation.stage - 1].placement;
    EM_CHECK(placement_.epoch() == expected.epoch(), "epoch={} expected={}", placement_.epoch(),
             expected.epoch());
  }
  EM_CHECK(Awaits<CommitStage>() == (operation.phase == Phase::kCommit));
  EM_CHECK(Awaits<ReleaseStage>() == (operation.phase == Phase::kRelease));
  EM_CHECK(!Awaits<PrepareStage>() || (operation.phase == Phase::kPrepare && !operation.prepared));
  EM_CHECK(Awaits<RollBack>() == (operation.phase == Phase::kForget));
  EM_CHECK(Awaits<MoveSequences>() == !operation.moved);
}

}  // namespace elasticmoe::core
