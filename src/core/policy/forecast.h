// What a load would see at a size: capacity, step time, share of requests within their limits. Pure.
//
// Steady state: each running sequence gets one token a step, so requests_s * output_tokens * t sequences run
// while requests_s * prompt_tokens * t prompt rows come along, where t is what such a step costs: a fixed
// point. The number of running sequences is Poisson (M/G/inf), and TPOT is a mean over a request's life,
// which gives the share of TPOT; waiting for the first token is M/G/1 (Pollaczek-Khinchine mean, exponential
// tail), which gives the share of TTFT. What runs and waits already counts where it is more.
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

// `backlog_tokens`: prompt tokens that already wait, which new requests wait behind. `running_now`: sequences
// that run already.
Forecast ForecastAt(const StepCost& cost, const ServingShape& shape, const Load& load, const SloTarget& slo,
                    int devices, double backlog_tokens, double running_now = 0);

// What a planned step on `devices` devices makes of the cost.
StepShape ShapeOf(const StepPlan& plan, const ServingShape& shape, int devices);

// Seconds of a step with `running` decode rows and `prefill` prompt rows over all devices.
double StepSeconds(const StepCost& cost, const ServingShape& shape, const Load& load, int devices,
                   double running, double prefill);

}  // namespace elasticmoe::core
