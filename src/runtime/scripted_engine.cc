#include "runtime/scripted_engine.h"

#include <algorithm>

#include "base/rng.h"

namespace elasticmoe::runtime {

ScriptedEngine::ScriptedEngine(ScriptedEngineOptions options) : options_(std::move(options)) {
  if (!options_.next_token) {
    options_.next_token = [this](const core::GenerationRequest& request, int index) {
      const auto vocab = static_cast<std::uint64_t>(options_.spec.vocab);
      std::uint64_t draw = static_cast<std::uint64_t>(index);
      for (;;) {
        const auto token = static_cast<TokenId>(RandomAt(request.sampling.seed, draw) % vocab);
        if (std::ranges::find(options_.spec.eos_ids, token) == options_.spec.eos_ids.end()) return token;
        draw += 1ULL << 32;
      }
    };
  }
  thread_ = std::thread([this] { Run(); });
}

ScriptedEngine::~ScriptedEngine() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  thread_.join();
}

Status ScriptedEngine::Submit(core::GenerationRequest request, Sink sink) {
  EM_RETURN_IF_ERROR(
      core::CheckRequest(request, {.vocab = options_.spec.vocab, .max_model_len = options_.max_model_len}));
  request.max_tokens =
      std::min(request.max_tokens, options_.max_model_len - static_cast<int>(request.prompt.size()));
  std::lock_guard lock(mutex_);
  if (stopping_) return Fail(ErrorCode::kUnavailable, "submitting: the engine is stopping");
  if (waiting_.size() >= static_cast<std::size_t>(options_.max_waiting))
    return Fail(ErrorCode::kResourceExhausted, "submitting: the queue is full (limit={})",
                options_.max_waiting);
  auto entry = std::make_shared<Running>();
  entry->request = std::move(request);
  entry->sink = std::move(sink);
  entry->submitted = std::chrono::steady_clock::now();
  waiting_.push_back(std::move(entry));
  ++submitted_;
  changed_.notify_all();
  return {};
}

void ScriptedEngine::Cancel(RequestId request) {
  std::lock_guard lock(mutex_);
  if (auto it = running_.find(request); it != running_.end()) it->second->cancelled = true;
  for (auto& entry : waiting_)
    if (entry->request.id == request) entry->cancelled = true;
  changed_.notify_all();
}

EngineStats ScriptedEngine::Stats() const {
  std::lock_guard lock(mutex_);
  EngineStats stats;
  stats.running = static_cast<int>(running_.size());
  stats.waiting = static_cast<int>(waiting_.size());
  stats.kv_usage = static_cast<double>(running_.size()) / options_.max_running;
  stats.steps = steps_;
  return stats;
}

void ScriptedEngine::Step(int steps) {
  std::unique_lock lock(mutex_);
  wanted_steps_ += static_cast<std::uint64_t>(steps);
  const std::uint64_t target = wanted_steps_;
  changed_.notify_all();
  changed_.wait(lock, [&] { return steps_ >= target || stopping_; });
}

void ScriptedEngine::WaitForSubmitted(std::uint64_t count) const {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return submitted_ >= count; });
}

void ScriptedEngine::WaitUntilIdle() const {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return running_.empty() && waiting_.empty(); });
}

std::uint64_t ScriptedEngine::Cancelled() const {
  std::lock_guard lock(mutex_);
  return cancelled_;
}

void ScriptedEngine::Run() {
  std::unique_lock lock(mutex_);
  auto next = std::chrono::steady_clock::now();
  while (!stopping_) {
    if (options_.manual) {
      changed_.wait(lock, [&] { return stopping_ || steps_ < wanted_steps_; });
      if (stopping_) break;
    } else {
      changed_.wait(lock, [&] { return stopping_ || !running_.empty() || !waiting_.empty(); });
      if (options_.step_interval.count() > 0) {
        const auto now = std::chrono::steady_clock::now();
        next = std::max(next + options_.step_interval, now);
        changed_.wait_until(lock, next, [&] { return stopping_; });
      }
      if (stopping_) break;
    }
    RunStep(lock);
  }
  for (auto& entry : waiting_) running_[entry->request.id] = entry;
  waiting_.clear();
  cancelled_ += running_.size();
  auto rest = std::move(running_);
  running_.clear();
  lock.unlock();
  for (auto& [id, entry] : rest) {
    core::TokenEvent event;
    event.request = id;
    event.finish = core::FinishReason::kAbort;
    entry->sink(event);
  }
}

// Sinks are called without the lock, so that they may call the engine.
void ScriptedEngine::RunStep(std::unique_lock<std::mutex>& lock) {
  const auto now = std::chrono::steady_clock::now();
  while (!waiting_.empty() && running_.size() < static_cast<std::size_t>(options_.max_running)) {
    auto entry = std::move(waiting_.front());
    waiting_.pop_front();
    entry->queue_ns = std::chrono::nanoseconds(now - entry->submitted).count();
    running_.emplace(entry->request.id, std::move(entry));
  }
  std::vector<std::pair<std::shared_ptr<Running>, bool>> batch;
  batch.reserve(running_.size());
  for (auto& [id, entry] : running_) batch.emplace_back(entry, entry->cancelled);
  lock.unlock();
  std::vector<RequestId> finished;
  std::uint64_t aborted = 0;
  for (auto& [entry, cancelled] : batch) {
    core::TokenEvent event;
    if (cancelled) {
      event.request = entry->request.id;
      event.finish = core::FinishReason::kAbort;
      ++aborted;
    } else {
      event = Advance(*entry);
    }
    if (event.finish) finished.push_back(event.request);
    entry->sink(event);
  }
  batch.clear();
  lock.lock();
  for (RequestId id : finished) running_.erase(id);
  cancelled_ += aborted;
  ++steps_;
  changed_.notify_all();
}

core::TokenLogprob ScriptedEngine::Logprob(TokenId token, int top) const {
  core::TokenLogprob entry{.token = token, .logprob = -0.25F, .top = {}};
  for (int i = 0; i < std::min(top, options_.spec.vocab); ++i) {
    const TokenId other = i == 0 ? token : static_cast<TokenId>((token + i) % options_.spec.vocab);
    entry.top.emplace_back(other, -0.25F - 0.5F * static_cast<float>(i));
  }
  return entry;
}

core::TokenEvent ScriptedEngine::Advance(Running& running) const {
  const core::GenerationRequest& request = running.request;
  core::TokenEvent event;
  event.request = request.id;
  if (running.generated == 0) {
    event.queue_ns = running.queue_ns;
    if (request.prompt_logprobs >= 0)
      for (std::size_t i = 1; i < request.prompt.size(); ++i)
        event.prompt_logprobs.push_back(Logprob(request.prompt[i], request.prompt_logprobs));
  }
  if (options_.fail) {
    if (auto error = options_.fail(request, running.generated)) {
      event.error = *std::move(error);
      event.finish = core::FinishReason::kError;
      return event;
    }
  }
  if (request.max_tokens == 0) {
    event.finish = core::FinishReason::kLength;
    return event;
  }
  const TokenId token = options_.next_token(request, running.generated);
  event.tokens.push_back(token);
  if (request.sampling.logprobs >= 0) event.logprobs.push_back(Logprob(token, request.sampling.logprobs));
  ++running.generated;
  const auto has = [token](const std::vector<TokenId>& ids) {
    return std::ranges::find(ids, token) != ids.end();
  };
  const bool stops = has(request.stop_token_ids) || (!request.ignore_eos && has(options_.spec.eos_ids));
  if (stops && running.generated > request.min_tokens) {
    event.finish = core::FinishReason::kStop;
    event.stop_token = token;
  } else if (running.generated >= request.max_tokens) {
    event.finish = core::FinishReason::kLength;
  }
  return event;
}

}  // namespace elasticmoe::runtime
