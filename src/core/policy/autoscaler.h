// When to change the size, and to what. Pure: driven by arrivals, ends, steps and ticks; not thread-safe.
//
// Policies:
//   static     never
//   threshold  the paper's example: attainment of the last window below `threshold` -> one step wider; no
//              queue and attainment whole while a smaller size would run at most as many sequences a device
//              -> one step narrower
//   slo        ours: forecasts every allowed size (forecast.h) from what runs and waits.
//              Grows when the present size is forecast to miss what the next window needs, to the smallest
//              size that meets the goal. The goal is that of several windows: what the last ones had to spare
//              may be spent in the next. Shrinks when a smaller size would meet the goal with the load lately
//              and what chance may bring beyond it.
//
// Hysteresis of `slo` is a rent-or-buy rule: while a smaller size would do, the devices too many add up idle
// device-seconds; once those exceed what shrinking and growing back would cost, the size shrinks to it. The
// cost is in device-seconds, too, and made of what resizes were measured to take: the devices that come and
// go are paid without serving for as long as a resize lasts, the others serve on but for the time in which
// steps stood still; those who miss their limits in that time weigh what the goal says a miss is worth.
// A shrink that was taken back before it paid makes the next one look at a longer past.
//
// Limits and manual commands win: after Hold() nothing is decided until Release(). In observe-only mode
// decisions are made and told with `apply` false.
#pragma once

#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "core/policy/forecast.h"
#include "core/policy/load_estimator.h"
#include "core/policy/step_cost.h"

namespace elasticmoe::core {

enum class PolicyKind { kStatic, kThreshold, kSlo };
std::string_view ToString(PolicyKind kind);
Expected<PolicyKind> ParsePolicy(std::string_view name);

// Why a decision was made, for programs (metrics); Decision::reason says it to people.
enum class DecisionCode {
  kHold,           // the size is right
  kGrow,           // the present size is forecast (or seen) to miss the goal
  kShrink,         // a smaller size holds the goal, and idling has cost as much as the resize
  kWake,           // requests wait and no device serves
  kSleep,          // to zero
  kAtLimit,        // the goal is missed and no allowed size is wider
  kWideningHurts,  // wider sizes have a lower throughput
  kNoSizeHolds,    // no allowed size meets the goal: the best of them is taken
  kManual,         // held by a person
  kResizing,       // one is under way
  kStatic,
  kRebalance,  // as many devices, but hot experts change places (hot_experts.h)
};
inline constexpr int kDecisionCodes = 12;
std::string_view ToString(DecisionCode code);

struct AutoscalerOptions {
  PolicyKind kind = PolicyKind::kSlo;
  SloTarget slo;
  int min_devices = 1;  // 0: may sleep (weights stay with the HMM)
  int max_devices = 1;
  int step_devices = 1;               // sizes are multiples of it (the paper: its TP degree)
  double threshold = 0.90;            // of `threshold` alone
  TimeNs window_ns = 10'000'000'000;  // of the attainment that is seen, and of the shortest look at the load
  bool observe = false;
  // Before the first resize was measured: from command to end, and how long of that nothing was served.
  double resize_s = 2.0;
  double stopped_s = 2.0;
};

// A resize that has ended.
struct ResizeOutcome {
  int from = 0, to = 0;
  double seconds = 0;    // from the command to the size that serves
  double stopped_s = 0;  // of these, how long nothing was served, or as long as it would have taken to serve
                         // what was not
};

struct RequestOutcome {
  TimeNs at = 0;
  double ttft_s = 0;
  double tpot_s = 0;
  int output_tokens = 0;
  bool failed = false;
};

struct ServingState {
  int devices = 0;
  bool resizing = false;
  int running = 0;
  int waiting = 0;
  double waiting_prompt_tokens = 0;  // of requests that wait
  double kv_usage = 0;               // 0..1
};

struct Decision {
  TimeNs at = 0;
  int from = 0;
  int to = 0;
  bool apply = false;  // ask for the resize now
  DecisionCode code = DecisionCode::kHold;
  std::string reason;
  double seen_attainment = 1;       // of the last window; 1 where nothing ended
  std::vector<Forecast> forecasts;  // of sizes looked at, ascending
};

class Autoscaler {
 public:
  // kInvalidArgument names the option: limits that contradict, a share outside of (0, 1], ...
  static Expected<Autoscaler> Make(const AutoscalerOptions& options, const ServingShape& shape,
                                   const StepCost& prior);

  void Arrived(TimeNs at, int prompt_tokens) { load_.Arrived(at, prompt_tokens); }
  void Ended(const RequestOutcome& outcome);
  void Stepped(const StepShape& shape, double seconds) { learner_.Observe(shape, seconds); }
  void Resized(const ResizeOutcome& resize);  // asked for by this or another

  void Hold(std::string who) { held_by_ = std::move(who); }
  void Release() { held_by_.clear(); }

  // Call at a steady pace, about once a second.
  Decision Tick(TimeNs now, const ServingState& state);

  const StepCost& cost() const { return learner_.cost(); }
  double optimism() const { return optimism_; }  // 1.1 = forecasts are made for 1.1 times the load
  double resize_s() const { return resize_s_; }  // as measured, as is
  double stopped_s() const { return stopped_s_; }
  const AutoscalerOptions& options() const { return options_; }
  double SeenAttainment(TimeNs now) const;
  // The best that any allowed size reaches under `load`.
  Forecast Best(const Load& load, double backlog_tokens, double running_now = 0) const;

 private:
  Autoscaler(const AutoscalerOptions& options, const ServingShape& shape, const StepCost& prior);
  struct Ends {
    int all = 0, met = 0;
  };
  Ends EndsSince(TimeNs at) const;
  // Attainment of the next window with which it and the last ones together keep the goal.
  double Needed(TimeNs now, const Load& load) const;
  std::vector<int> Sizes() const;
  // The load that a growth answers: a rise is believed as soon as chance does not explain it.
  Load Rising(TimeNs now, TimeNs horizon, double sigmas) const;
  // The load that a narrower size must hold: with what chance may bring beyond it, over a window or more, as
  // long as the shrink takes to pay. Where resizes are so dear that it takes several windows, the highest of
  // them: a burst in that time would have to be grown for again.
  Load Lasting(TimeNs now, TimeNs horizon, TimeNs payback) const;
  Forecast At(int devices, const Load& counted, double backlog, double running) const;
  // Compares what was forecast for the present size with what has come.
  void LearnOptimism(TimeNs now, int devices, double forecast);
  void DecideThreshold(TimeNs now, const ServingState& state, Decision& decision);
  void DecideSlo(TimeNs now, const ServingState& state, Decision& decision);
  double ResizeDeviceSeconds(int from, int to) const;  // there and back
  TimeNs Payback(int from, int to) const;              // that many seconds of the devices saved are worth it

  AutoscalerOptions options_;
  ServingShape shape_;
  StepCostLearner learner_;
  LoadEstimator load_;
  std::deque<RequestOutcome> outcomes_;
  std::string held_by_;
  double resize_s_ = 0, stopped_s_ = 0;
  TimeNs last_tick_ = -1;
  std::vector<double> idle_device_s_;  // by index in Sizes(): what that smaller size would have saved so far
  TimeNs last_change_ = -1;
  // A shrink that had to be taken back before it paid: the next one must promise twice as much. Halved by
  // each that lasts.
  double regret_ = 1;
  // As so many times the load is what the load does to the machine, by what was forecast and what came.
  double optimism_ = 1;
  double expected_ = 1;  // the mean forecast of the last window for the present size
  int size_ = -1;        // that, whoever asked for it, and since when
  TimeNs size_since_ = 0;
  TimeNs last_shrink_ = -1, payback_ns_ = 0;
};

}  // namespace elasticmoe::core
