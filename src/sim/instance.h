// One simulated engine: the server's scheduler over a cost model of steps. Pure; time comes with each call.
// Not thread-safe.
#pragma once

#include <limits>
#include <memory>
#include <vector>

#include "core/policy/forecast.h"
#include "core/schedule/scheduler.h"

namespace elasticmoe::sim {

struct EngineLimits {
  int max_step_rows = 512;         // a device a step
  int max_running = 4096;          // sequences with KV, all devices
  int max_running_per_device = 0;  // and of one; 0 = no limit. Held back as steps begin: one step may overrun
  double kv_tokens_fixed = 0;      // KV room in tokens: this,
  double kv_tokens_per_device = 0;  // and this a device,
  double kv_tokens_most = 1e7;      // beyond this it is never used: blocks are not kept for nothing
};

class Instance {
 public:
  static constexpr double kNever = std::numeric_limits<double>::infinity();

  // `shape` says what of the model counts for a step.
  Instance(const core::StepCost& cost, const core::ServingShape& shape, const EngineLimits& limits,
           int devices);

  int devices() const { return devices_; }
  bool Idle() const { return scheduler_->Idle(); }
  bool Stepping() const { return step_end_ != kNever; }
  bool Started() const { return scheduler_->Started(); }
  double step_end() const { return step_end_; }
  core::SchedulerStats Stats() const { return scheduler_->Stats(); }
  const core::StepShape& last_shape() const { return shape_; }  // of the step that runs, or ran last
  double last_seconds() const { return seconds_; }              // of it, undisturbed

  Status Add(core::GenerationRequest request, double now_s);
  // The request as one that begins again from all its tokens so far; it is forgotten here.
  core::GenerationRequest TakeOut(RequestId request);
  bool Knows(RequestId request) const { return scheduler_->Knows(request); }
  bool Running(RequestId request) const { return !scheduler_->BlockTable(request).empty(); }

  // Sequences are handed over. REQUIRES: !Stepping().
  void Resize(int devices);
  void HoldIntake(bool hold) { hold_ = hold; }

  // False where nothing can run. `slowdown` >= 1 stretches the step. Requests that no memory can hold end in
  // `failed`.
  bool StartStep(double now_s, double slowdown, std::vector<RequestId>& failed);
  // REQUIRES: Stepping().
  void FinishStep(double now_s, std::vector<core::TokenEvent>& events);
  void AbandonStep();  // it did not happen; none may run
  // All KV is gone: who ran runs again from its tokens. REQUIRES: !Stepping().
  void ForgetKv();
  // Who had rows on `device` in the last step.
  std::vector<RequestId> LastOn(int device) const;

 private:
  void SetDevices(int devices);

  const core::StepCost cost_;
  const core::ServingShape serving_;
  const EngineLimits limits_;
  std::unique_ptr<core::Scheduler> scheduler_;
  int devices_ = 0;
  bool hold_ = false;
  double step_end_ = kNever;
  core::StepPlan plan_;
  core::StepShape shape_;
  double seconds_ = 0;
};

}  // namespace elasticmoe::sim
