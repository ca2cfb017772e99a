// The resize machine's walk through provisioning, stages and the way back; commands, time and state:
// resize.cc.
#include <algorithm>
#include <set>
#include <type_traits>

#include "base/check.h"
#include "core/control/resize.h"
#include "core/placement/balance.h"
#include "core/placement/plan_check.h"

namespace elasticmoe::core {
namespace {

// The shared weights of each domain that had no member before.
std::uint64_t SharedBytesCopied(const PlanFacts& facts, const Placement& before, const Placement& after) {
  std::set<DomainId> open, opened;
  for (const DeviceId member : before.members()) open.insert(FindDevice(facts, member)->domain);
  for (const DeviceId member : after.members()) opened.insert(FindDevice(facts, member)->domain);
  std::uint64_t bytes = 0;
  for (const DomainId domain : opened) bytes += open.count(domain) == 0 ? facts.shared_bytes : 0;
  return bytes;
}

}  // namespace

void ResizeMachine::OnAnswer(const AnswerEvent& event) {
  const auto at = pending_.find(event.ticket);
  if (at == pending_.end() || at->second.hold) return;  // late, doubled, or a failure we know of
  EM_CHECK(operation_.has_value());
  const ResizeAction action = at->second.action;
  const bool retried =
      std::holds_alternative<ReleaseStage>(action) || std::holds_alternative<MoveSequences>(action) ||
      std::holds_alternative<RollBack>(action) || std::holds_alternative<RetireDevice>(action);
  if (event.error &&
      retried) {  // these must come true some day: they are asked for again with the next ticks
    at->second.sent = now_;
    at->second.hold = true;
    return;
  }
  pending_.erase(at);
  std::visit(
      [&](const auto& a) {
        using A = std::decay_t<decltype(a)>;
        if constexpr (std::is_same_v<A, ProvisionDevice>) OnProvisioned(a.device, event.error);
        if constexpr (std::is_same_v<A, PrepareStage>) OnPrepared(event.error);
        if constexpr (std::is_same_v<A, CommitStage>) OnCommitted(event.error);
        if constexpr (std::is_same_v<A, ReleaseStage>) OnReleased();
        if constexpr (std::is_same_v<A, MoveSequences>) {
          operation_->moved = true;
          if (operation_->phase == Phase::kPrepare)
            TryCommit();
          else
            TryFinish();
        }
        if constexpr (std::is_same_v<A, RollBack>) TakeBack();
        if constexpr (std::is_same_v<A, RetireDevice>) {
          devices_.erase(a.device);
          TryFinish();
        }
      },
      action);
}

// ---------------------------------------------------------------- provisioning

void ResizeMachine::Provision(DeviceId device) {
  devices_[device] = DevicePhase::kDesired;
  ++operation_->provision_attempts[device];
  Ask(ProvisionDevice{{}, device});
}

void ResizeMachine::OnProvisioned(DeviceId device, const std::optional<Error>& error) {
  Operation& operation = *operation_;
  if (error) {
    std::erase_if(pending_, [&](const auto& entry) {
      const auto* asked = std::get_if<ProvisionDevice>(&entry.second.action);
      return asked != nullptr && asked->device == device;
    });
    if (operation.provision_attempts[device] >= options_.max_attempts)
      return Abort(error->code, fmt::format("provisioning device={} failed {} times: {}", device,
                                            options_.max_attempts, error->message));
    // If a stage was being prepared for it, it is prepared again for the one that replaces it.
    operation.phase = Phase::kProvision;
    operation.prepared = false;
    Withdraw<PrepareStage>();
    return Provision(device);
  }
  devices_[device] = DevicePhase::kAllocated;
  if (!Awaits<ProvisionDevice>()) BeginStage(0);
}

// ---------------------------------------------------------------- stages

void ResizeMachine::BeginStage(int stage) {
  Operation& operation = *operation_;
  operation.phase = Phase::kPrepare;
  operation.stage = stage;
  operation.prepared = false;
  // Whoever leaves hands over to those who are members already: where all are new, not before they are.
  const std::vector<DeviceId> leaving = Leaving();
  const bool somebody_stays = operation.reverse || stage > 0 || operation.joining.empty();
  if (somebody_stays && operation.moving != leaving) AskMove(leaving);
  AskPrepare();
}

std::vector<DeviceId> ResizeMachine::Leaving() const {
  const std::set<DeviceId>& leaving = operation_->reverse ? operation_->joining : operation_->leaving;
  return {leaving.begin(), leaving.end()};
}

void ResizeMachine::AskMove(std::vector<DeviceId> leaving) {
  // Only members have sequences.
  Withdraw<MoveSequences>();
  operation_->moving = leaving;
  operation_->moved = false;
  Ask(MoveSequences{{}, std::move(leaving)});
  UpdatePhases();
}

void ResizeMachine::AskPrepare() {
  // A worker that is being replaced could not map anything.
  if (!dead_.empty()) return;
  Ask(PrepareStage{{}, operation_->stage, Stage()});
}

void ResizeMachine::OnPrepared(const std::optional<Error>& error) {
  if (error) {
    if (!StageFailed(*error)) AskPrepare();
    return;
  }
  operation_->prepared = true;
  for (const DeviceId member : Stage().placement.members())
    if (!IsMember(member)) devices_[member] = DevicePhase::kAttached;
  TryCommit();
}

// Counts a failed try of the stage; after too many the operation goes back, or stays where it is if it does
// so already.
bool ResizeMachine::StageFailed(const Error& error) {
  Operation& operation = *operation_;
  if (++operation.attempts < options_.max_attempts) return false;
  if (!operation.reverse) {
    Abort(error.code, fmt::format("stage {} of {} failed {} times: {}", operation.stage + 1,
                                  operation.report.stages, operation.attempts, error.message));
    return true;
  }
  operation.report.error->message +=
      fmt::format("; the way back failed too ({}): epoch={} with {} devices stays", error.message,
                  placement_.epoch(), placement_.members().size());
  operation.back.stages.resize(operation.stage);  // nothing beyond the last commit is wanted any more
  operation.phase = Phase::kForget;
  Ask(RollBack{{}, placement_});
  return true;
}

void ResizeMachine::TryCommit() {
  Operation& operation = *operation_;
  if (operation.phase != Phase::kPrepare || !operation.prepared) return;
  const bool drops_members =
      std::any_of(placement_.members().begin(), placement_.members().end(),
                  [&](DeviceId member) { return Stage().placement.RankOf(member) < 0; });
  if (drops_members && !operation.moved) return;
  operation.phase = Phase::kCommit;
  Ask(CommitStage{{}, Stage().placement});
}

void ResizeMachine::OnCommitted(const std::optional<Error>& error) {
  Operation& operation = *operation_;
  if (error) {
    operation.phase = Phase::kPrepare;  // what was prepared may be gone: from the start
    operation.prepared = false;
    if (operation.abort && !operation.reverse) return StartRollBack();
    if (StageFailed(*error)) return;
    std::vector<DeviceId> lost;  // joined to be, died while the commit was tried
    for (const auto& [device, since] : dead_)
      if (!IsMember(device)) lost.push_back(device);
    for (const DeviceId device : lost) {
      dead_.erase(device);
      OnProvisioned(device, error);
      if (operation.abort) return;
    }
    if (lost.empty()) AskPrepare();
    return;
  }
  const PlanStage& stage = Stage();
  const bool grew = stage.placement.members().size() > placement_.members().size();
  if (!operation.reverse)  // then the domains of those who come back have not been closed
    operation.report.bytes_copied += SharedBytesCopied(operation.facts, placement_, stage.placement);
  placement_ = stage.placement;
  std::erase_if(dead_, [&](const auto& entry) { return !IsMember(entry.first); });
  UpdatePhases();
  for (const ExpertMove& move : stage.moves)
    (move.kind == MoveKind::kRemap ? operation.report.bytes_remapped : operation.report.bytes_copied) +=
        move.kind == MoveKind::kRemap ? operation.facts.expert_bytes : move.bytes;
  operation.report.stages_committed += operation.reverse ? -1 : 1;
  operation.report.serving.reset();
  if (operation.report.stages_committed == operation.report.stages) operation.report.serving = now_;
  operation.attempts = 0;
  operation.phase = Phase::kRelease;
  Ask(ReleaseStage{{}, placement_.epoch(), stage.drops});
  // New members take their share of the sequences at once.
  if (grew) AskMove(Leaving());
}

void ResizeMachine::OnReleased() {
  Operation& operation = *operation_;
  const bool last = operation.stage + 1 == static_cast<int>(Followed().stages.size());
  if (operation.abort && !operation.reverse && !last) return StartRollBack();
  if (last) {
    if (!operation.reverse) operation.abort.reset();  // it came too late: the new size serves
    return BeginFinish();
  }
  BeginStage(operation.stage + 1);
}

// ---------------------------------------------------------------- the way back

void ResizeMachine::Abort(ErrorCode code, std::string message) {
  Operation& operation = *operation_;
  if (operation.abort || operation.reverse) return;
  operation.abort = Error{code, std::move(message)};
  if (operation.phase == Phase::kProvision || operation.phase == Phase::kPrepare) StartRollBack();
  // In kCommit and kRelease their answers come first; in kFinish there is nothing to abort.
}

void ResizeMachine::StartRollBack() {
  Operation& operation = *operation_;
  operation.report.error = operation.abort;
  operation.phase = Phase::kForget;
  operation.prepared = false;
  Withdraw<ProvisionDevice>();
  Withdraw<PrepareStage>();
  Ask(RollBack{{}, placement_});
}

// What was prepared is forgotten; now what was committed is taken back.
void ResizeMachine::TakeBack() {
  Operation& operation = *operation_;
  const int committed = operation.report.stages_committed;
  if (operation.reverse || committed == 0) return BeginFinish();
  operation.back = ReversePlan(operation.facts, operation.plan, committed);
  const Status status = CheckReversePlan(operation.facts, operation.plan, committed, operation.back);
  EM_CHECK(status, "{}", status.error().message);
  operation.reverse = true;
  operation.attempts = 0;
  BeginStage(0);
}

// ---------------------------------------------------------------- the end

void ResizeMachine::BeginFinish() {
  Operation& operation = *operation_;
  operation.phase = Phase::kFinish;
  if (std::any_of(operation.moving.begin(), operation.moving.end(),
                  [&](DeviceId device) { return IsMember(device); }))
    AskMove({});
  operation.moving.clear();
  UpdatePhases();
  for (const auto& [device, phase] : devices_)
    if (!IsMember(device)) Ask(RetireDevice{{}, device});
  TryFinish();
}

void ResizeMachine::TryFinish() {
  if (!operation_ || operation_->phase != Phase::kFinish || !operation_->moved || Awaits<RetireDevice>())
    return;
  Operation& operation = *operation_;
  operation.report.state = operation.abort || operation.reverse ? ResizeState::kAborted : ResizeState::kDone;
  operation.report.finished = now_;
  actions_->push_back(ReportAction{operation.report});
  ended_.push_back({std::move(operation.command), std::move(operation.report)});
  if (static_cast<int>(ended_.size()) > options_.reports_kept) ended_.pop_front();
  operation_.reset();
  EM_CHECK(pending_.empty());
}

}  // namespace elasticmoe::core
