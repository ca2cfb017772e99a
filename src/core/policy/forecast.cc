#include "core/policy/forecast.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace elasticmoe::core {
namespace {

double NormalShareBelow(double limit, double mean, double deviation) {
  if (deviation <= 0) return limit >= mean ? 1.0 : 0.0;
  return 0.5 * std::erfc(-(limit - mean) / (deviation * std::sqrt(2.0)));
}

// Sequences that fit at once.
double RunningLimit(const ServingShape& shape, const Load& load, int devices) {
  double limit = std::min<double>(shape.max_running, static_cast<double>(shape.max_step_rows) * devices);
  const double kv = shape.kv_tokens_fixed + shape.kv_tokens_per_device * devices;
  if (kv > 0) limit = std::min(limit, kv / std::max(1.0, load.prompt_tokens + load.output_tokens / 2));
  return std::max(1.0, limit);
}

}  // namespace

StepShape ShapeOf(const StepPlan& plan, const ServingShape& shape, int devices) {
  StepShape out{.devices = devices};
  double all_rows = 0;
  for (const DevicePlan& device : plan.devices) {
    double rows = 0, context = 0;
    for (const SequenceStep& one : device.sequences) {
      rows += one.rows;
      context += one.start_position + one.rows;
      out.tokens += one.sample;
    }
    all_rows += rows;
    out.rows = std::max(out.rows, rows);
    out.kv_bytes = std::max(out.kv_bytes, context * shape.kv_token_bytes);
  }
  out.expert_rows = all_rows / devices;
  out.experts = ExpertsTouched(shape.experts, shape.top_k, devices, all_rows) * shape.moe_layers;
  return out;
}

double StepSeconds(const StepCost& cost, const ServingShape& shape, const Load& load, int devices,
                   double running, double prefill) {
  const double rows = running + prefill;
  const double touched = ExpertsTouched(shape.experts, shape.top_k, devices, rows) * shape.moe_layers;
  const double context = load.prompt_tokens + load.output_tokens / 2;
  // A sequence lives whole on one device: the busiest holds a whole number of them.
  return cost.Seconds(
      {.devices = devices,
       .rows = std::max(std::ceil(running / devices - 1e-9), running / devices) + prefill / devices,
       .expert_rows = rows / devices,
       .experts = touched,
       .kv_bytes = running / devices * context * shape.kv_token_bytes,
       .tokens = running + prefill / std::max(1.0, load.prompt_tokens)});
}

Forecast ForecastAt(const StepCost& cost, const ServingShape& shape, const Load& load, const SloTarget& slo,
                    int devices, double backlog_tokens, double running_now) {
  Forecast out{.devices = devices};
  if (devices <= 0) {
    out.stable = load.requests_s <= 0 && backlog_tokens <= 0;
    out.attainment = out.stable ? 1 : 0;
    return out;
  }
  const double outputs = std::max(1.0, load.output_tokens);
  const double prompt = std::max(1.0, load.prompt_tokens);
  const double limit = RunningLimit(shape, load, devices);
  const double most_rows = static_cast<double>(shape.max_step_rows) * devices;
  // A step of a rate r of requests: r * outputs * t sequences and r * prompt * t prompt rows.
  const auto step = [&](double running) {
    return StepSeconds(cost, shape, load, devices, running, running * prompt / outputs);
  };
  // The most running sequences whose step also fits the rows, and the request rate they make.
  const double most_running = std::min(limit, most_rows / (1.0 + prompt / outputs));
  const double most_rate = most_running / (outputs * std::max(step(most_running), 1e-12));
  out.tokens_s = most_rate * outputs;
  if (load.requests_s <= 0 && backlog_tokens <= 0 && running_now <= 0) {
    // Nobody comes, nobody misses: what a lone request would take says nothing of how many devices to keep.
    out.step_s = StepSeconds(cost, shape, load, devices, 1, 0);
    out.stable = true;
    out.attainment = 1;
    return out;
  }
  const double utilization = load.requests_s / most_rate;
  if (utilization >= 1) {
    out.step_s = std::numeric_limits<double>::infinity();
    out.ttft_s = out.step_s;
    out.running = most_running;
    return out;
  }
  // running = rate * outputs * step(running): the smallest solution, by bisection on running.
  double low = 0, high = most_running;
  for (int round = 0; round < 60; ++round) {
    const double middle = (low + high) / 2;
    (load.requests_s * outputs * step(middle) > middle ? low : high) = middle;
  }
  out.running = high;
  out.step_s = step(high);
  out.stable = true;

  // TPOT: the batch that takes exactly the limit, against a Poisson number of running sequences.
  double fits = 0, beyond = most_running;
  if (step(beyond) <= slo.tpot_s) {
    fits = beyond;
  } else {
    for (int round = 0; round < 60; ++round) {
      const double middle = (fits + beyond) / 2;
      (step(middle) <= slo.tpot_s ? fits : beyond) = middle;
    }
  }
  // Of the Poisson variance 2/3 are left in a mean over one life, after which the number has forgotten
  // itself.
  const double seen_running = std::max(out.running, running_now);
  const double tpot_share = step(most_running) <= slo.tpot_s
                                ? 1.0
                                : NormalShareBelow(fits, seen_running, std::sqrt(seen_running * 2 / 3));

  // TTFT: prompt rows are served at the rate that steps leave them.
  const double free_rows = std::max(1.0, std::min<double>(most_rows - out.running, most_rows));
  const double full_step = StepSeconds(cost, shape, load, devices, out.running, free_rows);
  const double rows_s = free_rows / full_step;
  const double service_s = prompt / rows_s;
  const double service_square = std::max(load.prompt_square, prompt * prompt) / (rows_s * rows_s);
  const double busy = std::min(0.999, std::max(load.requests_s * service_s, utilization));
  const double wait_s = load.requests_s * service_square / (2 * (1 - busy));
  const double backlog_s =
      backlog_tokens / rows_s;  // first come, first served: later ones are not in its way
  // A chunk may be cut by the device's rows, and an arrival waits for the step that runs.
  const double chunk_steps = std::ceil(prompt / std::max(1.0, free_rows / devices));
  const double own_s =
      std::max(chunk_steps, 1.0) * std::max(out.step_s, StepSeconds(cost, shape, load, devices, out.running,
                                                                    std::min(prompt, free_rows))) +
      out.step_s / 2;
  out.ttft_s = own_s + wait_s + backlog_s;
  const double room = slo.ttft_s - own_s - backlog_s;
  double ttft_share = 0;
  if (room >= 0) ttft_share = wait_s > 0 ? 1 - busy * std::exp(-room * busy / wait_s) : 1;
  out.attainment = std::clamp(tpot_share * ttft_share, 0.0, 1.0);
  return out;
}

}  // namespace elasticmoe::core
