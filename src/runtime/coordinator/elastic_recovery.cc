// The engine's side of failures: workers that end are replaced on the same pages, an HMM that ends is
// replaced while serving goes on; and the thread that notices.
#include <fcntl.h>
#include <poll.h>

#include <chrono>

#include "base/clock.h"
#include "base/log.h"
#include "runtime/coordinator/elastic_engine.h"

namespace elasticmoe::runtime {
// Whoever died, the requests go on; without a worker for a member they end, and the next ones try again.
void ElasticEngine::RecoverFromDeaths() {
  const bool in_steps = death_.exchange(false), other = other_death_.exchange(false);
  const bool missing = workers_missing_ && !scheduler_->Idle();
  if (!in_steps && !other && !missing) return;
  Status status;
  {
    const std::scoped_lock lock(instances_mutex_);
    status = RecoverWorkers();
    UpdatePids();
    Rewatch();
  }
  workers_missing_ = !status;
  if (!status) GiveUp(status.error());
  NoticeHmmDeath();
}

Status ElasticEngine::RecoverWorkers() {
  for (int attempt = 0;; ++attempt) {
    std::vector<DeviceId> dead = instances_->TakeDead();
    for (const DeviceId device : dead) Observe(core::WorkerDiedEvent{device});
    // A member without a worker is one that died, now or in an attempt before; others are the resize's
    // business.
    std::vector<DeviceId> missing;
    for (const DeviceId member : placement_.members())
      if (instances_->PidOf(member) < 0 && !asleep_) missing.push_back(member);
    if (step_given_up_) {
      // Out of that step first: nobody may write into areas that the next plan uses.
      step_given_up_ = false;
      instances_->Quiesce(instances_->Attached());  // also one that the step has dismissed on its way
      continue;
    }
    if (missing.empty()) break;
    if (attempt == options_.worker_attempts)
      return Fail(ErrorCode::kUnavailable, "replacing the worker of device {}: {} attempts failed",
                  missing.front(), attempt);
    const TimeNs start = Now();
    prepared_.reset();  // the new worker has not prepared it
    for (const DeviceId device : missing) {
      LogWarn("the worker of device {} ended: a standby takes over", device);
      EM_RETURN_IF_ERROR(instances_->Attach(device, memory_));
      ++recoveries_;
    }
    if (Status prepared = instances_->Prepare(missing, placement_.epoch().value, memory_.map); !prepared) {
      LogWarn("{}", prepared.error().message);
      continue;
    }
    LogInfo("recovered in {:.1f} ms", static_cast<double>(Now() - start) / 1e6);
    for (const DeviceId device : missing) Observe(core::WorkerRecoveredEvent{device});
  }
  return instances_->FillStandby();
}

// ---------------------------------------------------------------- the HMM

void ElasticEngine::NoticeHmmDeath() {
  if (HmmDown() && !next_hmm_) return;  // known, and tried again in time
  pollfd poll_fd{(next_hmm_ ? *next_hmm_ : *hmm_).pidfd(), POLLIN, 0};
  if (::poll(&poll_fd, 1, 0) != 1) return;
  LogWarn("the hmm ended: a new one loads the weights while serving goes on");
  {
    const std::scoped_lock down(mutex_);
    hmm_down_ = true;
  }
  next_hmm_.reset();
  next_hmm_poll_ = {};
  StartNextHmm();
}

bool ElasticEngine::HmmDown() const {
  const std::scoped_lock lock(mutex_);
  return hmm_down_;
}

// Until it has the weights, the workers serve from the pages that they have mapped: the kernel keeps those as
// long as anybody maps them.
void ElasticEngine::StartNextHmm() {
  const std::scoped_lock lock(instances_mutex_);
  for (int attempt = 1; !next_hmm_; ++attempt) {
    auto started = HmmClient::Start(HmmOptionsFor(), placement_);
    if (started)
      next_hmm_ = std::move(*started);
    else if (started.error().code != ErrorCode::kUnavailable || attempt >= options_.worker_attempts)
      return PostponeNextHmm(started.error());
    else
      LogWarn("{}; trying again", started.error().message);  // killed at its start, too
  }
  Rewatch();
  const std::scoped_lock starting(mutex_);
  hmm_failure_.reset();  // who needs an HMM waits for this one
}

// Requests need none: they go on, and it is tried again.
void ElasticEngine::PostponeNextHmm(const Error& error) {
  LogError(
      "replacing the hmm: {}; serving goes on from the memory that the workers have mapped, it is tried "
      "again in {} ms",
      error.message, kHmmRetry.count());
  if (next_hmm_) next_hmm_->Shutdown();
  next_hmm_.reset();
  next_hmm_poll_ = std::chrono::steady_clock::now() + kHmmRetry;
  const std::scoped_lock lock(mutex_);
  hmm_failure_ = error;
}

// Once the new HMM has the weights: all attach to its pages, and all sequences run again from their tokens.
void ElasticEngine::FollowNextHmm() {
  const auto now = std::chrono::steady_clock::now();
  if (now < next_hmm_poll_) return;
  next_hmm_poll_ = now + kHmmPoll;
  if (!next_hmm_) return StartNextHmm();
  std::uint64_t loaded = 0, total = 0;
  const auto ready = next_hmm_->Ready(loaded, total);
  if (!ready) {
    if (ready.error().code == ErrorCode::kUnavailable)
      other_death_ = true;  // it died, too
    else
      PostponeNextHmm(ready.error());
    return;
  }
  if (!*ready) return;
  const std::scoped_lock lock(instances_mutex_);
  // A resize may have gone on since it was started. Until all of this is done the old memory serves.
  if (Status fitted = FitMemory(*next_hmm_, placement_); !fitted) return PostponeNextHmm(fitted.error());
  auto memory = next_hmm_->Describe();
  if (!memory) return PostponeNextHmm(memory.error());
  // Nobody copies between blocks of the new memory what was meant for the old.
  mover_->Follow(next_hmm_->pid());
  step_hmm_.reset();
  for (const DomainMap& domain : memory_.map.domains) scheduler_->ForgetKv(domain.domain);
  hmm_ = std::move(next_hmm_);
  memory_ = *std::move(memory);
  MoveWorkersToMemory();
  prepared_.reset();
  PublishKvBlocks();
  UpdateKvBlocks();
  ++recoveries_;
  Rewatch();
  {
    const std::scoped_lock up(mutex_);
    hmm_down_ = false;
  }
  LogInfo("the new hmm (pid {}) has taken over", hmm_->pid());
}

// One that cannot follow (it died, it does not answer) is replaced as if it had died.
void ElasticEngine::MoveWorkersToMemory() {
  const auto replace = [&](DeviceId device, const Error& error) {
    LogWarn("{}", error.message);
    instances_->Kill(device);
    death_ = true;
  };
  std::vector<DeviceId> moved;
  for (const DeviceId device : instances_->Attached()) {
    if (placement_.RankOf(device) < 0)
      instances_->Retire(device);  // it was joining: the stage is prepared again, from the start
    else if (Status attached = instances_->Reattach(device, memory_); attached)
      moved.push_back(device);
    else
      replace(device, attached.error());
  }
  const std::uint64_t epoch = placement_.epoch().value;
  if (instances_->Prepare(moved, epoch, memory_.map)) return;
  for (const DeviceId device : moved)  // which of them
    if (Status prepared = instances_->Prepare({device}, epoch, memory_.map); !prepared)
      replace(device, prepared.error());
}

bool ElasticEngine::CopyTails(const core::StepPlan& plan) {
  if (plan.copies_before.empty()) return true;
  Status status;
  if (!step_hmm_) {
    auto connected = HmmClient::ConnectTo(options_.hmm_socket, hmm_->pid());
    if (connected)
      step_hmm_ = std::move(*connected);
    else
      status = tl::unexpected<Error>(connected.error());
  }
  if (step_hmm_)
    if (auto copied = step_hmm_->Call(CopyKvRequest(plan.copies_before)); !copied)
      status = tl::unexpected<Error>(copied.error());
  if (status) return true;
  // Whoever was on the way loses its KV and runs again from its tokens.
  LogWarn("{}", status.error().message);
  step_hmm_.reset();
  scheduler_->AbandonStep();
  for (const core::KvCopy& copy : plan.copies_before) scheduler_->ForgetKv(copy.from_domain);
  other_death_ = true;  // the HMM is looked at before the next step
  return false;
}

void ElasticEngine::GiveUp(const Error& error) {
  LogError("{}", error.message);
  scheduler_->FailAll(error.message, events_);
  Deliver();
  failed_attempts_ = 0;
}

void ElasticEngine::Rewatch() {
  const std::vector<int> attached = instances_->AttachedPidfds();
  std::vector<int> others = instances_->StandbyPidfds();
  others.push_back(next_hmm_ ? next_hmm_->pidfd() : hmm_->pidfd());
  standby_count_ = instances_->StandbyCount();
  const std::scoped_lock lock(mutex_);
  watched_.clear();
  const auto watch = [&](const std::vector<int>& fds, bool in_steps) {
    for (const int fd : fds)
      if (const int copy = ::fcntl(fd, F_DUPFD_CLOEXEC, 0); copy >= 0)
        watched_.push_back({Fd(copy), in_steps});
  };
  watch(attached, true);
  watch(others, false);
  watch_again_ = true;
}

void ElasticEngine::Watch(const std::stop_token& stop) {
  std::vector<Watched> all;
  while (!stop.stop_requested()) {
    {
      // Looked at under the lock: a list that is made anew between the look and the taking would be taken
      // now, and its emptied place once more in the next round.
      const std::scoped_lock lock(mutex_);
      if (watch_again_.exchange(false)) all = std::move(watched_);
    }
    std::vector<pollfd> polled;
    for (const Watched& one : all) polled.push_back({one.fd.get(), POLLIN, 0});
    if (::poll(polled.data(), polled.size(), 50) <= 0) continue;
    // Who was a standby when this list was made may be in the steps by now: judged by the new list.
    if (watch_again_) continue;
    // Those that ended are not looked at again, until the engine has replaced them.
    std::vector<Watched> alive;
    bool in_steps = false;
    for (std::size_t i = 0; i < polled.size(); ++i) {
      if (polled[i].revents == 0)
        alive.push_back(std::move(all[i]));
      else
        in_steps |= all[i].in_steps;
    }
    all = std::move(alive);
    {
      const std::scoped_lock lock(mutex_);
      (in_steps ? death_ : other_death_) = true;
      work_.notify_all();
    }
    if (in_steps) exchange_->header().finish.WakeAll();
  }
}

}  // namespace elasticmoe::runtime
