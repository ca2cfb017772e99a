// Carries out what the resize machine (core/control) decides: starts and attaches workers, prepares epochs
// beside the one that serves, and has the engine take them between two steps. Serving goes on all the while.
// Thread-safe: commands come from anywhere; what takes time runs on a thread of its own.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "core/control/resize.h"
#include "runtime/coordinator/elastic_engine.h"
#include "runtime/coordinator/resize_trace.h"

namespace elasticmoe::runtime {

class ResizeController {
 public:
  // The engine must outlive it. `on_ended` is called with each operation's last report; it must not call
  // back.
  explicit ResizeController(ElasticEngine& engine,
                            std::function<void(const core::ResizeReport&)> on_ended = {});
  ~ResizeController();  // what is under way stays where it is

  // Starts an operation, or finds it again by its id. Errors as the machine's reply: kInvalidArgument
  // (target, victim), kFailedPrecondition (another one runs; its id is named), kResourceExhausted (it cannot
  // fit, with the numbers).
  Expected<core::ResizeReport> Start(core::ResizeCommand command);
  Expected<core::ResizeReport> Cancel(const std::string& operation);
  std::optional<core::ResizeReport> Find(const std::string& operation) const;
  std::optional<core::ResizeReport> Running() const;

  // Blocks until the operation has ended, at most `timeout_ns`.
  std::optional<core::ResizeReport> Await(const std::string& operation, TimeNs timeout_ns) const;

  const ResizeTrace& Trace() const { return trace_; }

  // KV memory a device, from now on.
  void SetKvMemory(std::size_t bytes);

  // Device phases by the machine's words.
  std::map<DeviceId, core::DevicePhase> Phases() const;

 private:
  Expected<core::ResizeReport> Submit(const core::ResizeEvent& event, const std::string& operation);
  void Feed(const core::ResizeEvent& event);  // takes the lock
  void StepLocked(const core::ResizeEvent& event, std::vector<core::ResizeAction>& actions);
  void Loop(const std::stop_token& stop);
  void Execute(const core::ResizeAction& action, const std::stop_token& stop);
  void TraceEnd(const core::ResizeReport& report);
  Status Drain(const std::stop_token& stop);  // where the operation's strategy is to drain

  ElasticEngine& engine_;
  std::function<void(const core::ResizeReport&)> on_ended_;
  ResizeTrace trace_;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  core::ResizeMachine machine_;
  std::deque<core::ResizeAction> queue_;
  std::atomic<bool> fit_kv_{false};          // there may be KV memory to add or to give up
  std::atomic<bool> release_intake_{false};  // an operation that held it has ended
  std::jthread thread_;
};

}  // namespace elasticmoe::runtime
