#include "sim/capacity.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <map>

#include "core/schedule/scheduler.h"

namespace elasticmoe::sim {
namespace {

constexpr double kNs = 1e9;
constexpr int kBlockTokens = 16;
constexpr int kMaxRunning = 4096;
const DomainId kDomain(0);

double Quantile(std::vector<double>& values, double share) {
  if (values.empty()) return 0;
  const auto at =
      values.begin() + static_cast<std::ptrdiff_t>(share * static_cast<double>(values.size() - 1));
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

class Run {
 public:
  Run(const CapacityInput& input, core::Autoscaler policy, const core::ServingShape& shape, int least)
      : input_(input),
        cost_(CostOf(input.cluster, input.model)),
        shape_(shape),
        policy_(std::move(policy)),
        scheduler_({.vocab = 2,
                    .max_model_len = 1 << 20,
                    .block_tokens = kBlockTokens,
                    .max_running = kMaxRunning,
                    .max_waiting = std::numeric_limits<int>::max() / 2,
                    .max_step_rows = shape.max_step_rows,
                    .max_chunk_rows = shape.max_step_rows,
                    .prefix_cache = false}),
        states_(input.requests.size()) {
    result_.requests = static_cast<int>(input.requests.size());
    result_.least_devices = least;
    SetSize(std::max(input.start_devices, least));
  }

  Expected<CapacityResult> Finish() {
    const double end_s =
        (input_.requests.empty() ? 0 : static_cast<double>(input_.requests.back().at_ns) / kNs) + 600;
    while ((next_ < input_.requests.size() || !scheduler_.Idle()) && now_ < end_s) {
      Arrive();
      EM_RETURN_IF_ERROR(Tick());
      if (target_ != 0 && now_ >= resize_end_) EndResize();
      if (stopped_ || !Step()) Wait();
    }
    result_.duration_s = now_;
    for (State& state : states_) {
      if (state.last < 0) continue;
      ttft_.push_back(state.ttft);
      if (state.tokens > 1) tpot_.push_back(state.tpot);
    }
    result_.attainment = result_.requests == 0 ? 1 : static_cast<double>(result_.met) / result_.requests;
    result_.ttft_p50_s = Quantile(ttft_, 0.5);
    result_.ttft_p99_s = Quantile(ttft_, 0.99);
    result_.tpot_p50_s = Quantile(tpot_, 0.5);
    result_.tpot_p99_s = Quantile(tpot_, 0.99);
    return std::move(result_);
  }

 private:
  struct State {
    double first = -1, last = -1, ttft = 0, tpot = 0;
    int tokens = 0;
    bool done = false;
  };

  int Paid() const { return std::max(size_, target_); }

  void SetSize(int size) {
    // Devices that leave hand their sequences over before they are left out.
    std::vector<core::SchedulerDevice> devices;
    for (int i = 0; i < std::max(size, size_); ++i) devices.push_back({DeviceId(i), kDomain, 1.0, i < size});
    scheduler_.SetDevices(devices);
    if (size < size_) scheduler_.Rebalance();
    devices.resize(static_cast<std::size_t>(size));
    scheduler_.SetDevices(devices);
    const double tokens = shape_.kv_tokens_fixed + shape_.kv_tokens_per_device * size;
    scheduler_.SetBlocks(kDomain, static_cast<std::uint32_t>(std::max(1.0, tokens / kBlockTokens)));
    if (size > size_ && size_ > 0) scheduler_.Rebalance();
    size_ = size;
  }

  void Advance(double to, bool busy) {
    const double s = to - now_;
    result_.device_s += s * Paid();
    result_.joules += s * Paid() * (busy ? input_.cluster.busy_watts : input_.cluster.idle_watts);
    now_ = to;
    if (busy || scheduler_.Idle()) last_step_ = now_;
    if (!scheduler_.Idle()) result_.worst_gap_s = std::max(result_.worst_gap_s, now_ - last_step_);
  }

  void Arrive() {
    for (; next_ < input_.requests.size() && static_cast<double>(input_.requests[next_].at_ns) / kNs <= now_;
         ++next_) {
      const SimRequest& one = input_.requests[next_];
      core::GenerationRequest request;
      request.id = RequestId(next_);
      request.prompt.assign(static_cast<std::size_t>(std::max(1, one.prompt_tokens)), 1);
      request.max_tokens = std::max(1, one.output_tokens);
      request.ignore_eos = true;
      if (scheduler_.Idle()) last_step_ = now_;
      policy_.Arrived(static_cast<TimeNs>(now_ * kNs), one.prompt_tokens);
      waiting_tokens_ += one.prompt_tokens;
      ++arrivals_;
      if (!scheduler_.Add(std::move(request), static_cast<TimeNs>(now_ * kNs))) ++result_.ended;
    }
  }

  void End(State& state, const SimRequest& asked) {
    state.done = true;
    state.tpot = state.tokens > 1 ? (state.last - state.first) / (state.tokens - 1) : 0;
    const core::SloTarget& slo = input_.policy.slo;
    const bool met = state.ttft <= slo.ttft_s && state.tpot <= slo.tpot_s;
    ++result_.ended;
    result_.met += met;
    policy_.Ended({static_cast<TimeNs>(now_ * kNs), state.ttft, state.tpot, asked.output_tokens});
  }

  bool Step() {
    const core::StepPlan plan = scheduler_.Plan(static_cast<TimeNs>(now_ * kNs));
    for (const core::TokenEvent& event : plan.failed)
      states_[event.request.value].done = true, ++result_.ended;
    if (plan.Empty()) return false;
    core::StepShape shape{.devices = size_};
    double all_rows = 0;
    core::StepResult done{.step = plan.step};
    for (const core::DevicePlan& device : plan.devices) {
      double rows = 0, kv = 0;
      for (const core::SequenceStep& one : device.sequences) {
        rows += one.rows;
        kv += one.start_position + one.rows;
        core::SequenceResult sampled{.request = one.request};
        sampled.sampled.token = 1;
        done.sequences.push_back(sampled);
      }
      all_rows += rows;
      shape.rows = std::max(shape.rows, rows);
      shape.kv_bytes = std::max(shape.kv_bytes, kv * shape_.kv_token_bytes);
    }
    shape.experts = core::ExpertsTouched(shape_.experts, shape_.top_k, size_, all_rows) * shape_.moe_layers;
    double seconds = cost_.Seconds(shape);
    policy_.Stepped(shape, seconds);
    // Copies of a resize take memory bandwidth from the steps beside them.
    if (target_ != 0) seconds *= 1 + input_.cluster.link_bytes_s / input_.cluster.memory_bytes_s;
    Advance(now_ + seconds, true);
    ++result_.steps;
    std::vector<core::TokenEvent> events;
    scheduler_.Complete(done, static_cast<TimeNs>(now_ * kNs), events);
    for (const core::TokenEvent& event : events) {
      State& state = states_[event.request.value];
      const SimRequest& asked = input_.requests[event.request.value];
      if (!event.tokens.empty()) {
        if (state.first < 0) {
          state.first = now_;
          state.ttft = now_ - static_cast<double>(asked.at_ns) / kNs;
          waiting_tokens_ -= asked.prompt_tokens;
        }
        state.last = now_;
        state.tokens += static_cast<int>(event.tokens.size());
        result_.output_tokens += static_cast<double>(event.tokens.size());
      }
      if (event.finish) End(state, asked);
    }
    return true;
  }

  // To the next thing that happens without a step.
  void Wait() {
    double next = next_tick_;
    if (next_ < input_.requests.size())
      next = std::min(next, static_cast<double>(input_.requests[next_].at_ns) / kNs);
    if (target_ != 0 && resize_end_ > now_) next = std::min(next, resize_end_);
    Advance(std::max(next, now_ + 1e-9), false);
  }

  Status Tick() {
    if (now_ < next_tick_) return {};
    const core::SchedulerStats stats = scheduler_.Stats();
    const auto now_ns = static_cast<TimeNs>(now_ * kNs);
    core::Decision decision = policy_.Tick(
        now_ns, {.devices = size_,
                 .resizing = target_ != 0,
                 .running = stats.running,
                 .waiting = stats.waiting,
                 .waiting_prompt_tokens = stats.waiting == 0 ? 0 : std::max(0.0, waiting_tokens_)});
    if (result_.samples.empty() || now_ - result_.samples.back().at_s >= 1) {
      result_.samples.push_back(
          {now_, arrivals_, Paid(), stats.waiting, stats.running, policy_.SeenAttainment(now_ns)});
      arrivals_ = 0;
    }
    next_tick_ = std::floor(now_) + 1;
    if (!decision.apply) return {};
    const std::pair key(size_, decision.to);
    if (!resize_s_.contains(key)) {
      EM_ASSIGN_OR_RETURN(resize_s_[key],
                          ResizeSeconds(input_.cluster, input_.model, input_.strategy, size_, decision.to));
    }
    target_ = decision.to;
    resize_start_ = now_;
    resize_end_ = now_ + resize_s_[key];
    if (input_.strategy == ResizeStrategy::kColdRestart) {
      stopped_ = true;
      scheduler_.ForgetKv(kDomain);
    }
    result_.resizes.push_back(std::move(decision));
    return {};
  }

  void EndResize() {
    if (input_.strategy == ResizeStrategy::kDrain && scheduler_.Stats().running > 0) {
      std::vector<core::SchedulerDevice> devices;
      for (int i = 0; i < size_; ++i) devices.push_back({DeviceId(i), kDomain, 1.0, false});
      scheduler_.SetDevices(devices);  // nothing new starts until those running have ended
      return;
    }
    policy_.Resized(size_, target_, now_ - resize_start_);
    SetSize(target_);
    target_ = 0;
    stopped_ = false;
  }

  const CapacityInput& input_;
  const core::StepCost cost_;
  const core::ServingShape shape_;
  core::Autoscaler policy_;
  core::Scheduler scheduler_;
  std::vector<State> states_;
  CapacityResult result_;
  std::map<std::pair<int, int>, double> resize_s_;
  std::vector<double> ttft_, tpot_;
  std::size_t next_ = 0;
  double now_ = 0, next_tick_ = 0, last_step_ = 0;
  double resize_start_ = 0, resize_end_ = 0;
  double waiting_tokens_ = 0;
  int size_ = 0, target_ = 0, arrivals_ = 0;
  bool stopped_ = false;
};

}  // namespace

Expected<CapacityResult> RunCapacity(const CapacityInput& input) {
  const core::ModelSpec& model = input.model;
  core::ServingShape shape;
  for (const core::LayerSpec& layer : model.layers) shape.moe_layers += layer.moe;
  shape.experts = model.moe.experts;
  shape.top_k = model.moe.top_k;
  shape.kv_token_bytes = 4.0 * model.attention.kv_heads * model.attention.head_dim * model.LayerCount();
  shape.max_running = kMaxRunning;
  const double experts = static_cast<double>(ExpertBytes(model)) * model.moe.experts * shape.moe_layers;
  const double shared = static_cast<double>(SharedBytes(model));
  // A twentieth of the memory is left for activations; the KV of a sequence needs room, too.
  const double usable = input.cluster.memory_bytes * 0.95 - shared;
  const int least = usable <= 0 ? 0 : std::max(1, static_cast<int>(std::ceil(experts / usable + 1e-9)));
  const int step = std::max(1, input.policy.step_devices);
  const int rounded = (least + step - 1) / step * step;
  if (usable <= 0 || rounded > input.policy.max_devices || input.policy.max_devices > input.cluster.devices)
    return Fail(ErrorCode::kResourceExhausted,
                "fitting the model into the cluster: weights={:.1f} GB shared on each device and {:.1f} GB "
                "of experts (limit="
                "{} of {} devices with {:.1f} GB); take more devices or a smaller model",
                shared * 1e-9, experts * 1e-9, input.policy.max_devices, input.cluster.devices,
                input.cluster.memory_bytes * 1e-9);
  shape.kv_tokens_per_device = usable / shape.kv_token_bytes;
  shape.kv_tokens_fixed = -experts / shape.kv_token_bytes;
  core::AutoscalerOptions policy = input.policy;
  policy.min_devices = std::max(policy.min_devices, rounded);
  const int other = std::max(policy.min_devices, policy.max_devices / 2);
  EM_ASSIGN_OR_RETURN(policy.resize_s,
                      ResizeSeconds(input.cluster, model, input.strategy, other, policy.max_devices));
  // The autoscaler is not told the truth: it starts half wrong and learns from the steps.
  core::StepCost prior = CostOf(input.cluster, model);
  for (double* one : {&prior.fixed_s, &prior.row_s, &prior.expert_s, &prior.kv_byte_s, &prior.peer_s})
    *one *= 1.5;
  EM_ASSIGN_OR_RETURN(core::Autoscaler scaler, core::Autoscaler::Make(policy, shape, prior));
  return Run(input, std::move(scaler), shape, rounded).Finish();
}

}  // namespace elasticmoe::sim
