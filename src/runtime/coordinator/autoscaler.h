// Runs the scaling policy (core/policy) against a server: a thread looks at it a few times a second, tells
// the policy what has happened, and asks for the sizes that the policy decides. Thread-safe.
//
// Who wins: a size that a person asked for is held for `hold_ns` (0: until released), or until Release.
// Meanwhile decisions are made and told, not applied. Sizes that the policy asks for are always within its
// limits.
#pragma once

#include <array>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "core/policy/autoscaler.h"
#include "core/policy/hot_experts.h"
#include "runtime/coordinator/serving_log.h"

namespace elasticmoe::runtime {

struct ScalingSnapshot {
  core::ServingState state;
  ServingLog::Batch since;          // the last snapshot
  std::optional<TimeNs> commanded;  // when a person last asked for a size
};

// What it looks at and asks. Implementations are thread-safe.
class ScalingTarget {
 public:
  virtual ~ScalingTarget() = default;
  virtual ScalingSnapshot Snapshot() = 0;
  // Starts a resize; kFailedPrecondition where one runs.
  virtual Status ResizeTo(int devices, const std::string& strategy) = 0;
  // How even the load of the devices is and could be; nothing where that cannot be told now.
  virtual std::optional<core::BalanceOutlook> Balance() = 0;
  // Starts to make it so, as a resize to the same devices.
  virtual Status Rebalance() = 0;
};

struct AutoscalerSettings {
  core::AutoscalerOptions policy;
  std::string strategy = "elastic";
  TimeNs hold_ns = TimeNs{600} * 1'000'000'000;
  bool rebalance = true;                     // with the slo policy
  TimeNs tick_ns = TimeNs{250} * 1'000'000;  // the policy's estimates count in bins of this length
};

// A decision as it is told. Equal ones that follow each other are told once.
struct ToldDecision {
  core::Decision decision;
  std::string error;  // why it could not be applied
};

class Autoscaler {
 public:
  // kInvalidArgument: the policy's options, an unknown strategy. The target must outlive it.
  static Expected<std::unique_ptr<Autoscaler>> Make(const AutoscalerSettings& settings,
                                                    const core::ServingShape& shape,
                                                    const core::StepCost& prior, ScalingTarget& target);
  ~Autoscaler();
  void Run();  // from now on by itself, on a thread

  // One look; for tests, and the thread. `now` must not go back.
  void Look(TimeNs now);

  void Hold(std::string who, TimeNs until);  // until = 0: until Release
  void Release();
  void SetObserve(bool observe);

  struct State {
    AutoscalerSettings settings;
    std::string held_by;                                       // empty: free
    TimeNs held_until = 0;                                     // 0 = until released
    core::Decision last;                                       // of the last look
    double attainment = 1;                                     // of the last window
    std::deque<ToldDecision> told;                             // newest last
    std::array<std::uint64_t, core::kDecisionCodes> counts{};  // decisions by code
    core::StepCost cost;
    double optimism = 1;  // of the forecasts, learned
    int devices = 0;
  };
  State Current() const;

 private:
  Autoscaler(const AutoscalerSettings& settings, core::Autoscaler policy, ScalingTarget& target);
  void Learn(const ServingLog::Batch& since);
  void TellLocked(const core::Decision& decision, std::string error);

  ScalingTarget& target_;
  mutable std::mutex mutex_;  // guards what follows
  std::condition_variable_any wake_;
  core::Autoscaler policy_;
  core::HotExperts hot_experts_;
  TimeNs experts_looked_ = 0;
  double busy_device_s_ = 0, step_s_ = 0, expert_s_ = 0;  // since the last look at experts
  State state_;
  TimeNs commanded_ = -1;  // the last command that was seen
  TimeNs retry_at_ = 0;    // after a resize that was refused or failed
  TimeNs retry_wait_ = 0;
  std::jthread thread_;
};

}  // namespace elasticmoe::runtime
