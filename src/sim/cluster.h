// One simulated world: clients, an operator, the engine over the real scheduler, the control plane over the
// real resize machine, and a machine room, under the faults of one seed. Deterministic: one generator, one
// event heap.
//
//   client ──► scheduler ──plan──► workers ──results──► scheduler ──tokens──► checker
//   operator ──► resize machine ──actions──► (messages: lost, doubled, late) ──► engine, memory, workers
//                     ▲──────────answers─────────────────────────────────────────────┘
//
// What the coordinator knows (scheduler, resize machine, all between them) is lost when it dies; what it has
// recorded with the memory stays, and the next one adopts that.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "base/rng.h"
#include "core/control/resize.h"
#include "core/schedule/scheduler.h"
#include "sim/event_heap.h"
#include "sim/machine_room.h"
#include "sim/simulate.h"
#include "sim/trace.h"

namespace elasticmoe::sim {

class Cluster {
 public:
  Cluster(std::uint64_t seed, Trace& trace, SimulationReport& report);

  // Lives the world to its end. Empty, or what was broken first.
  std::string Run();

 private:
  using Ticket = core::Ticket;

  struct Faults {                                                 // chances; zero once the world is quiet
    double lost = 0, doubled = 0, late = 0, fail = 0, crash = 0;  // crash: of workers, memory, coordinator
  };
  struct Client {
    core::GenerationRequest request;
    std::uint64_t fold = 0;  // of all tokens so far
    int received = 0;
    bool cancelled = false, ended = false;
  };
  struct Step {
    StepId id;
    std::shared_ptr<const core::Placement> placement;
    std::set<DeviceId> waiting;  // devices whose answer has not come
    core::StepResult result;
  };
  struct Prepared {
    Ticket ticket;
    core::Placement placement;
    std::map<DeviceId, int> incarnations;
    int memory = 0;
  };
  struct Commit {
    Ticket ticket;
    std::optional<core::Placement> wanted;  // until it is done
    std::optional<Error> error;             // the answer
    bool answered = false;
  };
  struct Moving {
    Ticket ticket;
    std::vector<DeviceId> leaving;
    bool taken = false, balanced = false, answered = false;
  };

  struct Vacating {  // the KV memory of a domain shrinks, once nobody uses its last blocks
    DomainId domain;
    TimeNs since = 0;
  };

  // cluster.cc: the world around
  static core::ResizeOptions MachineOptions();
  static core::PlanFacts MakeFacts(Rng& rng);
  core::PlanFacts FactsFor(int devices) const;
  static core::SchedulerOptions MakeSchedulerOptions();
  static core::Placement MakePlacement(Rng& rng, const core::PlanFacts& facts);
  void ScheduleLife();
  void Arrive(int prompt_tokens, int max_tokens, bool shared_prefix);
  void Operate();
  void StartResize(int tries);
  void Tick();
  bool Finished() const;
  void Check();
  void FinalCheck();
  bool Chance(double chance) { return chance > 0 && rng_.Uniform() < chance; }
  TimeNs Milliseconds(double from, double to) {
    return static_cast<TimeNs>((from + (to - from) * rng_.Uniform()) * 1e6);
  }
  const Faults& faults() const { return heap_.now() < quiet_at_ ? faults_ : kNoFaults; }
  template <class... Args>
  void Broken(fmt::format_string<Args...> format, Args&&... args) {
    if (failure_.empty()) failure_ = fmt::format(format, std::forward<Args>(args)...);
    trace_.Line(heap_.now(), "BROKEN: {}", failure_);
  }
  template <class... Args>
  void Say(fmt::format_string<Args...> format, Args&&... args) {
    trace_.Line(heap_.now(), format, std::forward<Args>(args)...);
  }

  // cluster_engine.cc: steps, deaths, recovery
  void Pump();
  bool Healthy() const;
  void Dispatch(core::StepPlan plan);
  void ComputeOn(DeviceId device, int incarnation, const std::shared_ptr<const core::Placement>& placement,
                 StepId step, const std::vector<core::SequenceStep>& sequences,
                 const std::vector<std::vector<TokenId>>& rows);
  void TakeResult(DeviceId device, StepId step, const std::vector<core::SequenceResult>& results);
  void StepTimeout(StepId step);
  void GiveUpStep();
  void Deliver(const std::vector<core::TokenEvent>& events);
  void MaybeCrash(const char* phase);
  void CrashWorker(DeviceId device);
  void CrashMemory();
  void WorkerFound(DeviceId device, int incarnation);
  void RecoverWorker(DeviceId device);
  void RecoverMemory();
  void UpdateSchedulerDevices();
  void UpdateKv();
  void ApplyCommit();
  void ApplyMoves();
  void StartCopy(const core::Scheduler::Move& move);

  // cluster_coordinator.cc: its death and what is adopted; KV memory given away and taken back
  void Later(TimeNs delay, const EventHeap::Event& event);  // of this coordinator: void once it is dead
  void CrashCoordinator();
  void Adopt();
  void Resubmit();
  void ShrinkKv();
  void ApplyVacate();
  std::uint32_t BlocksOf(DomainId domain, bool less) const;

  // cluster_control.cc: what the resize machine asks for
  void StepMachine(const core::ResizeEvent& event);
  void Post(const core::ResizeAction& action);
  void Answer(Ticket ticket, std::optional<Error> error);
  void Send(const EventHeap::Event& event);
  void Handle(const core::ProvisionDevice& action);
  void Handle(const core::RetireDevice& action);
  void Handle(const core::PrepareStage& action);
  void FinishPrepare(const core::PrepareStage& action, int memory, bool fails);
  void Handle(const core::CommitStage& action);
  void Handle(const core::ReleaseStage& action);
  void Handle(const core::RollBack& action);
  void Handle(const core::MoveSequences& action);
  void Handle(const core::ReplyAction& action);
  void Handle(const core::ReportAction& action);

  static const Faults kNoFaults;

  Rng rng_;
  Trace& trace_;
  SimulationReport& report_;
  EventHeap heap_;
  core::PlanFacts facts_;
  Faults faults_;
  TimeNs quiet_at_ = 0;
  std::uint32_t blocks_per_device_ = 0, least_blocks_ = 0;
  std::string failure_;

  MachineRoom room_;
  core::Placement placement_;  // that serves: the engine's truth
  core::Placement recorded_;   // what the memory was told last
  std::unique_ptr<core::Scheduler> scheduler_;
  core::ResizeMachine machine_;

  std::map<RequestId, Client> clients_;
  std::vector<TokenId> shared_prefix_;
  int arrivals_left_ = 0;
  int operations_left_ = 0;
  int operations_ = 0;
  std::set<std::string> accepted_, ended_;

  int coordinator_ = 1;  // which process
  bool coordinator_down_ = false;
  std::set<DomainId> kv_less_;  // domains that have given KV memory away
  std::optional<Vacating> vacating_;
  bool kv_changed_ = false;  // to be told to the scheduler between two steps

  std::optional<Step> step_;
  bool pumping_ = false;
  std::set<DeviceId> down_;   // known to be dead
  bool memory_down_ = false;  // known
  std::set<DeviceId> fresh_;  // new members that have computed no token yet
  TimeNs last_step_ = 0;
  std::map<RequestId, int> copying_;  // KV copies under way -> memory incarnation
  Moving moving_;

  std::set<DeviceId> allocated_;
  std::map<DeviceId, Ticket> device_ticket_;
  std::map<DeviceId, std::optional<Error>> device_failed_;  // what was answered to that ticket
  Ticket stage_ticket_;
  bool preparing_ = false;
  std::optional<Prepared> prepared_;
  Commit commit_;
};

}  // namespace elasticmoe::sim
