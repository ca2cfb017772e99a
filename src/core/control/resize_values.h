// What goes into the resize machine and what comes out of it: commands, events, actions, the report. Pure
// values.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "core/placement/planner.h"

namespace elasticmoe::core {

// Pairs an answer with the action that asked for it, and orders actions: whoever carries them out ignores one
// whose ticket is lower than the highest it has seen for the same subject (a device; the stage; the
// sequences). So nothing that is late can undo what was decided after it.
using Ticket = StrongId<struct TicketTag, std::uint64_t>;

enum class ResizeState { kProvisioning, kPreparing, kCommitting, kSettling, kDone, kRollingBack, kAborted };
std::string_view ToString(ResizeState state);

enum class DevicePhase {
  kDesired,          // asked for
  kAllocated,        // a worker is there, with no memory of ours
  kAttached,         // it has mapped the stage that makes it a member
  kActive,           // member; takes no new sequences, since it leaves
  kRoutable,         // member
  kSafeToTerminate,  // no member any more, no sequence, no expert
};
std::string_view ToString(DevicePhase phase);

struct ResizeCommand {
  std::string operation;          // id chosen by the caller; the same id again is the same operation
  int count = 0;                  // members wanted; 0: `target` says which
  std::vector<DeviceId> victims;  // with `count`: these go first
  std::vector<DeviceId> target;
  TimeNs deadline = 0;  // 0 = none; the operation is rolled back if it isn't committed whole by then
  std::string strategy = "elastic";
};

struct ResizeReport {
  std::string operation;
  std::string strategy;
  std::vector<DeviceId> from, to;
  ResizeState state = ResizeState::kProvisioning;
  std::optional<Error> error;  // why it was rolled back
  TimeNs started = 0;
  std::optional<TimeNs> first_capacity;  // first token computed by a new device
  std::optional<TimeNs> serving;         // the new size serves: its last commit
  std::optional<TimeNs> finished;
  int stages = 0;
  int stages_committed = 0;              // less those that were taken back
  std::uint64_t bytes_remapped = 0;      // so far, there and back
  std::uint64_t bytes_copied = 0;        // experts, and the other weights of domains that were opened
  std::vector<DomainPeak> domain_peaks;  // stated before anything starts
  std::vector<DevicePeak> device_peaks;
  TimeNs copy_ns = 0;  // spent on copies between domains
  TimeNs longest_step_gap = 0;
  int refused = 0;
  int failed = 0;
};

// ---------------------------------------------------------------- events

struct CommandEvent {
  ResizeCommand command;
  PlanFacts facts;
};
struct CancelEvent {
  std::string operation;
};
struct TickEvent {};  // time passed: deadlines, answers that do not come
struct AnswerEvent {  // to the action with this ticket; late, doubled and unknown ones do no harm
  Ticket ticket;
  std::optional<Error> error;
};
struct WorkerDiedEvent {
  DeviceId device;
};
struct WorkerRecoveredEvent {  // a member serves again, on the same pages
  DeviceId device;
};
struct FirstTokenEvent {
  DeviceId device;
};
struct TrafficEvent {  // since the last one
  TimeNs longest_step_gap = 0;
  int refused = 0;
  int failed = 0;
  TimeNs copy_ns = 0;
};
using ResizeEvent = std::variant<CommandEvent, CancelEvent, TickEvent, AnswerEvent, WorkerDiedEvent,
                                 WorkerRecoveredEvent, FirstTokenEvent, TrafficEvent>;

// ---------------------------------------------------------------- actions

// Those with a ticket want an AnswerEvent, are repeated until it comes, and must be safe to do twice.

struct ProvisionDevice {  // a worker for the device, without memory
  Ticket ticket;
  DeviceId device;
};
// The HMM remaps or copies, the workers of all members map the new slots beside the old ones. Replaces what
// was prepared before and not committed.
struct PrepareStage {
  Ticket ticket;
  int index = 0;
  PlanStage stage;
};
struct CommitStage {  // the next step carries its epoch. An error says that it will not
  Ticket ticket;
  Placement placement;
};
struct ReleaseStage {  // no step uses the epoch before any more: what the stage dropped goes back to the pool
  Ticket ticket;
  Epoch epoch;  // committed now
  std::vector<ExpertDrop> drops;
};
// From now on `leaving` take no sequences and all other members do. Answered once `leaving` have none and the
// others are balanced.
struct MoveSequences {
  Ticket ticket;
  std::vector<DeviceId> leaving;
};
struct RollBack {  // forget what was prepared; `placement` serves
  Ticket ticket;
  Placement placement;
};
struct RetireDevice {  // its worker ends, or goes back to the standby pool; also one that is still being
                       // started
  Ticket ticket;
  DeviceId device;
};
struct ReplyAction {  // to a command or a cancel
  std::string operation;
  std::optional<Error> error;
  ResizeReport report;  // of the operation asked for; of the one that runs, if that is why it was refused
};
struct ReportAction {  // the operation has ended
  ResizeReport report;
};
using ResizeAction = std::variant<ProvisionDevice, PrepareStage, CommitStage, ReleaseStage, MoveSequences,
                                  RollBack, RetireDevice, ReplyAction, ReportAction>;

}  // namespace elasticmoe::core
