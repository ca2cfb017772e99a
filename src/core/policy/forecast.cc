#include "core/policy/forecast.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace elasticmoe::core {
namespace {

// Of a number of this mean and variance that is skewed as those of queues are: gamma, by the cube root of
// which is near normal (Wilson and Hilferty 1931).
double ShareBelow(double limit, double mean, double variance) {
  if (variance <= 0 || mean <= 0) return limit >= mean ? 1.0 : 0.0;
  const double spread = variance / (9 * mean * mean);
  return 0.5 * std::erfc(-(std::cbrt(limit / mean) - 1 + spread) / std::sqrt(2 * spread));
}

// Rows of the largest chunk in a step, where chunks of prompts come as a Poisson number of `prefill` rows on
// average. Prompts end anywhere within a chunk: all chunks but a prompt's last are whole.
double LargestChunk(double limit, const Load& load, double prefill) {
  const double prompt = std::max(1.0, load.prompt_tokens);
  const double chunks = std::max(1.0, prompt / limit + 0.5);
  const double whole = 1 - 1 / chunks;
  const double rows = prompt / chunks, last = (rows - whole * limit) / (1 - whole);
  const double count = prefill / rows;
  const double any_whole = 1 - std::exp(-count * whole), any = 1 - std::exp(-count);
  return limit * any_whole + last * (any - any_whole);
}

// How many standard deviations the largest of so many normal numbers lies above their mean, on average
// (Fisher and Tippett 1928).
double LargestOf(int count) {
  if (count <= 1) return 0;
  constexpr double kEuler = 0.5772, kLog4Pi = 2.5310;
  const double log = std::log(count), root = std::sqrt(2 * log);
  return root - (std::log(log) + kLog4Pi - 2 * kEuler) / (2 * root);
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
  const double context = load.prompt_tokens + load.output_tokens / 2;
  const double own = 1.0 / devices;
  // A sequence lives whole on one device, and the busiest counts: of evenly spread ones it holds the next
  // whole number, half of one more on average; prompts are spread, too, as long as there are devices without.
  const double busiest = std::min<double>(
      shape.max_step_rows, running * own + (1 - own) * std::min(running, 0.5) +
                               std::max(prefill * own, LargestChunk(shape.max_step_rows, load, prefill)));
  // As many sequences on each, but not as long ones. Outputs are anywhere in lives that end at random.
  const double spread = std::max(0.0, load.prompt_square - load.prompt_tokens * load.prompt_tokens) +
                        load.output_tokens * load.output_tokens / 4;
  const double kv_tokens = running * own * context + LargestOf(devices) * std::sqrt(running * own * spread);
  return cost.Seconds(
      {.devices = devices,
       .rows = busiest,
       .expert_rows = rows * own,
       .experts = ExpertsTouched(shape.experts, shape.top_k, devices, rows) * shape.moe_layers,
       .kv_bytes = kv_tokens * shape.kv_token_bytes,
       .tokens = running + prefill / std::max(1.0, load.prompt_tokens)});
}

namespace {

// A size under a load.
class Outlook {
 public:
  Outlook(const StepCost& cost, const ServingShape& shape, const Load& load, const SloTarget& slo,
          int devices)
      : cost_(cost), shape_(shape), load_(load), slo_(slo), devices_(devices) {
    const double rows = static_cast<double>(shape.max_step_rows) * devices;
    most_running_ = std::min(RunningLimit(shape, load, devices), rows / (1 + prompt_ / outputs_));
    if (Step(most_running_) <= slo.tpot_s) {
      fits_ = most_running_;
      return;
    }
    fits_ = Bisect([&](double running) { return Step(running) <= slo.tpot_s; });
  }

  // With its share of prompt rows: as many begin as end.
  double Step(double running) const {
    return StepSeconds(cost_, shape_, load_, devices_, running, running * prompt_ / outputs_);
  }
  double Ends(double running) const { return running / (outputs_ * std::max(Step(running), 1e-12)); }
  double MostRequests() const { return Ends(most_running_); }
  double MostTokens() const { return MostRequests() * outputs_; }
  double most_running() const { return most_running_; }
  // REQUIRES: the load is below MostRequests().
  double Steady() const {
    return Bisect([&](double running) { return Ends(running) < load_.requests_s; });
  }
  // How fast a deviation goes back, 1/s.
  double Return(double running) const {
    const double apart = std::max(0.5, running * 0.05);
    const double low = std::max(0.0, running - apart);
    return std::max(1e-9, (Ends(running + apart) - Ends(low)) / (running + apart - low));
  }

  // Prompt rows a second beyond those of the load, which a backlog is served by.
  double PromptRoom(double running) const { return RowsPerSecond(running) - load_.requests_s * prompt_; }

  struct Limits {
    double attainment = 0, ttft_s = 0;
  };
  // Of a request that comes while the number running has this mean and variance and so many tokens wait.
  Limits Share(double running, double variance, double backlog_tokens) const {
    // It runs beside the others. Of their variance a mean over one life leaves what is not forgotten in it.
    const double forgets = std::max(1e-6, Return(running) * outputs_ * Step(running));
    const double left = 2 * (forgets - 1 + std::exp(-forgets)) / (forgets * forgets);
    const double tpot_share = fits_ >= most_running_ ? 1.0 : ShareBelow(fits_ - 1, running, variance * left);
    const double free_rows = FreeRows(running), rows_s = RowsPerSecond(running);
    const double square = std::max(load_.prompt_square, prompt_ * prompt_) / (rows_s * rows_s);
    const double busy =
        std::min(0.999, std::max(load_.requests_s * prompt_ / rows_s, load_.requests_s / MostRequests()));
    const double wait_s = load_.requests_s * square / (2 * (1 - busy));
    const double backlog_s = backlog_tokens / rows_s;  // first come, first served
    // A chunk may be cut by the device's rows, and an arrival waits for the step that runs.
    const double chunks = std::max(1.0, std::ceil(prompt_ / std::max(1.0, free_rows / devices_)));
    const double step_s = Step(running);
    const double own_s =
        chunks * std::max(step_s, Seconds(running, std::min(prompt_, free_rows))) + step_s / 2;
    Limits out{.ttft_s = own_s + wait_s + backlog_s};
    const double room = slo_.ttft_s - own_s - backlog_s;
    double ttft_share = 0;
    if (room >= 0) ttft_share = wait_s > 0 ? 1 - busy * std::exp(-room * busy / wait_s) : 1;
    out.attainment = std::clamp(tpot_share * ttft_share, 0.0, 1.0);
    return out;
  }

 private:
  double Seconds(double running, double prefill) const {
    return StepSeconds(cost_, shape_, load_, devices_, running, prefill);
  }
  double FreeRows(double running) const {
    return std::max(1.0, static_cast<double>(shape_.max_step_rows) * devices_ - running);
  }
  // Prompt rows are served at the rate that steps leave them.
  double RowsPerSecond(double running) const {
    return FreeRows(running) / Seconds(running, FreeRows(running));
  }
  // The most running sequences for which `holds`, which does not hold again beyond.
  template <typename Holds>
  double Bisect(const Holds& holds) const {
    double low = 0, high = most_running_;
    for (int round = 0; round < 40; ++round) {
      const double middle = (low + high) / 2;
      (holds(middle) ? low : high) = middle;
    }
    return high;
  }

  const StepCost& cost_;
  const ServingShape& shape_;
  const Load& load_;
  const SloTarget& slo_;
  int devices_;
  double prompt_ = std::max(1.0, load_.prompt_tokens), outputs_ = std::max(1.0, load_.output_tokens);
  double most_running_ = 0;
  double fits_ = 0;  // the batch whose steps take exactly the limit of TPOT
};

// Where there is nothing to compute; else capacity and steady state, and `attainment` is left to the caller.
bool Begin(const Outlook& outlook, const Load& load, bool idle, Forecast& out) {
  out.tokens_s = outlook.MostTokens();
  out.stable = load.requests_s < outlook.MostRequests();
  if (idle) {
    // Nobody comes, nobody misses: what a lone request would take says nothing of how many devices to keep.
    out.step_s = outlook.Step(1);
    out.attainment = 1;
    return false;
  }
  out.running = out.stable ? outlook.Steady() : outlook.most_running();
  out.step_s = out.stable ? outlook.Step(out.running) : std::numeric_limits<double>::infinity();
  out.ttft_s = out.step_s;
  return true;
}

Forecast Asleep(const Load& load, const Present& present) {
  Forecast out;
  out.stable = load.requests_s <= 0 && present.backlog_tokens <= 0;
  out.attainment = out.stable ? 1 : 0;
  return out;
}

}  // namespace

Forecast ForecastAt(const StepCost& cost, const ServingShape& shape, const Load& load, const SloTarget& slo,
                    int devices) {
  if (devices <= 0) return Asleep(load, {});
  Forecast out{.devices = devices};
  const Outlook outlook(cost, shape, load, slo, devices);
  if (!Begin(outlook, load, load.requests_s <= 0, out) || !out.stable) return out;
  const auto seen = outlook.Share(out.running, load.requests_s / outlook.Return(out.running), 0);
  out.attainment = seen.attainment;
  out.ttft_s = seen.ttft_s;
  return out;
}

Forecast ForecastFrom(const Present& present, double horizon_s, const StepCost& cost,
                      const ServingShape& shape, const Load& load, const SloTarget& slo, int devices) {
  if (devices <= 0) return Asleep(load, present);
  Forecast out{.devices = devices};
  const Outlook outlook(cost, shape, load, slo, devices);
  const bool idle = load.requests_s <= 0 && present.backlog_tokens <= 0 && present.running <= 0;
  if (!Begin(outlook, load, idle, out)) return out;
  // Exponential Euler: the step is exact where the balance is linear, so a life may be shorter than it.
  constexpr int kLooks = 24;
  const double look_s = horizon_s / kLooks;
  double mean = std::min(present.running, outlook.most_running()), variance = 0;
  double backlog = present.backlog_tokens;
  double attainment = 0, ttft_s = 0;
  for (int look = 0; look < kLooks; ++look) {
    const double ends = outlook.Ends(mean), back = outlook.Return(mean);
    const double near = 1 - std::exp(-back * look_s), settled = (load.requests_s + ends) / (2 * back);
    const double next = mean + (load.requests_s - ends) * near / back;
    variance = settled + (variance - settled) * (1 - near) * (1 - near);
    // Beyond the limit they wait.
    const double over = std::max(0.0, next - outlook.most_running());
    mean = std::max(0.0, next - over);
    const double served = over > 0 ? 0 : std::max(0.0, outlook.PromptRoom(mean)) * look_s;
    backlog = std::max(0.0, backlog + over * std::max(1.0, load.prompt_tokens) - served);
    const auto seen = outlook.Share(mean, variance, backlog);
    attainment += seen.attainment / kLooks;
    ttft_s += seen.ttft_s / kLooks;
  }
  out.attainment = attainment;
  out.ttft_s = ttft_s;
  return out;
}

}  // namespace elasticmoe::core
