// The control plane of the simulated world: messages of the resize machine, and what memory and workers do
// with them.
#include <algorithm>

#include "base/check.h"
#include "sim/cluster.h"

namespace elasticmoe::sim {
namespace {

const Error kFault{ErrorCode::kUnavailable, "a fault of the simulation"};

template <class Action>
constexpr const char* kName = "action";
template <>
constexpr const char* kName<core::ProvisionDevice> = "provision";
template <>
constexpr const char* kName<core::RetireDevice> = "retire";
template <>
constexpr const char* kName<core::PrepareStage> = "prepare";
template <>
constexpr const char* kName<core::CommitStage> = "commit";
template <>
constexpr const char* kName<core::ReleaseStage> = "release";
template <>
constexpr const char* kName<core::MoveSequences> = "move sequences";
template <>
constexpr const char* kName<core::RollBack> = "roll back";

}  // namespace

// A message: it may be lost, come late or twice.
void Cluster::Send(const EventHeap::Event& event) {
  const int copies = Chance(faults().doubled) ? 2 : 1;
  report_.messages_doubled += copies - 1;
  for (int i = 0; i < copies; ++i) {
    if (Chance(faults().lost)) {
      ++report_.messages_lost;
      continue;
    }
    const bool late = Chance(faults().late);
    report_.messages_late += late;
    Later(late ? Milliseconds(1, 3000) : Milliseconds(0.05, 2), event);
  }
}

void Cluster::StepMachine(const core::ResizeEvent& event) {
  std::vector<core::ResizeAction> actions;
  machine_.Step(heap_.now(), event, actions);
  for (const core::ResizeAction& action : actions) Post(action);
}

void Cluster::Post(const core::ResizeAction& action) {
  std::visit(
      [&](const auto& a) {
        if constexpr (requires { a.ticket; }) {
          Say("asked: {} (ticket {})", kName<std::decay_t<decltype(a)>>, a.ticket);
          Send([this, a] { Handle(a); });
        } else {
          Handle(a);
        }
      },
      action);
}

void Cluster::Answer(Ticket ticket, std::optional<Error> error) {
  Say("answer to ticket {}: {}", ticket, error ? error->message : "done");
  Send([this, ticket, error = std::move(error)] { StepMachine(core::AnswerEvent{ticket, error}); });
}

void Cluster::Handle(const core::ReplyAction& action) {
  if (action.error) {
    ++report_.refusals;
    Say("refused: {}", action.error->message);
  } else {
    accepted_.insert(action.operation);
  }
}

void Cluster::Handle(const core::ReportAction& action) {
  if (!ended_.insert(action.report.operation).second) Broken("{} ends twice", action.report.operation);
  (action.report.state == core::ResizeState::kDone ? report_.resizes_done : report_.resizes_aborted) += 1;
  Say("{} is {}: {}", action.report.operation, ToString(action.report.state),
      action.report.error ? action.report.error->message : "as wanted");
}

// ---------------------------------------------------------------- devices

void Cluster::Handle(const core::ProvisionDevice& action) {
  Ticket& seen = device_ticket_[action.device];
  if (action.ticket < seen) return;
  const bool again = action.ticket == seen;
  seen = action.ticket;
  std::optional<Error>& failed = device_failed_[action.device];
  if (again) {
    if (failed || allocated_.count(action.device) > 0) Answer(action.ticket, failed);
    return;  // else it is being started
  }
  failed.reset();
  if (Chance(faults().fail)) {
    failed = kFault;
    return Answer(action.ticket, failed);
  }
  Later(Milliseconds(5, 400), [this, action] {
    if (device_ticket_[action.device] != action.ticket) return;  // retired meanwhile
    allocated_.insert(action.device);
    down_.erase(action.device);
    room_.StartWorker(action.device);
    Say("device {} is there", action.device);
    Answer(action.ticket, std::nullopt);
    MaybeCrash("provisioning");
  });
}

void Cluster::Handle(const core::RetireDevice& action) {
  Ticket& seen = device_ticket_[action.device];
  if (action.ticket < seen) return;
  seen = action.ticket;
  if (placement_.RankOf(action.device) >= 0)
    return Broken("member device={} is to be retired", action.device);
  if (Chance(faults().fail)) return Answer(action.ticket, kFault);
  room_.KillWorker(action.device);
  allocated_.erase(action.device);
  down_.erase(action.device);
  Say("device {} is retired", action.device);
  Answer(action.ticket, std::nullopt);
}

// ---------------------------------------------------------------- stages

void Cluster::Handle(const core::PrepareStage& action) {
  if (action.ticket < stage_ticket_) return;
  const bool again = action.ticket == stage_ticket_;
  stage_ticket_ = action.ticket;
  if (again && prepared_ && prepared_->ticket == action.ticket) return Answer(action.ticket, std::nullopt);
  if (again && preparing_) return;
  if (memory_down_ || !room_.MemoryAlive()) return;  // nobody hears it: the machine asks again
  room_.Trim(placement_);
  prepared_.reset();
  preparing_ = true;
  const TimeNs duration = Milliseconds(1, 20) + static_cast<TimeNs>(action.stage.moves.size()) * 1'000'000;
  const int memory = room_.memory_incarnation();
  MaybeCrash("preparing");
  Later(duration,
        [this, action, memory, fails = Chance(faults().fail)] { FinishPrepare(action, memory, fails); });
}

void Cluster::FinishPrepare(const core::PrepareStage& action, int memory, bool fails) {
  if (action.ticket != stage_ticket_) return;  // forgotten, or another stage is prepared
  preparing_ = false;
  if (memory != room_.memory_incarnation())
    return Answer(action.ticket, Error{ErrorCode::kUnavailable, "the memory died"});
  const core::PlanStage& stage = action.stage;
  const std::size_t count = fails ? stage.moves.size() / 2 : stage.moves.size();
  if (const std::string wrong = room_.Move(stage, count); !wrong.empty())
    return Broken("stage {}: {}", action.index, wrong);
  for (const core::DomainPeak& peak : machine_.Last()->domain_peaks)
    if (facts_.shared_bytes + room_.PagesIn(peak.domain) * facts_.expert_bytes > peak.bytes)
      return Broken("stage {}: domain={} holds {} experts, its stated peak was {} bytes", action.index,
                    peak.domain, room_.PagesIn(peak.domain), peak.bytes);
  if (fails)
    return Answer(action.ticket,
                  Error{ErrorCode::kResourceExhausted, "no memory (a fault of the simulation)"});
  Prepared prepared{action.ticket, stage.placement, {}, memory};
  for (const DeviceId member : stage.placement.members()) {
    Worker& worker = room_.worker(member);
    if (!worker.alive || allocated_.count(member) == 0)
      return Answer(action.ticket, Error{ErrorCode::kUnavailable, fmt::format("device={} is dead", member)});
    worker.mapped.insert(stage.placement.epoch());
    prepared.incarnations[member] = worker.incarnation;
  }
  prepared_ = std::move(prepared);
  Say("stage {} is prepared: {} experts", action.index, count);
  Answer(action.ticket, std::nullopt);
  MaybeCrash("waiting for the commit");
}

void Cluster::Handle(const core::CommitStage& action) {
  if (action.ticket < stage_ticket_) return;
  const bool again = action.ticket == commit_.ticket;
  stage_ticket_ = action.ticket;
  if (again) {
    if (commit_.answered) Answer(action.ticket, commit_.error);
    return;
  }
  commit_ = {action.ticket, action.placement, std::nullopt};
  Pump();
}

void Cluster::Handle(const core::ReleaseStage& action) {
  if (action.ticket < stage_ticket_ || memory_down_ || !room_.MemoryAlive()) return;
  stage_ticket_ = action.ticket;
  if (action.epoch != placement_.epoch())
    return Broken("epoch={} is released, epoch={} serves", action.epoch, placement_.epoch());
  if (step_ && step_->placement->epoch() != placement_.epoch())
    return Answer(action.ticket, kFault);  // a step still uses it
  if (Chance(faults().fail)) return Answer(action.ticket, kFault);
  MaybeCrash("releasing");
  if (!room_.MemoryAlive()) return;
  room_.Trim(placement_);
  for (const core::PlanDevice& device : facts_.devices)
    std::erase_if(room_.worker(device.device).mapped,
                  [&](Epoch epoch) { return epoch < placement_.epoch(); });
  Answer(action.ticket, std::nullopt);
}

void Cluster::Handle(const core::RollBack& action) {
  if (action.ticket < stage_ticket_ || memory_down_ || !room_.MemoryAlive()) return;
  stage_ticket_ = action.ticket;
  if (action.placement != placement_)
    return Broken("rolling back to epoch={}, epoch={} serves", action.placement.epoch(), placement_.epoch());
  commit_.wanted.reset();
  prepared_.reset();
  preparing_ = false;
  room_.Trim(placement_);
  for (const core::PlanDevice& device : facts_.devices)
    std::erase_if(room_.worker(device.device).mapped,
                  [&](Epoch epoch) { return epoch > placement_.epoch(); });
  Answer(action.ticket, std::nullopt);
  MaybeCrash("rolling back");
}

// ---------------------------------------------------------------- sequences

void Cluster::Handle(const core::MoveSequences& action) {
  if (action.ticket < moving_.ticket) return;
  if (action.ticket == moving_.ticket) {
    if (moving_.answered) Answer(action.ticket, std::nullopt);
    return;
  }
  moving_ = {action.ticket, action.leaving};
  Pump();
}

}  // namespace elasticmoe::sim
