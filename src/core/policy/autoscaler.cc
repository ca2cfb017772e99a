#include "core/policy/autoscaler.h"

#include <algorithm>
#include <cmath>

namespace elasticmoe::core {
namespace {

// One-sided 97.7 %: a load that is higher than this by chance alone is rare enough to be called new.
constexpr double kSigmas = 2.0;
// A size that is grown to also holds this: 99.9 %. What a burst begins with is known least.
constexpr double kGrowSigmas = 3.0;
constexpr TimeNs kSecond = 1'000'000'000;
constexpr TimeNs kShortestWindow = kSecond / 4;
constexpr TimeNs kBins = 64;  // of a window: an eighth of it is still seen to an eighth
constexpr TimeNs kKeep = 600 * kSecond;
// Of windows: the longest past that a load is taken from, where it is steady, and that over which the goal is
// kept.
constexpr int kLoadWindows = 4, kGoalWindows = 8;
// Forecasts are corrected by so much of the load a window, and by no more than that in all.
constexpr double kLearnWindow = 0.2, kMostOptimism = 1.5;
constexpr double kMostRegret = 8;  // of windows that a shrink waits at most, where resizes are cheap

}  // namespace

std::string_view ToString(PolicyKind kind) {
  switch (kind) {
    case PolicyKind::kStatic:
      return "static";
    case PolicyKind::kThreshold:
      return "threshold";
    case PolicyKind::kSlo:
      return "slo";
  }
  return "?";
}

Expected<PolicyKind> ParsePolicy(std::string_view name) {
  for (const PolicyKind kind : {PolicyKind::kStatic, PolicyKind::kThreshold, PolicyKind::kSlo})
    if (name == ToString(kind)) return kind;
  return Fail(ErrorCode::kInvalidArgument, "reading the policy: policy={} (one of static, threshold, slo)",
              name);
}

std::string_view ToString(DecisionCode code) {
  switch (code) {
    case DecisionCode::kHold:
      return "hold";
    case DecisionCode::kGrow:
      return "grow";
    case DecisionCode::kShrink:
      return "shrink";
    case DecisionCode::kWake:
      return "wake";
    case DecisionCode::kSleep:
      return "sleep";
    case DecisionCode::kAtLimit:
      return "at_limit";
    case DecisionCode::kWideningHurts:
      return "widening_hurts";
    case DecisionCode::kNoSizeHolds:
      return "no_size_holds";
    case DecisionCode::kManual:
      return "manual";
    case DecisionCode::kResizing:
      return "resizing";
    case DecisionCode::kStatic:
      return "static";
    case DecisionCode::kRebalance:
      return "rebalance";
  }
  return "?";
}

Expected<Autoscaler> Autoscaler::Make(const AutoscalerOptions& o, const ServingShape& shape,
                                      const StepCost& prior) {
  const auto bad = [](const char* name, double value, const char* limit) {
    return Fail(ErrorCode::kInvalidArgument, "setting up the autoscaler: {}={} (limit={})", name, value,
                limit);
  };
  if (!(o.slo.ttft_s > 0)) return bad("slo_ttft", o.slo.ttft_s, "> 0 seconds");
  if (!(o.slo.tpot_s > 0)) return bad("slo_tpot", o.slo.tpot_s, "> 0 seconds");
  if (!(o.slo.attainment > 0 && o.slo.attainment <= 1))
    return bad("slo_attainment", o.slo.attainment, "in (0, 1]");
  if (!(o.threshold > 0 && o.threshold <= 1)) return bad("threshold", o.threshold, "in (0, 1]");
  if (o.step_devices < 1) return bad("step_devices", o.step_devices, ">= 1");
  if (o.min_devices < 0 || o.min_devices > o.max_devices)
    return bad("min_devices", o.min_devices, "0..max_devices");
  if (o.max_devices < o.step_devices) return bad("max_devices", o.max_devices, ">= step_devices");
  if (o.window_ns < kShortestWindow) return bad("window_ns", static_cast<double>(o.window_ns), ">= 0.25 s");
  if (!(o.resize_s >= 0)) return bad("resize_s", o.resize_s, ">= 0 seconds");
  if (!(o.stopped_s >= 0)) return bad("stopped_s", o.stopped_s, ">= 0 seconds");
  return Autoscaler(o, shape, prior);
}

Autoscaler::Autoscaler(const AutoscalerOptions& options, const ServingShape& shape, const StepCost& prior)
    : options_(options),
      shape_(shape),
      learner_(prior),
      load_(std::max<TimeNs>(1, options.window_ns / kBins), kKeep),
      resize_s_(options.resize_s),
      stopped_s_(options.stopped_s) {
  idle_device_s_.assign(Sizes().size(), 0.0);
}

std::vector<int> Autoscaler::Sizes() const {
  std::vector<int> sizes;
  for (int n = 0; n <= options_.max_devices; n += options_.step_devices)
    if (n >= options_.min_devices) sizes.push_back(n);
  return sizes;
}

void Autoscaler::Ended(const RequestOutcome& outcome) {
  outcomes_.push_back(outcome);
  if (!outcome.failed && outcome.output_tokens > 0) load_.Finished(outcome.output_tokens);
}

void Autoscaler::Resized(const ResizeOutcome& resize) {
  if (resize.from == resize.to || !std::isfinite(resize.seconds) || resize.seconds < 0) return;
  resize_s_ = (resize_s_ + resize.seconds) / 2;
  stopped_s_ = (stopped_s_ + std::clamp(resize.stopped_s, 0.0, resize.seconds)) / 2;
  std::fill(idle_device_s_.begin(), idle_device_s_.end(), 0.0);
}

Autoscaler::Ends Autoscaler::EndsSince(TimeNs at) const {
  Ends ends;
  for (const RequestOutcome& one : outcomes_) {
    if (one.at < at) continue;
    ++ends.all;
    ends.met += !one.failed && one.ttft_s <= options_.slo.ttft_s && one.tpot_s <= options_.slo.tpot_s;
  }
  return ends;
}

double Autoscaler::SeenAttainment(TimeNs now) const {
  const Ends ends = EndsSince(now - options_.window_ns);
  return ends.all == 0 ? 1.0 : static_cast<double>(ends.met) / ends.all;
}

double Autoscaler::Needed(TimeNs now, const Load& load) const {
  const double goal = options_.slo.attainment;
  const Ends ends = EndsSince(now - (kGoalWindows - 1) * options_.window_ns);
  const double spare = ends.met - goal * ends.all;
  const double coming = load.requests_s * static_cast<double>(options_.window_ns) * 1e-9;
  return spare <= 0 || coming <= 0 ? goal : goal - spare / coming;
}

Load Autoscaler::Rising(TimeNs now, TimeNs horizon, double sigmas) const {
  return load_.Lately(now, horizon / 8, kLoadWindows * horizon, sigmas);
}

Load Autoscaler::Lasting(TimeNs now, TimeNs horizon, TimeNs payback) const {
  const TimeNs shortest = std::max(horizon, payback);
  const double sigmas = kSigmas * std::sqrt(load_.Dispersion(now));
  Load load = load_.Lately(now, shortest, std::max(shortest, kLoadWindows * horizon), sigmas);
  const auto worth = static_cast<TimeNs>(static_cast<double>(payback) / regret_);
  if (worth <= horizon) return load;
  const Load highest = load_.Highest(now, horizon, worth - horizon, 0);
  return highest.requests_s > load.requests_s ? highest : load;
}

void Autoscaler::LearnOptimism(TimeNs now, int devices, double forecast) {
  if (devices != size_) size_ = devices, size_since_ = now;
  const double windows =
      last_tick_ < 0 ? 0 : static_cast<double>(now - last_tick_) / static_cast<double>(options_.window_ns);
  if (now - size_since_ < 2 * options_.window_ns) {
    expected_ = forecast;  // until all that ended in the window began at this size
    return;
  }
  const Ends ends = EndsSince(now - options_.window_ns);
  const double missed = expected_ * ends.all - ends.met;
  const double chance = kSigmas * std::sqrt(1 + expected_ * (1 - expected_) * ends.all);
  if (missed > chance)
    optimism_ *= std::exp(kLearnWindow * windows);
  else if (missed < -chance)
    optimism_ *= std::exp(-kLearnWindow * windows);
  else
    optimism_ = std::pow(optimism_, std::exp(-windows / kGoalWindows));
  optimism_ = std::clamp(optimism_, 1 / kMostOptimism, kMostOptimism);
  expected_ += (forecast - expected_) * std::min(1.0, windows);
}

Forecast Autoscaler::At(int devices, const Load& counted, double backlog, double running) const {
  Load load = counted;
  load.requests_s *= optimism_;
  return ForecastFrom({.running = running, .backlog_tokens = backlog},
                      static_cast<double>(options_.window_ns) * 1e-9, learner_.cost(), shape_, load,
                      options_.slo, devices);
}

Forecast Autoscaler::Best(const Load& load, double backlog, double running_now) const {
  std::optional<Forecast> best;
  for (const int n : Sizes()) {
    const Forecast one = At(n, load, backlog, running_now);
    // Where no size holds anything, the one with the highest throughput shortens the queue soonest.
    if (!best || one.attainment > best->attainment ||
        (one.attainment == best->attainment && one.attainment <= 0 && one.tokens_s > best->tokens_s))
      best = one;
  }
  return *best;
}

double Autoscaler::ResizeDeviceSeconds(int from, int to) const {
  // If the load comes back, requests of one standstill miss; a goal of 95 % says that a miss weighs as much
  // as what 20 requests cost.
  const double misses = 1 / std::max(1e-3, 1 - options_.slo.attainment);
  return 2 * resize_s_ * std::abs(from - to) + stopped_s_ * std::max(from, to) * (2 + misses);
}

TimeNs Autoscaler::Payback(int from, int to) const {
  const double seconds = ResizeDeviceSeconds(from, to) / std::abs(from - to);
  return static_cast<TimeNs>(regret_ * std::max(seconds * 1e9, static_cast<double>(options_.window_ns)));
}

Decision Autoscaler::Tick(TimeNs now, const ServingState& state) {
  load_.Advance(now);
  while (!outcomes_.empty() && outcomes_.front().at < now - kGoalWindows * options_.window_ns)
    outcomes_.pop_front();
  Decision decision{.at = now, .from = state.devices, .to = state.devices};
  decision.seen_attainment = SeenAttainment(now);
  if (options_.kind == PolicyKind::kStatic) {
    decision.code = DecisionCode::kStatic;
    decision.reason = "the policy is static";
  } else if (state.resizing) {
    decision.code = DecisionCode::kResizing;
    decision.reason = "a resize is under way";
  } else if (state.devices == 0 && state.waiting > 0) {
    decision.code = DecisionCode::kWake;
    const Load load = Rising(now, options_.window_ns, kSigmas);
    decision.to = std::max(options_.step_devices, options_.min_devices);
    for (const int n : Sizes())
      if (n > 0 && At(n, load, state.waiting_prompt_tokens, 0).attainment >= options_.slo.attainment) {
        decision.to = n;
        break;
      }
    decision.reason = fmt::format("{} requests wait and no device serves", state.waiting);
  } else if (options_.kind == PolicyKind::kThreshold) {
    DecideThreshold(now, state, decision);
  } else {
    DecideSlo(now, state, decision);
  }
  last_tick_ = now;
  if (!held_by_.empty() && decision.to != decision.from) {
    decision.reason = fmt::format("held by {}; would go to {}: {}", held_by_, decision.to, decision.reason);
    decision.code = DecisionCode::kManual;
    decision.to = decision.from;
  }
  decision.apply = decision.to != decision.from && !options_.observe;
  if (decision.to != decision.from) {
    last_change_ = now;
    if (decision.to < decision.from) {
      last_shrink_ = now;
      payback_ns_ = Payback(decision.from, decision.to);
      regret_ = std::max(1.0, regret_ / 2);
    } else if (last_shrink_ >= 0 && now - last_shrink_ < payback_ns_) {
      // The halving of the shrink that was wrong is taken back, too.
      regret_ = std::min(kMostRegret, regret_ * 4);
      last_shrink_ = -1;
    }
  }
  return decision;
}

void Autoscaler::DecideThreshold(TimeNs now, const ServingState& state, Decision& decision) {
  const int step = options_.step_devices;
  const bool settled = last_change_ < 0 || now - last_change_ >= options_.window_ns;
  const bool misses = decision.seen_attainment < options_.threshold;
  if (misses && settled) {
    decision.reason =
        fmt::format("attainment {:.1f} % of the last {} s is below {:.1f} %", decision.seen_attainment * 100,
                    options_.window_ns / kSecond, options_.threshold * 100);
    if (state.devices + step > options_.max_devices) {
      decision.code = DecisionCode::kAtLimit;
      decision.reason += fmt::format("; already at max_devices={}", options_.max_devices);
    } else {
      decision.code = DecisionCode::kGrow;
      decision.to = state.devices + step;
    }
  } else if (!misses && settled && state.waiting == 0 && decision.seen_attainment >= 1 &&
             state.devices - step >= std::max(options_.min_devices, step) &&
             state.running * 2 <=
                 shape_.max_running * (state.devices - step) / std::max(1, options_.max_devices)) {
    decision.code = DecisionCode::kShrink;
    decision.to = state.devices - step;
    decision.reason = "no request waits, all met their limits, and devices are less than half busy";
  } else {
    decision.reason = fmt::format("attainment {:.1f} %", decision.seen_attainment * 100);
  }
}

void Autoscaler::DecideSlo(TimeNs now, const ServingState& state, Decision& decision) {
  const std::vector<int> sizes = Sizes();
  const double goal = options_.slo.attainment;
  // What is looked at for growing: long enough that the resize can answer it, as high as chance allows.
  // A resize that takes little of the window that is looked at can wait until more has come: what runs and
  // waits tells of it. One that takes long must cover what chance may bring meanwhile.
  const TimeNs horizon = std::max<TimeNs>(options_.window_ns, static_cast<TimeNs>(resize_s_ * 1e9));
  const double sigmas = kSigmas * std::min(1.0, resize_s_ * 1e9 / static_cast<double>(options_.window_ns));
  const Load load = Rising(now, horizon, sigmas);
  const double backlog = state.waiting_prompt_tokens;
  const double running = state.running;
  const Forecast present = At(state.devices, load, backlog, running);
  LearnOptimism(now, state.devices, present.attainment);

  const double needed = Needed(now, load);
  const bool below = state.devices < options_.min_devices;
  if (below || (present.attainment < needed && state.devices > 0)) {
    std::fill(idle_device_s_.begin(), idle_device_s_.end(), 0.0);
    decision.forecasts.push_back(present);
    std::optional<Forecast> chosen;
    bool wider = false, faster = false;
    // To a size that also holds what chance may bring, so that another resize does not follow; else to one
    // that holds.
    const Load upper = Rising(now, horizon, kGrowSigmas);
    for (const int n : sizes) {
      if (n <= state.devices) continue;
      wider = true;
      const Forecast one = At(n, load, backlog, running);
      decision.forecasts.push_back(one);
      faster = faster || one.tokens_s > present.tokens_s || one.attainment > present.attainment;
      if (one.attainment < goal) continue;
      if (!chosen) chosen = one;
      if (At(n, upper, backlog, running).attainment < goal) continue;
      chosen = one;
      break;
    }
    const auto told = [&](int n, double attainment) {
      return fmt::format(
          "{:.2f} requests/s of {:.0f}+{:.0f} tokens, {:.0f} tokens waiting: {:.1f} % forecast at {} devices",
          load.requests_s, load.prompt_tokens, load.output_tokens, backlog, attainment * 100, n);
    };
    decision.reason = told(state.devices, present.attainment);
    if (chosen) {
      decision.code = DecisionCode::kGrow;
      decision.to = chosen->devices;
      decision.reason +=
          fmt::format(" (goal {:.1f} %), {:.1f} % at {}", goal * 100, chosen->attainment * 100, decision.to);
    } else if (below) {
      decision.code = DecisionCode::kGrow;
      decision.to = sizes.front();
      decision.reason =
          fmt::format("{} devices are below min_devices={}", state.devices, options_.min_devices);
    } else if (!wider) {
      decision.code = DecisionCode::kAtLimit;
      decision.reason +=
          fmt::format(" (goal {:.1f} %); already at max_devices={}", goal * 100, options_.max_devices);
    } else if (!faster) {
      decision.code = DecisionCode::kWideningHurts;
      decision.reason +=
          fmt::format(" (goal {:.1f} %); no wider size has a higher throughput than {:.0f} tokens/s",
                      goal * 100, present.tokens_s);
    } else {
      const Forecast best = Best(load, backlog, running);
      decision.code = DecisionCode::kNoSizeHolds;
      // Narrower sizes are not taken while the goal is missed: the learned costs may be what is wrong.
      decision.to = std::max(best.devices, state.devices);
      decision.reason +=
          fmt::format(" (goal {:.1f} %); no size up to {} holds it, best possible {:.1f} % at {}", goal * 100,
                      options_.max_devices, best.attainment * 100, best.devices);
    }
    return;
  }

  // Each smaller size that would hold adds up what it would have saved since the last tick.
  const double tick_s = last_tick_ < 0 ? 0 : static_cast<double>(now - last_tick_) * 1e-9;
  decision.reason = fmt::format("{:.1f} % forecast at {} devices (goal {:.1f} %)", present.attainment * 100,
                                state.devices, goal * 100);
  if (present.attainment < goal)
    decision.reason +=
        fmt::format("; {:.1f} % are enough after the last windows", std::max(0.0, needed) * 100);
  for (std::size_t i = 0; i < sizes.size() && sizes[i] < state.devices; ++i) {
    const int n = sizes[i];
    const double cost = regret_ * ResizeDeviceSeconds(state.devices, n);
    const TimeNs payback = Payback(state.devices, n);
    const Load highest = Lasting(now, horizon, payback);
    const Forecast one = At(n, highest, backlog, running);
    const bool idle = n == 0
                          ? state.running == 0 && state.waiting == 0 && load_.SinceLastArrival(now) > horizon
                          : one.attainment >= goal && (last_change_ < 0 || now - last_change_ >= payback);
    idle_device_s_[i] = idle ? idle_device_s_[i] + tick_s * (state.devices - n) : 0;
    if (n + options_.step_devices >= state.devices || idle_device_s_[i] > 0)
      decision.forecasts.push_back(one);
    if (decision.to == state.devices && idle && idle_device_s_[i] >= cost) {
      decision.to = n;
      decision.code = n == 0 ? DecisionCode::kSleep : DecisionCode::kShrink;
      decision.reason = fmt::format(
          "{} devices hold {:.2f} requests/s at {:.1f} % (goal {:.1f} %); {:.1f} idle device-seconds exceed "
          "the {:.1f} of a resize and back",
          n, highest.requests_s, one.attainment * 100, goal * 100, idle_device_s_[i], cost);
    }
  }
  decision.forecasts.push_back(present);
}

}  // namespace elasticmoe::core
