// The engine's side of a resize: what the controller's thread asks for, partly done there (starting and
// attaching workers, preparing epochs), partly on the engine's thread between two steps (switching, handing
// sequences over).
#include <algorithm>

#include "base/log.h"
#include "runtime/coordinator/elastic_engine.h"

namespace elasticmoe::runtime {

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

TimeNs ElasticEngine::TakeLongestGap() {
  return longest_gap_.exchange(0);
}

Status ElasticEngine::BetweenSteps(const std::function<Status()>& task) {
  std::unique_lock lock(mutex_);
  if (stopping_) return Fail(ErrorCode::kUnavailable, "the server is stopping");
  Task entry{&task, {}, false};
  tasks_.push_back(&entry);
  work_.notify_one();
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

Status ElasticEngine::EnsureStandby() {
  const std::scoped_lock lock(instances_mutex_);
  if (instances_->StandbyCount() > 0) return {};
  return instances_->AddStandby();
}

Status ElasticEngine::PrepareStage(const core::Placement& placement) {
  const std::scoped_lock lock(instances_mutex_);
  for (const DeviceId member : placement.members()) {
    if (instances_->PidOf(member) > 0) continue;
    // A device brings its KV memory along, into the domain's pool.
    const std::size_t chunk_bytes =
        memory_.map.blocks_per_chunk *
        compute::KvLayout::Of(checkpoint_.spec, memory_.map.kv_element_bytes).BlockBytes();
    EM_RETURN_IF_ERROR(hmm_->Call({{"op", "set_kv"},
                                   {"domain", memory_.map.DomainOf(member).value},
                                   {"device", member.value},
                                   {"chunks", options_.kv_memory_bytes / chunk_bytes}}));
    EM_ASSIGN_OR_RETURN(memory_, hmm_->Describe());
    EM_RETURN_IF_ERROR(instances_->SetKvChunks(memory_.map));
    EM_RETURN_IF_ERROR(instances_->Attach(member, memory_));
  }
  Rewatch();
  exchange_->WritePlacement(static_cast<int>(placement.epoch().value % kPlacementRing), placement);
  EM_RETURN_IF_ERROR(instances_->Prepare(placement.members(), placement.epoch().value, memory_.map));
  prepared_ = placement;
  return {};
}

Status ElasticEngine::Commit(const core::Placement& placement) {
  return BetweenSteps([&]() -> Status {
    const std::scoped_lock lock(instances_mutex_);
    if (placement_.epoch() == placement.epoch()) return {};  // asked twice
    if (!prepared_ || prepared_->epoch() != placement.epoch())
      return Fail(ErrorCode::kFailedPrecondition, "committing epoch {}: it is not prepared",
                  placement.epoch());
    for (const DeviceId member : placement.members())
      if (placement_.RankOf(member) < 0) fresh_.insert(member);
    placement_ = placement;
    prepared_.reset();
    scheduler_->SetDevices(SchedulerDevices());
    UpdateKvBlocks();
    (void)scheduler_->Rebalance();
    UpdateSpin();
    PublishStats();
    return {};
  });
}

Status ElasticEngine::MoveSequences(const std::vector<DeviceId>& leaving) {
  return BetweenSteps([&]() -> Status {
    leaving_.clear();
    leaving_.insert(leaving.begin(), leaving.end());
    scheduler_->SetDevices(SchedulerDevices());
    // Inside a domain a sequence changes device by its table's number: done when this returns.
    (void)scheduler_->Rebalance();
    for (const DeviceId device : leaving)
      if (scheduler_->SequencesOn(device) > 0)
        return Fail(ErrorCode::kUnavailable, "handing sequences over: device {} has {} left", device,
                    scheduler_->SequencesOn(device));
    return {};
  });
}

Status ElasticEngine::Retire(DeviceId device) {
  EM_RETURN_IF_ERROR(BetweenSteps([&]() -> Status {
    if (placement_.RankOf(device) >= 0)
      return Fail(ErrorCode::kFailedPrecondition, "retiring device {}: it is a member", device);
    leaving_.erase(device);
    return {};
  }));
  const std::scoped_lock lock(instances_mutex_);
  instances_->Retire(device);
  EM_RETURN_IF_ERROR(instances_->FillStandby());
  Rewatch();
  return {};
}

}  // namespace elasticmoe::runtime
