// The engine's side of a resize: what the controller's thread asks for, partly done there (starting and
// attaching workers, preparing epochs), partly on the engine's thread between two steps (switching, handing
// sequences over).
#include <algorithm>
#include <chrono>
#include <thread>

#include "base/clock.h"
#include "base/log.h"
#include "core/placement/step_switch.h"
#include "runtime/coordinator/elastic_engine.h"

namespace elasticmoe::runtime {
namespace {

constexpr std::chrono::milliseconds kPoll{2};
constexpr std::chrono::seconds kMovePatience{2};  // without any sequence that leaves
// A new device in a domain of its own starts with so small a part of its KV memory.
constexpr std::uint64_t kFirstKvPart = 4;

}  // namespace

void ElasticEngine::SetObserver(std::function<void(const core::ResizeEvent&)> observer) {
  const std::scoped_lock lock(observer_mutex_);
  observer_ = std::move(observer);
}

void ElasticEngine::Observe(const core::ResizeEvent& event) {
  const std::scoped_lock lock(observer_mutex_);
  if (observer_) observer_(event);
}

core::Placement ElasticEngine::PlacementNow() const {
  const std::scoped_lock lock(mutex_);
  return published_placement_;
}

TimeNs ElasticEngine::TakeCopyTime() {
  const TimeNs spent = peers_->totals().elapsed_ns - copy_ns_reported_;
  copy_ns_reported_ += spent;
  return spent;
}

TimeNs ElasticEngine::TakeLongestGap() {
  return longest_gap_.exchange(0);
}

Status ElasticEngine::Traced(std::string name, std::string lane, Json args,
                             const std::function<Status()>& task) {
  TraceSpan span{std::move(name), std::move(lane), Now(), 0, std::move(args)};
  Status status = task();
  span.end = Now();
  if (!status) span.args["error"] = status.error().message;
  if (trace_ != nullptr) trace_->Add(std::move(span));
  return status;
}

Status ElasticEngine::BetweenSteps(const std::function<Status()>& task, const std::function<bool()>& early) {
  std::unique_lock lock(mutex_);
  if (stopping_) return Fail(ErrorCode::kUnavailable, "the server is stopping");
  Task entry{&task, &early, {}};
  tasks_.push_back(&entry);
  work_.notify_one();
  if (early) {
    early_task_ = true;
    exchange_->header().finish.Increment();  // where the engine sleeps while a step runs
  }
  task_done_.wait(lock, [&] { return entry.done; });
  return entry.status;
}

void ElasticEngine::RunTasks(bool run) {
  std::unique_lock lock(mutex_);
  while (!tasks_.empty()) {
    Task* task = tasks_.front();
    tasks_.pop_front();
    lock.unlock();
    Status status = run ? (*task->body)() : Fail(ErrorCode::kUnavailable, "the server is stopping");
    lock.lock();
    task->status = std::move(status);
    task->done = true;
    task_done_.notify_all();
  }
}

// The first in the queue, if it can be done while the step runs; else it waits for the step's end.
void ElasticEngine::RunEarlyTask() {
  Task* task = nullptr;
  {
    const std::scoped_lock lock(mutex_);
    if (!tasks_.empty() && *tasks_.front()->early) task = tasks_.front();
  }
  if (task == nullptr || !(*task->early)()) return;
  const std::scoped_lock lock(mutex_);
  tasks_.pop_front();  // only this thread takes from the queue
  task->done = true;
  task_done_.notify_all();
}

// ---------------------------------------------------------------- stages

Status ElasticEngine::EnsureStandby() {
  const std::scoped_lock lock(instances_mutex_);
  if (instances_->StandbyCount() > 0) return {};
  EM_RETURN_IF_ERROR(instances_->AddStandby());
  Rewatch();
  return {};
}

Status ElasticEngine::PrepareStage(const core::PlanStage& stage, const std::stop_token& stop) {
  for (;;) {
    EM_RETURN_IF_ERROR(AwaitHmm(stop));
    Status status = PrepareStageOnce(stage, stop);
    if (status || !LostHmm()) return status;
    LogInfo("preparing epoch {}: {}; again with the next hmm", stage.placement.epoch(),
            status.error().message);
    std::this_thread::sleep_for(kPoll);  // until the watcher has seen it
  }
}

// The cores that these devices will compute on, but those of members.
std::vector<int> ElasticEngine::IdleCpus(const std::vector<DeviceId>& joining) const {
  std::set<int> cpus;
  for (const DeviceId device : joining)
    for (const int cpu : instances_->CpusOf(device)) cpus.insert(cpu);
  const core::Placement present = PlacementNow();
  for (const DeviceId member : present.members())
    for (const int cpu : instances_->CpusOf(member)) cpus.erase(cpu);
  return {cpus.begin(), cpus.end()};
}

Status ElasticEngine::PrepareStageOnce(const core::PlanStage& stage, const std::stop_token& stop) {
  const core::Placement& placement = stage.placement;
  // Where experts come, KV gives way first: old and new must be held together.
  if (options_.device_memory_bytes > 0) {
    std::map<DeviceId, std::uint64_t> coming;
    for (const core::ExpertMove& move : stage.moves) ++coming[move.to];
    const core::Placement present = PlacementNow();
    for (const auto& [device, count] : coming) {
      if (present.RankOf(device) < 0) continue;
      const std::uint64_t held = present.ExpertsOn(device) + count;
      for (;;) {
        EM_ASSIGN_OR_RETURN(const bool done, ShrinkKv(device, KvChunksWanted(held)));
        if (done) break;
        if (stop.stop_requested()) return Fail(ErrorCode::kUnavailable, "the server is stopping");
        std::this_thread::sleep_for(kPoll);
      }
    }
  }
  if (options_.domain_per_device) {
    // What a device gets must not be dropped there later, nor be there beside what it has given up.
    const bool comes_back = std::ranges::any_of(stage.moves, [&](const core::ExpertMove& move) {
      return std::ranges::find(released_, move.to, &core::ExpertDrop::device) != released_.end();
    });
    if (comes_back) EM_RETURN_IF_ERROR(DropReleased(true));
    std::vector<DeviceId> joining;
    {
      const std::scoped_lock lock(instances_mutex_);
      for (const DeviceId member : placement.members())
        if (instances_->PidOf(member) < 0) joining.push_back(member);
    }
    peers_->UseCpus(IdleCpus(joining));
    for (const DeviceId device : joining)
      EM_RETURN_IF_ERROR(Traced("copy shared weights", fmt::format("domain {}", device), {},
                                [&] { return peers_->OpenDomain(DomainId(device.value)); }));
    EM_RETURN_IF_ERROR(Traced("copy experts", "memory", {{"experts", stage.moves.size()}},
                              [&] { return peers_->CopyExperts(stage.moves); }));
  }
  const std::scoped_lock lock(instances_mutex_);
  if (options_.domain_per_device) {
    EM_ASSIGN_OR_RETURN(memory_, hmm_->Describe());
  }
  const std::uint64_t all_experts = std::uint64_t(moe_layers_) * checkpoint_.spec.moe.experts;
  for (const DeviceId member : placement.members()) {
    if (instances_->PidOf(member) > 0) continue;
    // A device brings its KV memory along, most of it later: clearing it takes time. Inside a domain all of
    // it: the pool is everybody's.
    const std::string lane = fmt::format("device {}", member);
    const std::uint64_t held = kv_chunks_of_[member];
    if (options_.domain_per_device) {
      const std::uint64_t chunks =
          std::max({held, std::uint64_t{1}, KvChunksWanted(all_experts) / kFirstKvPart});
      EM_RETURN_IF_ERROR(
          Traced("KV memory", lane, {{"chunks", chunks}}, [&] { return SetKv(member, chunks); }));
    }
    EM_RETURN_IF_ERROR(Traced("attach", lane, {}, [&] { return instances_->Attach(member, memory_); }));
  }
  Rewatch();
  exchange_->WritePlacement(static_cast<int>(placement.epoch().value % kPlacementRing), placement);
  EM_RETURN_IF_ERROR(Traced("find experts", "workers", {{"epoch", placement.epoch().value}}, [&] {
    return instances_->Prepare(placement.members(), placement.epoch().value, memory_.map);
  }));
  prepared_ = placement;
  return {};
}

Status ElasticEngine::CheckCommit(const core::Placement& placement) const {
  if (!prepared_ || prepared_->epoch() != placement.epoch())
    return Fail(ErrorCode::kFailedPrecondition, "committing epoch {}: it is not prepared", placement.epoch());
  // One that died after it had prepared the epoch is nobody's to replace while it is no member: the step it
  // joined would wait for it.
  for (const DeviceId member : placement.members())
    if (instances_->PidOf(member) < 0)
      return Fail(ErrorCode::kUnavailable, "committing epoch {}: device {} has no worker", placement.epoch(),
                  member);
  for (const DeviceId member : placement_.members())
    if (placement.RankOf(member) < 0 && scheduler_->SequencesOn(member) > 0)
      return Fail(ErrorCode::kFailedPrecondition, "committing epoch {}: device {} still has {} sequences",
                  placement.epoch(), member, scheduler_->SequencesOn(member));
  return {};
}

void ElasticEngine::TakePlacement(const core::Placement& placement) {
  for (const DeviceId member : placement.members())
    if (placement_.RankOf(member) < 0) fresh_.insert(member);
  placement_ = placement;
  committed_in_step_ = exchange_->header().step;
  prepared_.reset();
  std::erase_if(leaving_, [&](DeviceId device) { return placement_.RankOf(device) < 0; });
  scheduler_->SetDevices(SchedulerDevices());
  UpdatePids();
  PublishSettled();
  PublishStats();
}

// The step that runs takes the placement from the first layer on that nobody has entered: its rows stay where
// they are, experts are asked for where they are now. New members join it there.
bool ElasticEngine::CommitWithinStep(const core::Placement& placement) {
  const std::scoped_lock lock(instances_mutex_);
  if (!CheckCommit(placement)) return false;  // said between the steps
  ExchangeHeader& header = exchange_->header();
  const auto rows = [&](DeviceId member) { return exchange_->device(member.value).row_count; };
  if (!core::MaySwitchWithinStep(placement_, placement, rows)) return false;
  if (header.views[0].epoch != placement_.epoch().value) return false;  // it has switched before
  WriteView(placement, header.views[1]);
  for (const DeviceId member : placement.members())
    if (placement_.RankOf(member) < 0) BeginDevice(member, header.step);
  if (!exchange_->SwitchView()) return false;
  LogInfo("epoch {} serves from layer {} of step {} on", placement.epoch(), exchange_->SwitchLayer(),
          header.step);
  for (const DeviceId member : placement.members())
    if (placement_.RankOf(member) < 0) exchange_->device(member.value).go.Set(header.step);
  rebalance_ = true;
  TakePlacement(placement);
  return true;
}

Status ElasticEngine::Commit(const core::Placement& placement) {
  if (PlacementNow().epoch() == placement.epoch()) return {};  // asked twice
  EM_RETURN_IF_ERROR(BetweenSteps(
      [&]() -> Status {
        const std::scoped_lock lock(instances_mutex_);
        EM_RETURN_IF_ERROR(CheckCommit(placement));
        UpdateKvBlocks();
        TakePlacement(placement);
        Rebalance();
        return {};
      },
      [&] { return CommitWithinStep(placement); }));
  {
    const std::scoped_lock lock(rows_mutex_);
    rows_at_resize_.clear();
    for (int layer = 0; layer < moe_layers_; ++layer)
      for (int expert = 0; expert < checkpoint_.spec.moe.experts; ++expert)
        rows_at_resize_.push_back(exchange_->ExpertRows(layer, expert).load(std::memory_order_relaxed));
  }
  // Before anything of the epoch before it is given up: an adopted HMM always has what it has recorded.
  const std::scoped_lock lock(instances_mutex_);
  if (Status recorded = hmm_->Record(placement); !recorded)
    LogWarn("{}", recorded.error().message);  // it died: the next one is told when it takes over
  return {};
}

Status ElasticEngine::ReleaseStage(const std::vector<core::ExpertDrop>& drops) {
  // Inside a domain the pages of an expert stay where they are.
  if (!options_.domain_per_device) return {};
  // A step that took the placement on its way reads them in the layers before that: dropped after its end.
  released_.insert(released_.end(), drops.begin(), drops.end());
  released_in_step_ = committed_in_step_;
  return {};
}

Expected<bool> ElasticEngine::DropReleased(bool wait) {
  if (released_.empty()) return true;
  if (!Reached(steps_ended_.load(std::memory_order_acquire), released_in_step_)) {
    if (!wait) return false;
    EM_RETURN_IF_ERROR(BetweenSteps([]() -> Status { return {}; }));
  }
  EM_RETURN_IF_ERROR(peers_->DropExperts(released_));
  released_.clear();
  return true;
}

Status ElasticEngine::Forget(const std::stop_token& stop) {
  if (!options_.domain_per_device) return {};  // an epoch that no step names is forgotten by itself
  EM_RETURN_IF_ERROR(AwaitHmm(stop));
  EM_RETURN_IF_ERROR(DropReleased(true));
  MemoryMap map;
  {
    const std::scoped_lock lock(instances_mutex_);
    prepared_.reset();
    EM_ASSIGN_OR_RETURN(const AttachedMemory found, hmm_->Describe());
    map = found.map;
  }
  peers_->UseCpus({});
  EM_RETURN_IF_ERROR(peers_->Restore(map, PlacementNow()));
  const std::scoped_lock lock(instances_mutex_);
  EM_ASSIGN_OR_RETURN(memory_, hmm_->Describe());
  PublishKvBlocks();
  return {};
}

// ---------------------------------------------------------------- sequences

// Between domains the HMM copies KV: until the next one has taken over, everybody stays.
void ElasticEngine::Rebalance() {
  rebalance_ = next_hmm_ && options_.domain_per_device;
  if (!rebalance_) StartMoves(scheduler_->Rebalance());
  PublishSettled();
}

void ElasticEngine::StartMoves(std::vector<core::Scheduler::Move> moves) {
  for (core::Scheduler::Move& move : moves)
    if (!move.copies.empty()) mover_->Start(move.request, std::move(move.copies));
}

void ElasticEngine::TakeMoved() {
  const std::vector<KvMover::Done> done = mover_->TakeDone();
  for (const KvMover::Done& one : done) {
    if (one.copied)
      scheduler_->MoveCopied(one.request);
    else
      scheduler_->MoveFailed(one.request);
  }
  if (!done.empty()) PublishSettled();
}

void ElasticEngine::PublishSettled() {
  bool settled = mover_->Pending() == 0 && !rebalance_;
  for (const DeviceId device : leaving_) settled &= scheduler_->SequencesOn(device) == 0;
  const std::scoped_lock lock(mutex_);
  settled_.reset();
  if (settled) settled_ = leaving_;
}

Status ElasticEngine::MoveSequences(const std::vector<DeviceId>& leaving, const std::stop_token& stop) {
  const std::set<DeviceId> wanted(leaving.begin(), leaving.end());
  const auto settled = [&] {
    const std::scoped_lock lock(mutex_);
    return settled_ == wanted;
  };
  int left_before = -1;
  auto progress = std::chrono::steady_clock::now();
  while (!settled()) {
    if (stop.stop_requested()) return Fail(ErrorCode::kUnavailable, "the server is stopping");
    int left = 0;
    const bool stuck = std::chrono::steady_clock::now() - progress > kMovePatience;
    EM_RETURN_IF_ERROR(BetweenSteps([&]() -> Status {
      leaving_ = wanted;
      scheduler_->SetDevices(SchedulerDevices());
      TakeMoved();
      if (stuck && options_.domain_per_device)
        // No other domain has room for them, or none can be copied: they run again from their tokens.
        for (const DeviceId device : leaving)
          if (scheduler_->SequencesOn(device) > 0) scheduler_->ForgetKv(DomainId(device.value));
      Rebalance();
      for (const DeviceId device : leaving) left += scheduler_->SequencesOn(device);
      return {};
    }));
    if (left != left_before) progress = std::chrono::steady_clock::now();
    left_before = left;
    if (!settled()) std::this_thread::sleep_for(kPoll);
  }
  return {};
}

Status ElasticEngine::HoldIntake(bool hold, const std::stop_token& stop) {
  for (;;) {
    bool running = false;
    EM_RETURN_IF_ERROR(BetweenSteps([&]() -> Status {
      scheduler_->HoldIntake(hold);
      running = scheduler_->Started();
      return {};
    }));
    if (!hold || !running) return {};
    if (stop.stop_requested()) return Fail(ErrorCode::kUnavailable, "the server is stopping");
    std::this_thread::sleep_for(kPoll);
  }
}

// ---------------------------------------------------------------- sleep

Status ElasticEngine::Sleep() {
  return BetweenSteps([&]() -> Status {
    TakeMoved();
    {
      const std::scoped_lock lock(mutex_);
      if (asleep_) return {};
      if (!scheduler_->Idle() || !submitted_.empty() || mover_->Pending() > 0)
        return Fail(ErrorCode::kFailedPrecondition, "going to sleep: there are requests");
      asleep_ = true;  // a request that comes from now on wakes it
    }
    const std::scoped_lock lock(instances_mutex_);
    for (const DeviceId member : placement_.members()) instances_->Retire(member);
    UpdatePids();
    Rewatch();
    PublishStats();
    return {};
  });
}

Status ElasticEngine::Wake() {
  return BetweenSteps([&]() -> Status {
    if (!asleep_) return {};
    const std::scoped_lock lock(instances_mutex_);
    EM_RETURN_IF_ERROR(AttachAll());
    {
      const std::scoped_lock awake(mutex_);
      asleep_ = false;
    }
    UpdatePids();
    if (Status filled = instances_->FillStandby(); !filled) LogWarn("{}", filled.error().message);
    Rewatch();
    PublishStats();
    return {};
  });
}

Status ElasticEngine::Retire(DeviceId device) {
  if (PlacementNow().RankOf(device) >= 0)
    return Fail(ErrorCode::kFailedPrecondition, "retiring device {}: it is a member", device);
  // In the step that it left on the way, others may wait for it still, though it has not begun.
  if (!Reached(steps_ended_.load(std::memory_order_acquire), committed_in_step_))
    EM_RETURN_IF_ERROR(BetweenSteps([]() -> Status { return {}; }));
  {
    const std::scoped_lock lock(instances_mutex_);
    instances_->Retire(device);
    EM_RETURN_IF_ERROR(instances_->FillStandby());
    Rewatch();
  }
  if (!options_.domain_per_device) return {};
  EM_RETURN_IF_ERROR(BetweenSteps([&]() -> Status {  // nobody copies from or to it any more
    TakeMoved();
    if (mover_->Pending() > 0)
      return Fail(ErrorCode::kUnavailable, "retiring device {}: KV is still on its way", device);
    UpdateKvBlocks();
    scheduler_->SetBlocks(DomainId(device.value), 0);
    return {};
  }));
  EM_RETURN_IF_ERROR(DropReleased(true));
  EM_RETURN_IF_ERROR(peers_->CloseDomain(DomainId(device.value)));
  const std::scoped_lock lock(instances_mutex_);
  kv_chunks_of_.erase(device);
  EM_ASSIGN_OR_RETURN(memory_, hmm_->Describe());
  PublishKvBlocks();
  return {};
}

}  // namespace elasticmoe::runtime
