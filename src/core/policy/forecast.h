// What a load would see at a size: capacity, step time, share of requests within their limits. Pure.
//
// Each running sequence gets one token a step, and a step takes longer the more run: with n running and
// t(n) seconds a step, n / (output_tokens * t(n)) end a second while requests_s come. Their number follows
// that balance and chance: fluid limit and linear noise (a birth-death process; Kurtz 1970),
//
//   dm/dt = requests_s - ends(m)        dv/dt = requests_s + ends(m) - 2 ends'(m) v
//
// Near the capacity ends' is small: the number wanders far and returns late, which a Poisson number (M/G/inf)
// does not. TPOT is a mean over a request's life, which leaves part of v. Waiting for the first token is
// M/G/1 (Pollaczek-Khinchine mean, exponential tail) behind what already waits.
#pragma once

#include "core/policy/load_estimator.h"
#include "core/policy/step_cost.h"
#include "core/schedule/scheduler.h"

namespace elasticmoe::core {

struct ServingShape {
  int moe_layers = 0;
  int experts = 0;
  int top_k = 0;
  double kv_token_bytes = 0;        // of all layers
  int max_step_rows = 512;          // a device
  int max_running = 128;            // sequences, all devices
  double kv_tokens_fixed = 0;       // KV capacity in tokens that does not depend on the size; 0 = no limit
  double kv_tokens_per_device = 0;  // and that of a device
};

struct SloTarget {
  double ttft_s = 2.0;
  double tpot_s = 0.2;
  double attainment = 0.95;  // share of requests that meet both
};

struct Forecast {
  int devices = 0;
  double attainment = 0;  // 0..1
  double step_s = 0;      // infinity where the load is beyond the capacity
  double running = 0;     // sequences
  double ttft_s = 0;      // mean
  double tokens_s = 0;    // most output tokens a second that this mix of requests could get
  bool stable = false;    // the queue does not grow
};

// What is there already.
struct Present {
  double running = 0;         // sequences
  double backlog_tokens = 0;  // of prompts that wait
};

// Of the requests that come in the steady state, to which the load leads if it stays.
Forecast ForecastAt(const StepCost& cost, const ServingShape& shape, const Load& load, const SloTarget& slo,
                    int devices);
// Of those that come in the next `horizon_s`, from what is there now.
Forecast ForecastFrom(const Present& present, double horizon_s, const StepCost& cost,
                      const ServingShape& shape, const Load& load, const SloTarget& slo, int devices);

// What a planned step on `devices` devices makes of the cost.
StepShape ShapeOf(const StepPlan& plan, const ServingShape& shape, int devices);

// Mean seconds of a step with `running` decode rows and, on average, `prefill` prompt rows over all devices.
double StepSeconds(const StepCost& cost, const ServingShape& shape, const Load& load, int devices,
                   double running, double prefill);

}  // namespace elasticmoe::core
