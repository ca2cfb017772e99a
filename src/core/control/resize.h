// The resize machine: one operation at a time, from a command to the new size by a row of small commits, or
// back. Pure: time comes with each event, what it wants done goes out as actions.
//
//   command ─► planned, checked ─► Provisioning ─► Preparing(k) ─► Committing(k) ─► Settling ─► Done
//     │ refused: nothing has            │               │   ▲            │
//     ▼ changed                         │               │   └─ next k ───┤
//   reply                               └── failed / cancelled / deadline ──► RollingBack ─► Aborted
//
// Preparing   the HMM and the workers make the next epoch ready beside the one that serves. A stage that
// drops members
//             also waits until they have no sequences.
// Committing  the engine takes the epoch at a step boundary; then what the stage dropped is released. A
// cancel or a deadline
//             that comes now waits for the answer: whether a commit happened must never be a guess.
// Settling    the final placement serves; sequences are balanced, devices that left are retired. Too late to
// go back. RollingBack what was prepared is forgotten: the last commit serves. If stages were committed, they
// are taken back one
//             by one, in reverse order, as new epochs through the same steps; devices that had come are
//             retired.
//
// Why all the way back, and not "stay at the last commit": a half-filled member would hold memory and serve
// few experts until somebody notices, and the caller would have to ask what size his cancelled operation has
// left behind. The way back always fits (each stage needs old and new together, as the way there did) and
// costs at most what was moved. It has no deadline. Only if its stages fail again and again, it stops: then
// the last commit stays, all its members are kept, and the report says so.
//
// Failures. A joining device that fails is asked for again, `max_attempts` times. A stage that fails is
// prepared again as often; then the operation is rolled back. A member's worker that dies is recovered
// elsewhere, on the same pages: the stage waits for it and is prepared anew, since the new worker has not
// mapped it. Answers that do not come are asked for again each `resend_ns`.
//
// Invariants (CheckIntegrity):
//  1. placement() is always one that was committed; its epoch only grows.
//  2. Devices known = members + those joining or leaving in the running operation; without one = members.
//  3. Without an operation no answer is awaited.
#pragma once

#include <algorithm>
#include <deque>
#include <map>
#include <set>

#include "core/control/resize_values.h"

namespace elasticmoe::core {

struct ResizeOptions {
  TimeNs resend_ns = 1'000'000'000;
  TimeNs recovery_wait_ns =
      30'000'000'000;    // a dead member is waited for that long before a stage is tried without it
  int max_attempts = 3;  // of provisioning one device, of one stage
  int reports_kept = 64;
};

class ResizeMachine {
 public:
  ResizeMachine(ResizeOptions options, Placement placement);

  void Step(TimeNs now, const ResizeEvent& event, std::vector<ResizeAction>& actions);

  const Placement& placement() const { return placement_; }
  const std::map<DeviceId, DevicePhase>& devices() const { return devices_; }
  bool Running() const { return operation_.has_value(); }
  // Of the running operation or one of the last that ended; nullptr if there is none.
  const ResizeReport* Find(const std::string& operation) const;
  const ResizeReport* Last() const;  // the running one, else the last that ended
  void CheckIntegrity() const;

 private:
  enum class Phase { kProvision, kPrepare, kCommit, kRelease, kForget, kFinish };
  struct Operation {
    Operation() {
    }  // clang 14 denies that an optional of a nested class with initializers can be made without it
    ResizeCommand command;
    PlanFacts facts;
    ResizeReport report;
    ResizePlan plan, back;
    std::set<DeviceId> joining, leaving;
    Phase phase = Phase::kProvision;
    bool reverse = false;        // `back` is followed
    std::optional<Error> abort;  // decided; done as soon as no commit is in flight
    int stage = 0;               // of the plan that is followed
    int attempts = 0;            // of this stage
    std::map<DeviceId, int> provision_attempts;
    bool prepared = false;
    bool moved = false;            // MoveSequences answered
    std::vector<DeviceId> moving;  // its `leaving`
  };
  struct Pending {
    ResizeAction action;
    TimeNs sent = 0;
    bool hold = false;  // it failed: the next try waits for a tick
  };
  struct Ended {
    ResizeCommand command;
    ResizeReport report;
  };

  void OnCommand(const CommandEvent& event);
  void OnCancel(const CancelEvent& event);
  void OnAnswer(const AnswerEvent& event);
  void OnTick();
  void OnFirstToken(DeviceId device);
  void OnDeath(DeviceId device);
  void OnRecovery(DeviceId device);

  void OnProvisioned(DeviceId device, const std::optional<Error>& error);
  void OnPrepared(const std::optional<Error>& error);
  void OnCommitted(const std::optional<Error>& error);
  void OnReleased();

  void Provision(DeviceId device);
  void BeginStage(int stage);
  void AskPrepare();
  void TryCommit();
  std::vector<DeviceId> Leaving() const;  // in the direction that is followed
  void AskMove(std::vector<DeviceId> leaving);
  void Abort(ErrorCode code, std::string message);
  void StartRollBack();
  void TakeBack();
  void BeginFinish();
  void TryFinish();
  bool StageFailed(const Error& error);  // counts; true: given up

  const ResizePlan& Followed() const { return operation_->reverse ? operation_->back : operation_->plan; }
  const PlanStage& Stage() const { return Followed().stages[operation_->stage]; }
  bool PastTheLastCommit() const;
  bool IsMember(DeviceId device) const { return placement_.RankOf(device) >= 0; }
  void UpdatePhases();
  void UpdateState();
  void Reply(const std::string& operation, std::optional<Error> error, const ResizeReport& report);

  template <class Action>
  void Ask(Action action);
  template <class Action>
  void Withdraw();  // actions of this kind are not awaited any more
  template <class Action>
  bool Awaits() const;

  ResizeOptions options_;
  Placement placement_;
  std::map<DeviceId, DevicePhase> devices_;
  std::map<DeviceId, TimeNs> dead_;  // members being recovered, since when
  std::optional<Operation> operation_;
  std::deque<Ended> ended_;
  std::map<Ticket, Pending> pending_;
  std::uint64_t next_ticket_ = 1;

  // Of the Step that runs.
  TimeNs now_ = 0;
  std::vector<ResizeAction>* actions_ = nullptr;
};

template <class Action>
void ResizeMachine::Ask(Action action) {
  action.ticket = Ticket(next_ticket_++);
  pending_[action.ticket] = {action, now_};
  actions_->push_back(std::move(action));
}

template <class Action>
void ResizeMachine::Withdraw() {
  std::erase_if(pending_,
                [](const auto& entry) { return std::holds_alternative<Action>(entry.second.action); });
}

template <class Action>
bool ResizeMachine::Awaits() const {
  return std::any_of(pending_.begin(), pending_.end(),
                     [](const auto& entry) { return std::holds_alternative<Action>(entry.second.action); });
}

}  // namespace elasticmoe::core
