#include "runtime/coordinator/kv_mover.h"

#include <algorithm>
#include <memory>

#include "base/log.h"
#include "runtime/coordinator/hmm_client.h"

namespace elasticmoe::runtime {
namespace {

// Blocks a call: short enough that whoever else asks the HMM for something does not wait long, long enough
// that all cores are worth their start (some 30 MiB of a middle-sized model).
constexpr std::size_t kBlocksPerCall = 64;

}  // namespace

Json CopyKvRequest(std::span<const core::KvCopy> copies) {
  Json blocks = Json::array();
  for (const core::KvCopy& copy : copies)
    blocks.push_back({copy.from_domain.value, copy.from.value, copy.to_domain.value, copy.to.value});
  return {{"op", "copy_kv"}, {"blocks", blocks}};
}

KvMover::KvMover(std::string hmm_socket, int hmm_pid, std::function<void()> notify)
    : socket_(std::move(hmm_socket)),
      notify_(std::move(notify)),
      hmm_pid_(hmm_pid),
      thread_([this](const std::stop_token& stop) { Loop(stop); }) {}

KvMover::~KvMover() {
  thread_.request_stop();
  thread_.join();
}

void KvMover::Start(RequestId request, std::vector<core::KvCopy> copies) {
  const std::scoped_lock lock(mutex_);
  jobs_.push_back({request, std::move(copies), hmm_pid_});
  ++pending_;
  work_.notify_one();
}

void KvMover::Follow(int hmm_pid) {
  std::unique_lock lock(mutex_);
  hmm_pid_ = hmm_pid;
  idle_.wait(lock, [&] { return !copying_; });
}

std::vector<KvMover::Done> KvMover::TakeDone() {
  const std::scoped_lock lock(mutex_);
  pending_ -= done_.size();
  return std::exchange(done_, {});
}

bool KvMover::AnythingDone() const {
  const std::scoped_lock lock(mutex_);
  return !done_.empty();
}

std::size_t KvMover::Pending() const {
  const std::scoped_lock lock(mutex_);
  return pending_;
}

void KvMover::Loop(const std::stop_token& stop) {
  std::unique_ptr<HmmClient> hmm;
  int connected_pid = -1;
  std::unique_lock lock(mutex_);
  while (work_.wait(lock, stop, [&] { return !jobs_.empty(); })) {
    const Job job = std::move(jobs_.front());
    jobs_.pop_front();
    bool copied = true;
    for (std::size_t at = 0; copied && at < job.copies.size() && !stop.stop_requested();
         at += kBlocksPerCall) {
      copied = job.hmm_pid == hmm_pid_;
      if (!copied) break;
      if (connected_pid != job.hmm_pid) hmm.reset();
      connected_pid = job.hmm_pid;
      copying_ = true;
      lock.unlock();
      if (!hmm)
        if (auto connected = HmmClient::ConnectTo(socket_, job.hmm_pid)) hmm = std::move(*connected);
      const auto count = std::min(kBlocksPerCall, job.copies.size() - at);
      auto answer = hmm ? hmm->Call(CopyKvRequest(std::span(job.copies).subspan(at, count)))
                        : Fail(ErrorCode::kUnavailable, "copying KV: the hmm does not answer");
      if (!answer) {
        LogWarn("request {}: {}", job.request, answer.error().message);
        hmm.reset();
        copied = false;
      }
      lock.lock();
      copying_ = false;
      idle_.notify_all();
    }
    done_.push_back({job.request, copied});
    lock.unlock();
    notify_();
    lock.lock();
  }
}

}  // namespace elasticmoe::runtime
