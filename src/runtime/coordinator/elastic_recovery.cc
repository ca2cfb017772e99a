// The engine's side of failures: workers that end are replaced on the same pages, an HMM that ends is
// replaced while serving goes on; and the thread that notices.
#include <fcntl.h>
#include <poll.h>

#include <chrono>

#include "base/log.h"
#include "runtime/coordinator/elastic_engine.h"

namespace elasticmoe::runtime {
namespace {

constexpr int kReplaceAttempts = 3;  // a machine that cannot start a worker must not be tried for ever

TimeNs Now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

Status ElasticEngine::RecoverWorkers() {
  const std::scoped_lock lock(instances_mutex_);
  // Out of the step first: nobody may write into areas that the next plan uses.
  instances_->Quiesce(placement_.members());
  for (int attempt = 0;; ++attempt) {
    std::vector<DeviceId> dead = instances_->TakeDead();
    for (const DeviceId device : dead) Observe(core::WorkerDiedEvent{device});
    // A member without a worker is one that died, now or in an attempt before; others are the resize's
    // business.
    std::vector<DeviceId> missing;
    for (const DeviceId member : placement_.members())
      if (instances_->PidOf(member) < 0) missing.push_back(member);
    if (missing.empty()) break;
    if (attempt == kReplaceAttempts)
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
  EM_RETURN_IF_ERROR(instances_->FillStandby());
  for (const DeviceId member : placement_.members()) pids_[member] = instances_->PidOf(member);
  Rewatch();
  return {};
}

// Starts a new HMM where the present one has ended. Until that has the weights, the workers serve from the
// pages that they have mapped: the kernel keeps those as long as anybody maps them.
Status ElasticEngine::ReplaceHmm() {
  const std::scoped_lock lock(instances_mutex_);
  const HmmClient& watched = next_hmm_ ? *next_hmm_ : *hmm_;
  pollfd poll_fd{watched.pidfd(), POLLIN, 0};
  if (::poll(&poll_fd, 1, 0) != 1) return {};
  LogWarn("the hmm ended: a new one loads the weights while serving goes on");
  EM_ASSIGN_OR_RETURN(next_hmm_, HmmClient::Start(HmmOptionsFor()));
  next_hmm_poll_ = {};
  Rewatch();
  return {};
}

// Once the new HMM has the weights: all attach to its pages, and all sequences run again from their tokens.
Status ElasticEngine::SwitchToNextHmm() {
  const auto now = std::chrono::steady_clock::now();
  if (now < next_hmm_poll_) return {};
  next_hmm_poll_ = now + kHmmPoll;
  std::uint64_t loaded = 0, total = 0;
  const auto ready = next_hmm_->Ready(loaded, total);
  if (!ready) {
    if (ready.error().code == ErrorCode::kUnavailable) {  // it died, too: the watcher says so
      death_ = true;
      return {};
    }
    return tl::unexpected<Error>(ready.error());
  }
  if (!*ready) return {};
  const std::scoped_lock lock(instances_mutex_);
  // The new one was started for the first size; the others' KV memory is added.
  const std::size_t chunk_bytes =
      memory_.map.blocks_per_chunk *
      compute::KvLayout::Of(checkpoint_.spec, memory_.map.kv_element_bytes).BlockBytes();
  for (const DeviceId member : instances_->Attached())
    EM_RETURN_IF_ERROR(next_hmm_->Call({{"op", "set_kv"},
                                        {"domain", memory_.map.DomainOf(member).value},
                                        {"device", member.value},
                                        {"chunks", options_.kv_memory_bytes / chunk_bytes}}));
  EM_ASSIGN_OR_RETURN(AttachedMemory memory, next_hmm_->Describe());
  hmm_ = std::move(next_hmm_);
  memory_ = std::move(memory);
  for (const DomainMap& domain : memory_.map.domains) scheduler_->ForgetKv(domain.domain);
  // Joining devices, too: none may go on with the old pages.
  for (const DeviceId device : instances_->Attached())
    EM_RETURN_IF_ERROR(instances_->Reattach(device, memory_));
  prepared_.reset();
  EM_RETURN_IF_ERROR(instances_->Prepare(placement_.members(), placement_.epoch().value, memory_.map));
  UpdateKvBlocks();
  ++recoveries_;
  Rewatch();
  LogInfo("the new hmm (pid {}) has taken over", hmm_->pid());
  return {};
}

void ElasticEngine::GiveUp(const Error& error) {
  LogError("{}", error.message);
  std::vector<core::TokenEvent> events;
  scheduler_->FailAll(error.message, events);
  Deliver(events);
  failed_attempts_ = 0;
}

void ElasticEngine::Rewatch() {
  std::vector<int> fds = instances_->Pidfds();
  fds.push_back(next_hmm_ ? next_hmm_->pidfd() : hmm_->pidfd());
  const std::scoped_lock lock(mutex_);
  watched_.clear();
  for (const int fd : fds)
    if (const int copy = ::fcntl(fd, F_DUPFD_CLOEXEC, 0); copy >= 0) watched_.emplace_back(copy);
  watch_again_ = true;
}

void ElasticEngine::Watch(const std::stop_token& stop) {
  std::vector<Fd> fds;
  while (!stop.stop_requested()) {
    if (watch_again_.exchange(false)) {
      const std::scoped_lock lock(mutex_);
      fds = std::move(watched_);
      watched_.clear();
    }
    std::vector<pollfd> polled;
    for (const Fd& fd : fds) polled.push_back({fd.get(), POLLIN, 0});
    if (::poll(polled.data(), polled.size(), 50) <= 0) continue;
    // Those that ended are not looked at again, until the engine has replaced them.
    std::vector<Fd> alive;
    for (std::size_t i = 0; i < polled.size(); ++i)
      if (polled[i].revents == 0) alive.push_back(std::move(fds[i]));
    fds = std::move(alive);
    {
      const std::scoped_lock lock(mutex_);
      death_ = true;
      work_.notify_all();
    }
    exchange_->header().finish.WakeAll();
  }
}

}  // namespace elasticmoe::runtime
