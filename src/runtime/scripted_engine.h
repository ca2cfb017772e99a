// An engine that computes nothing: its tokens come from a function. For tests and load tests of what stands
// in front of an engine. Deterministic: the tokens of a request depend on the request alone.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "runtime/engine.h"

namespace elasticmoe::runtime {

struct ScriptedEngineOptions {
  core::ModelSpec spec;  // vocab and eos_ids are used
  int max_model_len = 1024;
  int max_running = 256;
  int max_waiting = 1024;  // kResourceExhausted beyond
  // One step a call of Step() by the test, instead of one after another by the engine's thread.
  bool manual = false;
  std::chrono::nanoseconds step_interval{0};  // pace of the engine's own steps

  // The token at `index` of the generation. Default: a hash of seed and index over the vocabulary without
  // eos.
  std::function<TokenId(const core::GenerationRequest&, int index)> next_token;
  // A text here ends the request with kError at that index.
  std::function<std::optional<std::string>(const core::GenerationRequest&, int index)> fail;
};

class ScriptedEngine final : public Engine {
 public:
  explicit ScriptedEngine(ScriptedEngineOptions options);
  ~ScriptedEngine() override;  // running requests end with kAbort

  Status Submit(core::GenerationRequest request, Sink sink) override;
  void Cancel(RequestId request) override;
  EngineStats Stats() const override;
  const core::ModelSpec& Spec() const override { return options_.spec; }
  int MaxModelLen() const override { return options_.max_model_len; }

  // Manual mode: runs `steps` steps on the engine's thread and returns when they are done.
  void Step(int steps = 1);
  // Blocks until `count` requests have been submitted since the start.
  void WaitForSubmitted(std::uint64_t count) const;
  // Blocks until no request is running or waiting. Not in manual mode.
  void WaitUntilIdle() const;
  std::uint64_t Cancelled() const;  // requests that ended with kAbort

 private:
  struct Running {
    core::GenerationRequest request;
    Sink sink;
    int generated = 0;
    bool cancelled = false;
    std::chrono::steady_clock::time_point submitted;
    TimeNs queue_ns = -1;
  };

  void Run();
  void RunStep(std::unique_lock<std::mutex>& lock);
  core::TokenEvent Advance(Running& running) const;
  core::TokenLogprob Logprob(TokenId token, int top) const;

  ScriptedEngineOptions options_;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::map<RequestId, std::shared_ptr<Running>> running_;
  std::deque<std::shared_ptr<Running>> waiting_;
  std::uint64_t submitted_ = 0;
  std::uint64_t cancelled_ = 0;
  std::uint64_t steps_ = 0;
  std::uint64_t wanted_steps_ = 0;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace elasticmoe::runtime
