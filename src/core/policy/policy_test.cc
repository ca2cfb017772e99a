#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <vector>

#include "base/rng.h"
#include "core/policy/autoscaler.h"

namespace elasticmoe::core {
namespace {

using ::testing::HasSubstr;
constexpr TimeNs kSecond = 1'000'000'000;

const StepCost kCost{.fixed_s = 0.01,
                     .row_s = 1e-4,
                     .expert_row_s = 1e-4,
                     .expert_s = 2e-5,
                     .kv_byte_s = 1e-11,
                     .token_s = 5e-5,
                     .peer_s = 2e-4};
const StepCost kWrongCost{.fixed_s = 0.1,
                          .row_s = 1e-3,
                          .expert_row_s = 1e-3,
                          .expert_s = 1e-4,
                          .kv_byte_s = 1e-10,
                          .token_s = 1e-3,
                          .peer_s = 1e-3};
const ServingShape kShape{.moe_layers = 10,
                          .experts = 64,
                          .top_k = 6,
                          .kv_token_bytes = 1e5,
                          .max_step_rows = 512,
                          .max_running = 1024};

TEST(StepCost, LearnsTheCostOfStepsAndForecastsASizeThatNeverRan) {
  StepCostLearner learner(kWrongCost);
  Rng rng(1);
  for (int i = 0; i < 3000; ++i) {
    const StepShape shape{.devices = 2 + static_cast<int>(rng.Below(3)),
                          .rows = 1 + rng.Uniform() * 200,
                          .expert_rows = 1 + rng.Uniform() * 100,
                          .experts = rng.Uniform() * 600,
                          .kv_bytes = rng.Uniform() * 1e9,
                          .tokens = rng.Uniform() * 100};
    learner.Observe(shape, kCost.Seconds(shape));
  }
  const StepShape unseen{
      .devices = 8, .rows = 100, .expert_rows = 90, .experts = 80, .kv_bytes = 5e8, .tokens = 200};
  EXPECT_NEAR(learner.cost().Seconds(unseen) / kCost.Seconds(unseen), 1.0, 0.05);
}

// Two devices serve long enough to fade all that one device taught, were it not kept apart.
TEST(StepCost, RemembersASizeWhileAnotherServes) {
  StepCostLearner learner(kWrongCost);
  Rng rng(1);
  // Decoding alone: rows, their experts' part and tokens go together.
  const auto step = [](int devices, int running) {
    return StepShape{.devices = devices,
                     .rows = std::ceil(1.0 * running / devices),
                     .expert_rows = 1.0 * running / devices,
                     .experts = ExpertsTouched(64, 6, devices, running) * 10,
                     .kv_bytes = 6e7 * running / devices,
                     .tokens = 1.0 * running};
  };
  for (int i = 0; i < 20000; ++i) {
    const StepShape shape = step(i < 1000 ? 1 : 2, 1 + static_cast<int>(rng.Below(30)));
    learner.Observe(shape, kCost.Seconds(shape));
  }
  for (const int running : {1, 10, 30}) {
    const StepShape one = step(1, running);
    EXPECT_NEAR(learner.cost().Seconds(one) / kCost.Seconds(one), 1.0, 0.03) << running;
  }
}

TEST(StepCost, KeepsThePriorWhereNothingWasMeasuredAndIgnoresNonsense) {
  StepCostLearner learner(kCost);
  learner.Observe({.devices = 1, .rows = 5}, std::nan(""));
  learner.Observe({.devices = 1, .rows = 5}, -1);
  EXPECT_EQ(learner.observed(), 0);
  EXPECT_DOUBLE_EQ(learner.cost().row_s, kCost.row_s);
}

TEST(StepCost, NeverLearnsANegativeCoefficient) {
  StepCostLearner learner(kCost);
  for (int i = 1; i <= 200; ++i) learner.Observe({.devices = 2, .rows = 1.0 * i}, 0.1 - 1e-4 * i);
  EXPECT_GE(learner.cost().row_s, 0);
}

TEST(StepCost, AManyRowedStepTouchesEveryExpertOnce) {
  EXPECT_NEAR(ExpertsTouched(64, 6, 4, 1e4), 16, 1e-6);
  EXPECT_NEAR(ExpertsTouched(64, 6, 1, 1), 6, 1e-9);
  EXPECT_EQ(ExpertsTouched(0, 0, 4, 10), 0);
}

TEST(LoadEstimator, CountsArrivalsOfTheWindowAlone) {
  LoadEstimator load(kSecond, 100 * kSecond);
  load.Advance(0);
  for (int i = 0; i < 50; ++i) load.Arrived(i * kSecond, 100);
  const Load now = load.Upper(49 * kSecond, 10 * kSecond, 0);
  EXPECT_DOUBLE_EQ(now.requests_s, 1.0);
  EXPECT_DOUBLE_EQ(now.prompt_tokens, 100);
  EXPECT_DOUBLE_EQ(load.Upper(80 * kSecond, 10 * kSecond, 0).requests_s, 0);
  EXPECT_DOUBLE_EQ(load.Highest(80 * kSecond, 10 * kSecond, 60 * kSecond, 0).requests_s, 1.0);
  EXPECT_EQ(load.SinceLastArrival(60 * kSecond), 11 * kSecond);
}

TEST(LoadEstimator, FewArrivalsMayBeMoreByChance) {
  LoadEstimator load(kSecond, 100 * kSecond);
  load.Advance(0);
  for (int i = 0; i < 4; ++i) load.Arrived(20 * kSecond, 10);
  EXPECT_DOUBLE_EQ(load.Upper(20 * kSecond, 10 * kSecond, 2).requests_s, 0.8);  // (4 + 2 * 2) / 10
}

// Arrivals evenly, with a rate for each second.
LoadEstimator Seconds(const std::vector<int>& rates) {
  LoadEstimator load(kSecond / 8, 600 * kSecond);
  load.Advance(0);
  for (std::size_t second = 0; second < rates.size(); ++second)
    for (int i = 0; i < rates[second]; ++i)
      load.Arrived(static_cast<TimeNs>(second) * kSecond + (2 * i + 1) * kSecond / (2 * rates[second]), 10);
  return load;
}

TEST(LoadEstimator, ASteadyLoadIsKnownByALongPastAndAChangeByAShortOne) {
  std::vector<int> rates(40, 20);
  const auto lately = [&](double sigmas) {
    const auto now = static_cast<TimeNs>(rates.size()) * kSecond - kSecond / 8;
    return Seconds(rates).Lately(now, kSecond, 32 * kSecond, sigmas).requests_s;
  };
  EXPECT_NEAR(lately(0), 20, 0.5);
  EXPECT_NEAR(lately(2), 20 + 2 * std::sqrt(640) / 32, 0.5);
  rates.push_back(50);  // of 50 in a second no past of 20 or so knows
  EXPECT_GT(lately(0), 34);
  rates.insert(rates.end(), 20, 5);
  EXPECT_LT(lately(0), 6);
}

TEST(LoadEstimator, ClumpsAreMoreDispersedThanAnEvenLoad) {
  std::vector<int> even(60, 16), clumps(60, 0);
  for (std::size_t i = 0; i < clumps.size(); i += 4) clumps[i] = 64;
  const TimeNs now = 60 * kSecond - kSecond / 8;
  EXPECT_DOUBLE_EQ(Seconds(even).Dispersion(now), 1);
  EXPECT_GT(Seconds(clumps).Dispersion(now), 10);
  EXPECT_DOUBLE_EQ(LoadEstimator(kSecond, 100 * kSecond).Dispersion(now), 1);
}

Load Mix(double requests_s) {
  return {.requests_s = requests_s, .prompt_tokens = 500, .output_tokens = 200, .prompt_square = 250'000};
}

TEST(Forecast, AttainmentFallsWithLoadAndRisesWithDevices) {
  const SloTarget slo{.ttft_s = 2, .tpot_s = 0.1, .attainment = 0.95};
  double last = 1.0;
  for (double rate = 0.5; rate < 40; rate *= 1.5) {
    const Forecast one = ForecastAt(kCost, kShape, Mix(rate), slo, 2);
    EXPECT_LE(one.attainment, last + 1e-9) << rate;
    last = one.attainment;
  }
  EXPECT_LT(last, 0.5);
  EXPECT_GT(ForecastAt(kCost, kShape, Mix(10), slo, 8).attainment,
            ForecastAt(kCost, kShape, Mix(10), slo, 2).attainment);
}

TEST(Forecast, WhatWaitsDelaysWhatComes) {
  const SloTarget slo{.ttft_s = 2, .tpot_s = 0.1, .attainment = 0.95};
  EXPECT_GT(ForecastFrom({}, 10, kCost, kShape, Mix(1), slo, 4).attainment, 0.95);
  EXPECT_LT(ForecastFrom({.backlog_tokens = 1e6}, 10, kCost, kShape, Mix(1), slo, 4).attainment, 0.05);
}

TEST(Forecast, ACrowdLeavesAndItsShareOfTheHorizonCounts) {
  const SloTarget slo{.ttft_s = 2, .tpot_s = 0.02, .attainment = 0.95};
  const auto with = [&](double running, double horizon_s) {
    return ForecastFrom({.running = running}, horizon_s, kCost, kShape, Mix(0.5), slo, 4).attainment;
  };
  EXPECT_GT(with(0, 30), 0.99);
  EXPECT_LT(with(200, 2), 0.5);
  EXPECT_GT(with(200, 300), 0.9);
}

// Sequences come by chance and leave at the pace of the steps, one at a time.
TEST(Forecast, TheShareWithinTheLimitIsThatOfAQueueWhoseStepsGrowWithIt) {
  const SloTarget slo{.ttft_s = 100, .tpot_s = 0.04};
  const StepCost cost{.fixed_s = 0.004, .row_s = 0.002};
  Load load = Mix(0);
  load.prompt_tokens = load.prompt_square = 1;
  load.output_tokens = 50;
  for (const double requests_s : {5.0, 7.0, 8.5}) {
    load.requests_s = requests_s;
    Rng rng(3);
    std::vector<std::pair<int, double>> running;  // tokens left, start
    double now = 0, next = 0;
    int ended = 0, met = 0;
    while (ended < 20000) {
      for (; next <= now; next += -std::log(1 - rng.Uniform()) / requests_s) running.emplace_back(50, now);
      if (running.empty()) {
        now = next;
        continue;
      }
      now += cost.fixed_s + cost.row_s * static_cast<double>(running.size());
      std::erase_if(running, [&](auto& one) {
        if (--one.first > 0) return false;
        ++ended;
        met += (now - one.second) / 50 <= slo.tpot_s;
        return true;
      });
    }
    const double seen = static_cast<double>(met) / ended;
    EXPECT_NEAR(ForecastAt(cost, kShape, load, slo, 1).attainment, seen, 0.1) << requests_s;
  }
}

TEST(Forecast, ALoadBeyondTheCapacityIsNotStable) {
  const Forecast one = ForecastAt(kCost, kShape, Mix(1000), {}, 2);
  EXPECT_FALSE(one.stable);
  EXPECT_EQ(one.attainment, 0);
  EXPECT_GT(one.tokens_s, 0);
}

AutoscalerOptions Options() {
  AutoscalerOptions options;
  options.slo = {.ttft_s = 2, .tpot_s = 0.1, .attainment = 0.95};
  options.min_devices = 1;
  options.max_devices = 8;
  return options;
}

TEST(StepSeconds, TheBusiestDeviceHasWhatItMayAndWhatThereIs) {
  const StepCost rows{.row_s = 1}, kv{.kv_byte_s = 1};
  Load load{.requests_s = 1, .prompt_tokens = 1000, .output_tokens = 200, .prompt_square = 1000 * 1000};
  const auto step = [&](const StepCost& cost, int devices, double running, double prefill) {
    return StepSeconds(cost, kShape, load, devices, running, prefill);
  };
  EXPECT_NEAR(step(rows, 1, 10, 100), 110, 1e-9);  // one has all
  EXPECT_LE(step(rows, 40, 40, 20000), 512);       // no more than a device may have
  EXPECT_GT(step(rows, 40, 40, 20000), 500);
  // Few prompts: a chunk now and then, on one of many devices.
  EXPECT_LE(step(rows, 40, 0, 50), 50);
  EXPECT_GT(step(rows, 40, 0, 50), 40);
  EXPECT_GE(step(rows, 2, 0, 900), 450);  // at least an even share
  // Of many devices one has the longest sequences, more so where lengths differ more.
  const double even = 10 * (1000 + 100) * kShape.kv_token_bytes;
  EXPECT_NEAR(step(kv, 1, 10, 0), even, 1e-3);
  const double longest = step(kv, 16, 160, 0);
  EXPECT_GT(longest, even);
  load.prompt_square *= 1.5;
  EXPECT_GT(step(kv, 16, 160, 0), longest);
}

TEST(Autoscaler, RefusesOptionsByName) {
  AutoscalerOptions options = Options();
  options.slo.tpot_s = -1;
  EXPECT_THAT(Autoscaler::Make(options, kShape, kCost).error().message, HasSubstr("slo_tpot=-1"));
  options = Options();
  options.min_devices = 9;
  EXPECT_THAT(Autoscaler::Make(options, kShape, kCost).error().message, HasSubstr("min_devices=9"));
  EXPECT_FALSE(ParsePolicy("magic"));
}

// A server: requests queue for prefill and run; steps cost what kCost says.
struct Loop {
  Autoscaler policy;
  int devices;
  double resize_s = 2, stopped_s = 0;
  std::vector<Decision> resizes;
  double device_s = 0;
  int met = 0, ended = 0;

  void Run(double seconds, const std::function<double(double)>& rate, std::uint64_t seed) {
    Rng rng(seed);
    struct Request {
      double arrived, first = -1;
      double prompt, left;
    };
    std::vector<Request> requests;
    double now = 0, next_arrival = 0, next_tick = 1, resize_end = -1;
    int to = devices, from = devices;
    while (now < seconds) {
      while (next_arrival <= now) {
        requests.push_back({next_arrival, -1, 500, 200});
        policy.Arrived(static_cast<TimeNs>(now * 1e9), 500);
        next_arrival += -std::log(1 - rng.Uniform()) / std::max(1e-6, rate(next_arrival));
        if (rate(next_arrival) <= 0) next_arrival = std::max(next_arrival, std::floor(now) + 1);
      }
      // Each lives on one device, and the busiest counts.
      std::vector<double> rows(devices, 0.0), kv_tokens(devices, 0.0);
      double running = 0, prefill = 0, waiting_tokens = 0;
      int waiting = 0;
      std::vector<Request*> stepping;
      for (std::size_t i = 0; i < requests.size(); ++i) {
        Request& r = requests[i];
        const std::size_t device = i % static_cast<std::size_t>(devices);
        if (r.prompt <= 0) {
          ++running;
          ++rows[device];
          kv_tokens[device] += 500 + 200 - r.left;
        } else {
          const double used = std::min(r.prompt, 512 - rows[device]);
          prefill += used;
          rows[device] += used;
          kv_tokens[device] += used;
          r.prompt -= used;
          if (r.prompt > 0) ++waiting, waiting_tokens += r.prompt;
        }
        if (r.prompt <= 0) stepping.push_back(&r);
      }
      const StepShape shape{.devices = devices,
                            .rows = *std::ranges::max_element(rows),
                            .expert_rows = (running + prefill) / devices,
                            .experts = ExpertsTouched(64, 6, devices, running + prefill) * 10,
                            .kv_bytes = *std::ranges::max_element(kv_tokens) * 1e5,
                            .tokens = static_cast<double>(stepping.size())};
      const double t = running + prefill > 0 ? kCost.Seconds(shape) : 0.05;
      if (running + prefill > 0) policy.Stepped(shape, t);
      now += t;
      device_s += t * std::max(devices, to);
      for (Request* r : stepping) {
        if (r->first < 0) r->first = now;
        --r->left;
      }
      std::erase_if(requests, [&](const Request& r) {
        if (r.left > 0) return false;
        const double ttft = r.first - r.arrived, tpot = (now - r.first) / 199;
        policy.Ended({static_cast<TimeNs>(now * 1e9), ttft, tpot, 200});
        ++ended;
        met += ttft <= 2 && tpot <= 0.1;
        return true;
      });
      if (resize_end >= 0 && now >= resize_end) {
        policy.Resized({from, to, resize_s, stopped_s});
        devices = to;
        resize_end = -1;
      }
      if (now >= next_tick) {
        next_tick = std::floor(now) + 1;
        const Decision d =
            policy.Tick(static_cast<TimeNs>(now * 1e9), {.devices = devices,
                                                         .resizing = resize_end >= 0,
                                                         .running = static_cast<int>(running),
                                                         .waiting = waiting,
                                                         .waiting_prompt_tokens = waiting_tokens});
        if (d.apply) {
          from = devices;
          to = d.to;
          resize_end = now + resize_s;
          resizes.push_back(d);
        }
      }
    }
  }
  double Attainment() const { return ended == 0 ? 1 : 1.0 * met / ended; }
};

Loop MakeLoop(const AutoscalerOptions& options, int devices) {
  return {*Autoscaler::Make(options, kShape, kCost), devices};
}

TEST(Autoscaler, SteadyLoadSettlesAndDoesNotFlap) {
  for (const std::uint64_t seed : {1, 2, 3}) {
    Loop loop = MakeLoop(Options(), 4);
    loop.Run(
        600, [](double) { return 4.0; }, seed);
    std::string all;
    for (const Decision& d : loop.resizes)
      all += fmt::format("{:.0f} s: {} -> {}: {}\n", d.at * 1e-9, d.from, d.to, d.reason);
    EXPECT_LE(loop.resizes.size(), 3U) << all;
    EXPECT_GT(loop.Attainment(), 0.95) << seed;
  }
}

// By chance a burst looks small when it begins: then a third resize follows, seldom.
TEST(Autoscaler, ABurstTakesAtMostTwoResizesUpAndTwoDown) {
  int more = 0;
  constexpr int kSeeds = 20;
  for (int seed = 1; seed <= kSeeds; ++seed) {
    Loop loop = MakeLoop(Options(), 1);
    loop.Run(
        600, [](double t) { return t > 200 && t < 300 ? 8.0 : 0.5; }, static_cast<std::uint64_t>(seed));
    int grows = 0, shrinks = 0;
    std::string all;
    for (const Decision& d : loop.resizes) {
      (d.to > d.from ? grows : shrinks)++;
      all += fmt::format("{:.0f} s: {} -> {}: {}\n", d.at * 1e-9, d.from, d.to, d.reason);
    }
    more += grows > 2;
    EXPECT_GE(grows, 1) << all;
    EXPECT_LE(grows, 3) << all;
    EXPECT_LE(shrinks, 2) << all;
    EXPECT_GT(loop.Attainment(), 0.9) << all;
    EXPECT_LT(loop.device_s, 0.4 * 8 * 600) << all;
  }
  EXPECT_LE(more, kSeeds / 5);
}

ServingState At(int devices) {
  return {.devices = devices};
}

// Seconds of quiet after which a burst's size is given up, 300 = it is not.
int QuietUntilShrink(Autoscaler policy, const ResizeOutcome& grown) {
  for (int i = 0; i < 200; ++i) policy.Arrived(i * kSecond / 100, 500);
  policy.Ended({2 * kSecond, 0.1, 0.01, 200});
  policy.Resized(grown);
  for (int second = 1; second < 300; ++second)
    if (policy.Tick((second + 2) * kSecond, At(grown.to)).to < grown.to) return second;
  return 300;
}

TEST(Autoscaler, AnElasticResizeOnASlowMachineDoesNotKeepTheDevices) {
  AutoscalerOptions options = Options();
  options.slo.attainment = 0.99;
  options.max_devices = 2;
  options.window_ns = 2 * kSecond;
  options.resize_s = 0.05, options.stopped_s = 0.01;
  const ResizeOutcome slow{.from = 1, .to = 2, .seconds = 4, .stopped_s = 0.02};
  EXPECT_LE(QuietUntilShrink(*Autoscaler::Make(options, kShape, kCost), slow), 15);
  // One that serves nothing for as long is another matter.
  const ResizeOutcome standstill{.from = 1, .to = 2, .seconds = 4, .stopped_s = 4};
  EXPECT_GT(QuietUntilShrink(*Autoscaler::Make(options, kShape, kCost), standstill), 60);
}

TEST(Autoscaler, QuietNeedsNoDeviceWhateverStepsAreThoughtToTake) {
  AutoscalerOptions options = Options();
  options.resize_s = options.stopped_s = 0.01;
  StepCost slow = kCost;
  slow.fixed_s = 10 * options.slo.tpot_s;
  EXPECT_LE(QuietUntilShrink(*Autoscaler::Make(options, kShape, slow), {.from = 1, .to = 2, .seconds = 0.01}),
            40);
}

TEST(Autoscaler, AShrinkThatWasTakenBackMakesTheNextOneWait) {
  AutoscalerOptions options = Options();
  options.resize_s = options.stopped_s = 0.01;
  options.max_devices = 2;
  options.window_ns = 4 * kSecond;
  Autoscaler policy = *Autoscaler::Make(options, kShape, kCost);
  TimeNs now = 0;
  const auto waited = [&] {
    Decision grown;
    for (int second = 0; second < 10 && grown.to != 2; ++second) {
      for (int i = 0; i < 100; ++i) policy.Arrived(now += kSecond / 100, 500);
      grown = policy.Tick(now, At(1));
    }
    EXPECT_EQ(2, grown.to) << grown.reason;
    for (int second = 1; second < 300; ++second)
      if (policy.Tick(now += kSecond, At(2)).to == 1) return second;
    return 300;
  };
  const int first = waited();
  EXPECT_GT(waited(), first + 4);
}

TEST(Autoscaler, WhatTheLastWindowsHadToSpareMayBeSpentInTheNext) {
  AutoscalerOptions options = Options();
  options.max_devices = 2;
  options.window_ns = 4 * kSecond;
  // One device is forecast to keep the limits of 85 to 90 %.
  const Load load{.requests_s = 3, .prompt_tokens = 1, .output_tokens = 200, .prompt_square = 1};
  const auto forecast = [&] {
    return ForecastFrom({.running = 10}, 4, kCost, kShape, load, options.slo, 1).attainment;
  };
  for (options.slo.tpot_s = 0.01; forecast() < 0.85;) options.slo.tpot_s *= 1.01;
  ASSERT_LT(forecast(), 0.9);
  const auto code = [&](int missed) {
    Autoscaler policy = *Autoscaler::Make(options, kShape, kCost);
    TimeNs now = 0;
    for (int i = 0; i < 96; ++i) {
      policy.Arrived(now += kSecond / 3, 1);
      policy.Ended({now, 0.1, i < missed ? 1.0 : 0.001, 200});
    }
    return policy.Tick(now, {.devices = 1, .running = 10}).code;
  };
  EXPECT_EQ(code(0), DecisionCode::kHold);
  EXPECT_EQ(code(20), DecisionCode::kGrow);
}

TEST(Autoscaler, ForecastsThatPromisedTooMuchAreMadeForMoreLoad) {
  AutoscalerOptions options = Options();
  options.max_devices = 1;
  options.window_ns = 4 * kSecond;
  Autoscaler policy = *Autoscaler::Make(options, kShape, kCost);
  TimeNs now = 0;
  const auto serve = [&](int seconds, double tpot_s) {
    for (int second = 0; second < seconds; ++second) {
      for (int i = 0; i < 5; ++i) {
        policy.Arrived(now += kSecond / 5, 1);
        policy.Ended({now, 0.1, tpot_s, 20});
      }
      policy.Tick(now, {.devices = 1, .running = 1});
    }
  };
  serve(20, options.slo.tpot_s / 2);
  EXPECT_EQ(policy.optimism(), 1);
  serve(8, options.slo.tpot_s * 2);
  EXPECT_GT(policy.optimism(), 1.1);
  serve(60, options.slo.tpot_s * 2);
  EXPECT_LE(policy.optimism(), 1.5);
  serve(120, options.slo.tpot_s / 2);
  EXPECT_LT(policy.optimism(), 1.1);
}

TEST(Autoscaler, ManualScalingWins) {
  Autoscaler policy = *Autoscaler::Make(Options(), kShape, kCost);
  policy.Hold("an operator");
  for (int i = 0; i < 50; ++i) policy.Arrived(i * kSecond / 5, 500);
  const Decision held = policy.Tick(10 * kSecond, At(1));
  EXPECT_EQ(held.code, DecisionCode::kManual);
  EXPECT_FALSE(held.apply);
  EXPECT_THAT(held.reason, HasSubstr("an operator"));
  policy.Release();
  EXPECT_EQ(policy.Tick(11 * kSecond, At(1)).code, DecisionCode::kGrow);
}

TEST(Autoscaler, ObserveOnlyDecidesButDoesNotApply) {
  AutoscalerOptions options = Options();
  options.observe = true;
  Autoscaler policy = *Autoscaler::Make(options, kShape, kCost);
  for (int i = 0; i < 300; ++i) policy.Arrived(i * kSecond / 30, 500);
  const Decision d = policy.Tick(10 * kSecond, At(1));
  EXPECT_GT(d.to, 1);
  EXPECT_FALSE(d.apply);
}

TEST(Autoscaler, RefusesToWidenWhereThroughputFalls) {
  StepCost cost = kCost;
  cost.peer_s = 1.0;  // each device more costs a second a step
  Autoscaler policy = *Autoscaler::Make(Options(), kShape, cost);
  for (int i = 0; i < 1000; ++i) policy.Arrived(i * kSecond / 100, 500);
  const Decision d = policy.Tick(10 * kSecond, At(1));
  EXPECT_EQ(d.code, DecisionCode::kWideningHurts) << d.reason;
  EXPECT_FALSE(d.apply);
}

TEST(Autoscaler, SaysTheBestPossibleWhereNoSizeHolds) {
  AutoscalerOptions options = Options();
  options.slo.tpot_s = 1e-4;
  Autoscaler policy = *Autoscaler::Make(options, kShape, kCost);
  for (int i = 0; i < 10; ++i) policy.Arrived(i * kSecond, 500);
  const Decision d = policy.Tick(10 * kSecond, At(1));
  EXPECT_EQ(d.code, DecisionCode::kNoSizeHolds) << d.reason;
  EXPECT_THAT(d.reason, HasSubstr("best possible"));
}

TEST(Autoscaler, SleepsWhenNothingComesAndWakesForTheFirst) {
  AutoscalerOptions options = Options();
  options.min_devices = 0;
  Autoscaler policy = *Autoscaler::Make(options, kShape, kCost);
  policy.Arrived(0, 500);
  int devices = 2;
  for (int second = 1; second < 200 && devices > 0; ++second) {
    const Decision d = policy.Tick(second * kSecond, At(devices));
    if (d.apply) devices = d.to;
  }
  EXPECT_EQ(devices, 0);
  ServingState asleep = At(0);
  asleep.waiting = 1;
  asleep.waiting_prompt_tokens = 500;
  policy.Arrived(300 * kSecond, 500);
  const Decision d = policy.Tick(300 * kSecond, asleep);
  EXPECT_EQ(d.code, DecisionCode::kWake);
  EXPECT_GE(d.to, 1);
}

TEST(Autoscaler, NeverSleepsBelowTheMinimumAndNeverGrowsBeyondTheMaximum) {
  AutoscalerOptions options = Options();
  options.min_devices = 2;
  options.max_devices = 3;
  Autoscaler policy = *Autoscaler::Make(options, kShape, kCost);
  for (int second = 1; second < 500; ++second) {
    for (int i = 0; i < (second < 100 ? 1000 : 0); ++i) policy.Arrived(second * kSecond, 500);
    const Decision d = policy.Tick(second * kSecond, At(second % 2 + 2));
    EXPECT_GE(d.to, 2);
    EXPECT_LE(d.to, 3);
  }
}

TEST(Autoscaler, ThresholdGrowsBelowItAndStaticNeverDoes) {
  for (const PolicyKind kind : {PolicyKind::kThreshold, PolicyKind::kStatic}) {
    AutoscalerOptions options = Options();
    options.kind = kind;
    Autoscaler policy = *Autoscaler::Make(options, kShape, kCost);
    for (int i = 0; i < 10; ++i) policy.Ended({kSecond, i < 2 ? 9.0 : 0.1, 0.01, 100});
    const Decision d = policy.Tick(2 * kSecond, At(2));
    EXPECT_DOUBLE_EQ(d.seen_attainment, 0.8);
    EXPECT_EQ(d.to, kind == PolicyKind::kThreshold ? 3 : 2);
    EXPECT_FALSE(d.reason.empty());
  }
}

}  // namespace
}  // namespace elasticmoe::core
