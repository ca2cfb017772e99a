#include "runtime/coordinator/autoscaler.h"

#include <algorithm>
#include <chrono>

#include "base/clock.h"
#include "base/log.h"

namespace elasticmoe::runtime {
namespace {

constexpr std::size_t kTold = 128;
constexpr TimeNs kSecond = 1'000'000'000;
constexpr TimeNs kFirstRetry = kSecond, kLongestRetry = 60 * kSecond;  // doubles in between

constexpr TimeNs kExpertsEvery = 2 * kSecond;  // planning costs milliseconds, and rows must be counted

bool IsChange(const core::Decision& decision) {
  return decision.to != decision.from || decision.code == core::DecisionCode::kRebalance;
}

}  // namespace

Expected<std::unique_ptr<Autoscaler>> Autoscaler::Make(const AutoscalerSettings& settings,
                                                       const core::ServingShape& shape,
                                                       const core::StepCost& prior, ScalingTarget& target) {
  if (settings.strategy != "elastic" && settings.strategy != "drain" && settings.strategy != "cold-restart")
    return Fail(ErrorCode::kInvalidArgument,
                "setting up the autoscaler: strategy={} (one of elastic, drain, cold-restart)",
                settings.strategy);
  if (settings.hold_ns < 0 || settings.tick_ns <= 0)
    return Fail(ErrorCode::kInvalidArgument, "setting up the autoscaler: hold={} ns tick={} ns",
                settings.hold_ns, settings.tick_ns);
  core::AutoscalerOptions options = settings.policy;
  options.observe = false;  // may change while it runs: looked at here
  EM_ASSIGN_OR_RETURN(core::Autoscaler policy, core::Autoscaler::Make(options, shape, prior));
  return std::unique_ptr<Autoscaler>(new Autoscaler(settings, std::move(policy), target));
}

Autoscaler::Autoscaler(const AutoscalerSettings& settings, core::Autoscaler policy, ScalingTarget& target)
    : target_(target), policy_(std::move(policy)) {
  state_.settings = settings;
}

Autoscaler::~Autoscaler() {
  thread_.request_stop();
  wake_.notify_all();
}

void Autoscaler::Run() {
  thread_ = std::jthread([this](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      Look(Now());
      std::unique_lock lock(mutex_);
      wake_.wait_for(lock, stop, std::chrono::nanoseconds(state_.settings.tick_ns), [] { return false; });
    }
  });
}

void Autoscaler::Learn(const ServingLog::Batch& since) {
  for (const ServingLog::Arrival& one : since.arrivals) policy_.Arrived(one.at, one.prompt_tokens);
  for (const core::RequestOutcome& one : since.outcomes) policy_.Ended(one);
  for (const ServingLog::Step& one : since.steps) {
    policy_.Stepped(one.shape, one.seconds);
    busy_device_s_ += one.seconds * one.shape.devices;
    step_s_ += one.seconds;
    expert_s_ += one.shape.experts * policy_.cost().expert_s + one.shape.rows * policy_.cost().row_s;
  }
  for (const core::ResizeReport& one : since.resizes) {
    if (one.error || !one.finished) {
      retry_wait_ = std::clamp(retry_wait_ * 2, kFirstRetry, kLongestRetry);
      retry_at_ = one.finished.value_or(one.started) + retry_wait_;
      continue;
    }
    retry_wait_ = 0;
    if (one.strategy != "rebalance") hot_experts_.Reset();
    const TimeNs end = one.serving.value_or(*one.finished);
    // Ours serves on but for the longest gap between two steps; others refuse or hold back what comes.
    const double seconds = static_cast<double>(end - one.started) * 1e-9;
    const bool serves_on = one.strategy == "elastic";
    policy_.Resized({.from = static_cast<int>(one.from.size()),
                     .to = static_cast<int>(one.to.size()),
                     .seconds = seconds,
                     .stopped_s = serves_on ? static_cast<double>(one.longest_step_gap) * 1e-9 : seconds});
    if (one.strategy != "wake") continue;
    core::Decision woken{.at = one.started, .from = 0, .to = static_cast<int>(one.to.size()), .apply = true};
    woken.code = core::DecisionCode::kWake;
    woken.reason = fmt::format("a request came and no device served; the first token came after {:.1f} ms",
                               static_cast<double>(one.first_capacity.value_or(end) - one.started) * 1e-6);
    TellLocked(woken, "");
  }
}

void Autoscaler::Look(TimeNs now) {
  ScalingSnapshot seen = target_.Snapshot();
  std::unique_lock lock(mutex_);
  Learn(seen.since);
  if (seen.commanded && *seen.commanded != commanded_) {
    commanded_ = *seen.commanded;
    state_.held_by = "a command";
    state_.held_until = state_.settings.hold_ns == 0 ? 0 : now + state_.settings.hold_ns;
  }
  if (state_.held_until > 0 && now >= state_.held_until) state_.held_by.clear(), state_.held_until = 0;
  if (state_.held_by.empty())
    policy_.Release();
  else
    policy_.Hold(state_.held_by);

  core::Decision decision = policy_.Tick(now, seen.state);
  state_.devices = seen.state.devices;
  state_.attainment = policy_.SeenAttainment(now);
  state_.cost = policy_.cost();
  state_.optimism = policy_.optimism();
  // The first request wakes the server by itself, sooner than a look comes.
  if (decision.code == core::DecisionCode::kWake) decision.apply = false;
  if (state_.settings.policy.observe) decision.apply = false;
  const bool waits = decision.apply && now < retry_at_;  // told when it was refused
  if (waits) decision.apply = false;
  std::string error;
  if (decision.apply) {
    const std::string strategy = state_.settings.strategy;
    lock.unlock();
    const Status asked = target_.ResizeTo(decision.to, strategy);
    lock.lock();
    if (!asked) {
      error = asked.error().message;
      retry_wait_ = std::clamp(retry_wait_ * 2, kFirstRetry, kLongestRetry);
      retry_at_ = now + retry_wait_;
    }
  }
  ++state_.counts[static_cast<std::size_t>(decision.code)];
  if (!waits) TellLocked(decision, std::move(error));
  state_.last = std::move(decision);
  const bool free = state_.held_by.empty() && state_.settings.policy.kind == core::PolicyKind::kSlo;
  if (!free || !state_.settings.rebalance || state_.last.apply || seen.state.resizing ||
      seen.state.devices < 2 || now - experts_looked_ < kExpertsEvery)
    return;
  experts_looked_ = now;
  lock.unlock();
  const auto outlook = target_.Balance();
  lock.lock();
  if (!outlook) return;
  // Rows cost all that attention and head take, too: the share is an upper bound.
  const double share = step_s_ > 0 ? std::min(1.0, expert_s_ / step_s_) : 0;
  const core::HotExperts::Advice advice =
      hot_experts_.Look(*outlook, seen.state.devices, busy_device_s_, share, policy_.resize_s());
  busy_device_s_ = step_s_ = expert_s_ = 0;
  if (!advice.rebalance) return;
  core::Decision hot{.at = now, .from = seen.state.devices, .to = seen.state.devices};
  hot.apply = !state_.settings.policy.observe;
  hot.code = core::DecisionCode::kRebalance;
  hot.reason = advice.reason;
  hot.seen_attainment = state_.attainment;
  error.clear();
  if (hot.apply) {
    lock.unlock();
    const Status asked = target_.Rebalance();
    lock.lock();
    if (!asked) error = asked.error().message;
  }
  ++state_.counts[static_cast<std::size_t>(hot.code)];
  TellLocked(hot, std::move(error));
}

// Into the log and among those that are shown: changes, and what changes nothing but says why for the first
// time.
void Autoscaler::TellLocked(const core::Decision& decision, std::string error) {
  const bool change = IsChange(decision);
  if (!state_.told.empty()) {
    const ToldDecision& before = state_.told.back();
    const bool same =
        before.decision.code == decision.code && before.decision.to == decision.to && before.error == error;
    if (same && !(change && decision.apply)) return;
  }
  const std::string_view code = core::ToString(decision.code);
  if (!error.empty())
    LogWarn("autoscale: {} {} -> {} devices: {}; {}", code, decision.from, decision.to, decision.reason,
            error);
  else if (change)
    LogInfo("autoscale: {} {} -> {} devices{}: {}", code, decision.from, decision.to,
            decision.apply ? "" : " (not applied)", decision.reason);
  else
    LogDebug("autoscale: {} at {} devices: {}", code, decision.from, decision.reason);
  state_.told.push_back({decision, std::move(error)});
  if (state_.told.size() > kTold) state_.told.pop_front();
}

void Autoscaler::Hold(std::string who, TimeNs until) {
  const std::scoped_lock lock(mutex_);
  state_.held_by = std::move(who);
  state_.held_until = until;
}

void Autoscaler::Release() {
  const std::scoped_lock lock(mutex_);
  state_.held_by.clear();
  state_.held_until = 0;
}

void Autoscaler::SetObserve(bool observe) {
  const std::scoped_lock lock(mutex_);
  state_.settings.policy.observe = observe;
}

Autoscaler::State Autoscaler::Current() const {
  const std::scoped_lock lock(mutex_);
  return state_;
}

}  // namespace elasticmoe::runtime
