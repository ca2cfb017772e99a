// The engine of the simulated world: what runtime/coordinator does with processes, done with events.
#include <algorithm>

#include "base/check.h"
#include "sim/cluster.h"

namespace elasticmoe::sim {

constexpr TimeNs kStepTimeout = 2'000'000'000;

bool Cluster::Healthy() const {
  if (memory_down_) return false;
  for (const DeviceId member : placement_.members())
    if (down_.count(member) > 0) return false;
  return true;
}

// A step boundary, wherever one can be.
void Cluster::Pump() {
  if (coordinator_down_ || step_ || pumping_ || !failure_.empty() || !Healthy()) return;
  pumping_ = true;
  ApplyCommit();
  if (kv_changed_) UpdateKv();
  ApplyMoves();
  ApplyVacate();
  if (Healthy() && failure_.empty()) {
    core::StepPlan plan = scheduler_->Plan(heap_.now());
    Deliver(plan.failed);
    if (!plan.Empty()) Dispatch(std::move(plan));
  }
  pumping_ = false;
}

void Cluster::Dispatch(core::StepPlan plan) {
  ++report_.steps;
  for (const core::KvCopy& copy : plan.copies_before) {
    Say("  copies block {}/{} to {}/{}", copy.from_domain, copy.from, copy.to_domain, copy.to);
    room_.CopyKv(copy);
  }
  for (const core::TableWrite& write : plan.table_writes) {
    Say("  slot {} index {}: block {}", write.table_slot, write.index, write.block);
    room_.WriteTable(write);
  }
  step_.emplace();
  step_->id = plan.step;
  step_->placement = std::make_shared<core::Placement>(placement_);
  step_->result.step = plan.step;
  Say("step {} epoch {} on {} devices", plan.step, placement_.epoch(), placement_.members().size());
  for (const DeviceId member : placement_.members()) {
    std::vector<core::SequenceStep> sequences;
    for (core::DevicePlan& device : plan.devices)
      if (device.device == member) sequences = std::move(device.sequences);
    std::vector<std::vector<TokenId>> rows;
    for (const core::SequenceStep& one : sequences) {
      Say("  device {}: request {} rows {}+{} slot {}", member, one.request, one.start_position, one.rows,
          one.table_slot);
      const auto tokens = scheduler_->Tokens(one.request).first(one.start_position + one.rows);
      rows.emplace_back(tokens.begin(), tokens.end());
    }
    step_->waiting.insert(member);
    Later(Milliseconds(2, 25),
          [this, member, incarnation = room_.worker(member).incarnation, placement = step_->placement,
           id = plan.step, sequences = std::move(sequences),
           rows = std::move(rows)] { ComputeOn(member, incarnation, placement, id, sequences, rows); });
  }
  for (const core::DevicePlan& device : plan.devices)
    if (placement_.RankOf(device.device) < 0)
      Broken("step {} has rows on device={}, no member", plan.step, device.device);
  Later(kStepTimeout, [this, id = plan.step] { StepTimeout(id); });
}

// A worker's part of a step, and its expert work for the others.
void Cluster::ComputeOn(DeviceId device, int incarnation,
                        const std::shared_ptr<const core::Placement>& placement, StepId step,
                        const std::vector<core::SequenceStep>& sequences,
                        const std::vector<std::vector<TokenId>>& rows) {
  const Worker& worker = room_.worker(device);
  if (!worker.alive || worker.incarnation != incarnation || !room_.MemoryAlive()) return;
  if (!step_ || step_->id != step)
    return;  // given up meanwhile: the worker is told before it touches anything
  if (Chance(faults().crash / 20)) return CrashWorker(device);
  if (worker.mapped.count(placement->epoch()) == 0)
    return Broken("step {}: device={} has not mapped epoch={}", step, device, placement->epoch());
  if (const std::string wrong = room_.CheckHolds(*placement); !wrong.empty())
    return Broken("step {}: {}", step, wrong);
  std::vector<core::SequenceResult> results;
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    std::uint64_t fold = 0;
    if (const std::string wrong = room_.Compute(device, sequences[i], rows[i], fold); !wrong.empty())
      return Broken("step {} device={}: {}", step, device, wrong);
    core::SequenceResult result;
    result.request = sequences[i].request;
    if (sequences[i].sample) result.sampled.token = NextToken(fold, 1000);
    results.push_back(std::move(result));
    if (Chance(faults().crash / 20)) return CrashWorker(device);  // half of its rows are written
  }
  Send([this, device, step, results = std::move(results)] { TakeResult(device, step, results); });
}

void Cluster::TakeResult(DeviceId device, StepId step, const std::vector<core::SequenceResult>& results) {
  if (!step_ || step_->id != step || step_->waiting.erase(device) == 0) return;  // late or doubled
  for (const core::SequenceResult& result : results) step_->result.sequences.push_back(result);
  if (!results.empty() && fresh_.erase(device) > 0) StepMachine(core::FirstTokenEvent{device});
  if (!step_->waiting.empty()) return;
  const Step done = std::move(*step_);
  step_.reset();
  std::vector<core::TokenEvent> events;
  scheduler_->Complete(done.result, heap_.now(), events);
  Deliver(events);
  StepMachine(core::TrafficEvent{last_step_ > 0 ? heap_.now() - last_step_ : 0, 0, 0});
  last_step_ = scheduler_->Idle() ? 0 : heap_.now();
  Pump();
}

void Cluster::StepTimeout(StepId step) {
  if (!step_ || step_->id != step) return;
  // Whoever does not answer is taken for dead, and made so: no late write may come from it.
  const std::set<DeviceId> silent = step_->waiting;
  Say("step {} timed out: {} devices are silent", step, silent.size());
  for (const DeviceId device : silent) CrashWorker(device);
}

void Cluster::GiveUpStep() {
  if (!step_) return;
  Say("step {} is given up", step_->id);
  ++report_.steps_abandoned;
  step_.reset();
  scheduler_->AbandonStep();
}

// ---------------------------------------------------------------- deaths and recovery

void Cluster::MaybeCrash(const char* phase) {
  if (!Chance(faults().crash)) return;
  Say("crash while {}", phase);
  if (rng_.Below(6) == 0) return CrashMemory();
  const std::vector<DeviceId> devices(allocated_.begin(), allocated_.end());
  CrashWorker(devices[rng_.Below(devices.size())]);
}

void Cluster::CrashWorker(DeviceId device) {
  Worker& worker = room_.worker(device);
  if (!worker.alive) return;
  ++report_.worker_deaths;
  Say("device {} dies", device);
  room_.KillWorker(device);
  Later(Milliseconds(0.1, 60),
        [this, device, incarnation = worker.incarnation] { WorkerFound(device, incarnation); });
}

void Cluster::WorkerFound(DeviceId device, int incarnation) {
  const Worker& worker = room_.worker(device);
  if (worker.alive || worker.incarnation != incarnation || allocated_.count(device) == 0 ||
      !down_.insert(device).second)
    return;
  Say("device {} is found dead", device);
  if (placement_.RankOf(device) >= 0) {
    GiveUpStep();
    Later(Milliseconds(5, 200), [this, device] { RecoverWorker(device); });
  }
  StepMachine(core::WorkerDiedEvent{device});
}

void Cluster::RecoverWorker(DeviceId device) {
  if (down_.count(device) == 0) return;
  if (memory_down_ || !room_.MemoryAlive() || Chance(faults().fail)) {  // it cannot attach now
    Later(Milliseconds(20, 200), [this, device] { RecoverWorker(device); });
    return;
  }
  if (placement_.RankOf(device) < 0) return;
  Say("device {} is back, same pages", device);
  room_.StartWorker(device);
  room_.worker(device).mapped.insert(placement_.epoch());
  down_.erase(device);
  StepMachine(core::WorkerRecoveredEvent{device});
  Pump();
}

void Cluster::CrashMemory() {
  if (!room_.MemoryAlive()) return;
  ++report_.memory_deaths;
  Say("the memory dies");
  room_.KillMemory();
  Later(Milliseconds(0.1, 60), [this] {
    if (coordinator_down_ || room_.MemoryAlive()) return;
    Say("the memory is found dead");
    memory_down_ = true;
    GiveUpStep();
    Later(Milliseconds(100, 800), [this] { RecoverMemory(); });
  });
}

void Cluster::RecoverMemory() {
  if (room_.MemoryAlive()) return;
  if (Chance(faults().fail)) {
    Later(Milliseconds(50, 300), [this] { RecoverMemory(); });
    return;
  }
  Say("the memory is loaded again");
  memory_down_ = false;
  prepared_.reset();
  room_.LoadMemory(placement_);
  UpdateKv();
  for (const core::PlanDevice& device : facts_.devices) {
    Worker& worker = room_.worker(device.device);
    if (!worker.alive) continue;
    worker.mapped.clear();
    if (placement_.RankOf(device.device) >= 0) worker.mapped.insert(placement_.epoch());
  }
  const std::map<RequestId, int> copying = std::move(copying_);  // they ended with the memory
  copying_.clear();
  for (const auto& [request, incarnation] : copying) scheduler_->MoveFailed(request);
  std::set<DomainId> domains;
  for (const core::PlanDevice& device : facts_.devices) domains.insert(device.domain);
  for (const DomainId domain : domains) scheduler_->ForgetKv(domain);
  Pump();
}

// ---------------------------------------------------------------- a resize, at a step boundary

void Cluster::UpdateSchedulerDevices() {
  std::vector<core::SchedulerDevice> devices;
  for (const core::PlanDevice& device : facts_.devices)
    if (placement_.RankOf(device.device) >= 0) {
      const bool leaves =
          std::find(moving_.leaving.begin(), moving_.leaving.end(), device.device) != moving_.leaving.end();
      devices.push_back({device.device, device.domain, device.weight, !leaves});
    }
  scheduler_->SetDevices(devices);
}

void Cluster::UpdateKv() {
  kv_changed_ = false;
  std::set<DomainId> domains;
  for (const core::PlanDevice& device : facts_.devices) domains.insert(device.domain);
  for (const DomainId domain : domains) {
    const std::uint32_t count = BlocksOf(domain, kv_less_.count(domain) > 0);
    scheduler_->SetBlocks(domain, count);
    room_.ResizeKv(domain, count);
  }
}

void Cluster::ApplyCommit() {
  if (!commit_.wanted) return;
  const core::Placement next = std::move(*commit_.wanted);
  commit_.wanted.reset();
  bool ready = prepared_ && prepared_->placement == next && prepared_->memory == room_.memory_incarnation() &&
               next.epoch().value == placement_.epoch().value + 1;
  for (const DeviceId member : next.members())
    ready = ready && down_.count(member) == 0 &&
            prepared_->incarnations[member] == room_.worker(member).incarnation;
  if (!ready) {
    commit_.error = Error{ErrorCode::kUnavailable, "what was prepared is gone"};
    Say("epoch {} is not committed: what was prepared is gone", next.epoch());
    commit_.answered = true;
    return Answer(commit_.ticket, commit_.error);
  }
  for (const DeviceId member : placement_.members())
    if (next.RankOf(member) < 0 && scheduler_->SequencesOn(member) > 0)
      return Broken("device={} leaves with sequences", member);
  for (const DeviceId member : next.members())
    if (placement_.RankOf(member) < 0) fresh_.insert(member);
  for (const DeviceId member : placement_.members())
    if (next.RankOf(member) < 0) fresh_.erase(member);
  placement_ = next;
  prepared_.reset();
  ++report_.commits;
  Say("epoch {} is committed: {} members", placement_.epoch(), placement_.members().size());
  UpdateSchedulerDevices();
  UpdateKv();
  // The memory is told before anything of the epoch before is given up: whoever adopts it finds all of it.
  if (Chance(faults().crash)) heap_.After(0, [this] { CrashCoordinator(); });
  Later(Milliseconds(0.01, 2), [this, ticket = commit_.ticket] {
    recorded_ = placement_;
    commit_.answered = true;
    Answer(ticket, std::nullopt);
  });
  MaybeCrash("committing");
}

void Cluster::StartCopy(const core::Scheduler::Move& move) {
  copying_[move.request] = room_.memory_incarnation();
  Later(Milliseconds(1, Chance(faults().late) ? 2000 : 80),
        [this, request = move.request, copies = move.copies, memory = room_.memory_incarnation()] {
          if (memory != room_.memory_incarnation()) return;  // ended with the memory
          copying_.erase(request);
          if (Chance(faults().fail)) {
            scheduler_->MoveFailed(request);
          } else {
            for (const core::KvCopy& copy : copies) room_.CopyKv(copy);
            scheduler_->MoveCopied(request);
          }
          Pump();
        });
}

void Cluster::ApplyMoves() {
  if (moving_.answered || moving_.ticket == Ticket()) return;
  if (!moving_.taken) {
    moving_.taken = true;
    UpdateSchedulerDevices();
  }
  if (!copying_.empty()) return;
  const auto left = [&] {
    return std::any_of(moving_.leaving.begin(), moving_.leaving.end(),
                       [&](DeviceId device) { return scheduler_->SequencesOn(device) > 0; });
  };
  if (!moving_.balanced || left()) {
    moving_.balanced = true;
    for (const core::Scheduler::Move& move : scheduler_->Rebalance()) {
      ++report_.sequences_moved;
      Say("request {} moves from device {} to {}: {} blocks to copy", move.request, move.from, move.to,
          move.copies.size());
      if (!move.copies.empty()) StartCopy(move);
    }
    MaybeCrash("moving sequences");
  }
  if (!copying_.empty() || left()) return;
  moving_.answered = true;
  Answer(moving_.ticket, std::nullopt);
}

}  // namespace elasticmoe::sim
