#include "sim/capacity_world.h"

#include <algorithm>
#include <cmath>

namespace elasticmoe::sim {
namespace {

constexpr double kNs = 1e9;
constexpr double kTick = 0.25;     // seconds between two looks of the policy, as on the server
constexpr double kPatience = 600;  // seconds without an arrival or an end: it will not end

TimeNs Ns(double seconds) {
  return static_cast<TimeNs>(seconds * kNs);
}
double Seconds(TimeNs ns) {
  return static_cast<double>(ns) / kNs;
}

double Quantile(std::vector<double>& values, double share) {
  if (values.empty()) return 0;
  const auto at =
      values.begin() + static_cast<std::ptrdiff_t>(share * static_cast<double>(values.size() - 1));
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

bool Ours(ResizeStrategy strategy) {
  return strategy == ResizeStrategy::kElastic || strategy == ResizeStrategy::kDrain;
}

bool SharesDevices(ResizeStrategy strategy) {
  return strategy == ResizeStrategy::kColocated || strategy == ResizeStrategy::kElasticPaperOverlap;
}

}  // namespace

CapacityWorld::CapacityWorld(const CapacityInput& input, core::Autoscaler policy,
                             const core::ServingShape& shape, const EngineLimits& limits, int start_devices,
                             int least_devices)
    : input_(input),
      cost_(CostOf(input.cluster, input.model)),
      shape_(shape),
      limits_(limits),
      replica_(start_devices),
      least_(least_devices),
      policy_(std::move(policy)),
      states_(input.requests.size()) {
  result_.requests = static_cast<int>(input.requests.size());
  result_.each.resize(input.requests.size());
  AddEngine(start_devices);
}

Expected<CapacityResult> CapacityWorld::Run() {
  while (next_ < input_.requests.size() || (!AllIdle() && now_ < last_end_ + kPatience)) {
    FinishSteps();
    Arrive();
    Strike();
    EM_RETURN_IF_ERROR(Tick());
    Advance();
    StartSteps();
    MoveTo(Next());
  }
  result_.duration_s = now_;
  for (const State& state : states_) {
    if (state.first < 0) continue;
    ttft_.push_back(state.ttft);
    if (state.tokens > 1) tpot_.push_back((state.last - state.first) / (state.tokens - 1));
  }
  result_.attainment = result_.requests == 0 ? 1 : static_cast<double>(result_.met) / result_.requests;
  result_.ttft_p50_s = Quantile(ttft_, 0.5);
  result_.ttft_p99_s = Quantile(ttft_, 0.99);
  result_.tpot_p50_s = Quantile(tpot_, 0.5);
  result_.tpot_p99_s = Quantile(tpot_, 0.99);
  return std::move(result_);
}

// ---------------------------------------------------------------- time

int CapacityWorld::Size() const {
  int size = 0;
  for (const Engine& engine : engines_)
    if (engine.accepts) size += engine.instance->devices();
  return size;
}

int CapacityWorld::Paid() const {
  int sum = 0, most = 0;
  for (const Engine& engine : engines_) {
    sum += engine.instance->devices();
    most = std::max(most, engine.instance->devices());
  }
  const int to = pending_ ? pending_->to : 0;
  switch (input_.strategy) {
    case ResizeStrategy::kExtravagant:
      return sum + to;
    case ResizeStrategy::kHorizontal:
      return std::max(sum, to);
    default:
      return std::max(most, to);
  }
}

bool CapacityWorld::Stepping() const {
  return std::ranges::any_of(engines_, [](const Engine& one) { return one.instance->Stepping(); });
}

bool CapacityWorld::AllIdle() const {
  return std::ranges::all_of(engines_, [](const Engine& one) { return one.instance->Idle(); });
}

bool CapacityWorld::Drains() const {
  return std::ranges::any_of(engines_, [](const Engine& one) { return !one.accepts; });
}

double CapacityWorld::Next() const {
  double next = next_tick_;
  if (next_ < input_.requests.size()) next = std::min(next, Seconds(input_.requests[next_].at_ns));
  if (next_resize_ < input_.resizes.size()) next = std::min(next, input_.resizes[next_resize_].at_s);
  if (next_fault_ < input_.faults.size()) next = std::min(next, input_.faults[next_fault_].at_s);
  if (pending_ && pending_->ready > now_) next = std::min(next, pending_->ready);
  for (const Engine& engine : engines_) {
    next = std::min(next, engine.instance->step_end());
    if (engine.stopped_until > now_) next = std::min(next, engine.stopped_until);
  }
  return std::max(next, now_ + 1e-9);
}

void CapacityWorld::MoveTo(double to) {
  const double s = to - now_;
  int busy = 0;
  for (const Engine& engine : engines_) busy += engine.instance->Stepping() ? engine.instance->devices() : 0;
  const int paid = Paid();
  busy = std::min(busy, paid);
  result_.device_s += s * paid;
  result_.joules += s * (busy * input_.cluster.busy_watts + (paid - busy) * input_.cluster.idle_watts);
  gap_ = busy > 0 || AllIdle() ? 0 : gap_ + s;
  result_.worst_gap_s = std::max(result_.worst_gap_s, gap_);
  now_ = to;
}

// ---------------------------------------------------------------- requests and steps

void CapacityWorld::AddEngine(int devices) {
  engines_.push_back({std::make_unique<Instance>(cost_, shape_, limits_, devices)});
}

CapacityWorld::Engine& CapacityWorld::Least() {
  Engine* best = nullptr;
  double least = 0;
  for (Engine& engine : engines_) {
    if (!engine.accepts) continue;
    const core::SchedulerStats stats = engine.instance->Stats();
    const double load = static_cast<double>(stats.running + stats.waiting) / engine.instance->devices();
    if (best == nullptr || load < least) best = &engine, least = load;
  }
  return *best;
}

void CapacityWorld::Arrive() {
  for (; next_ < input_.requests.size() && Seconds(input_.requests[next_].at_ns) <= now_; ++next_) {
    const SimRequest& one = input_.requests[next_];
    core::GenerationRequest request;
    request.id = RequestId(next_);
    request.prompt.assign(static_cast<std::size_t>(std::max(1, one.prompt_tokens)), 1);
    request.max_tokens = std::max(1, one.output_tokens);
    request.ignore_eos = true;
    policy_.Arrived(Ns(now_), one.prompt_tokens);
    last_end_ = now_;
    waiting_tokens_ += one.prompt_tokens;
    ++sample_.arrivals;
    Instance& owner = *Least().instance;
    states_[next_].owner = &owner;
    if (owner.Add(std::move(request), now_)) continue;
    waiting_tokens_ -= one.prompt_tokens;
    End(next_, true);
  }
}

void CapacityWorld::End(std::size_t index, bool failed) {
  State& state = states_[index];
  state.tpot = state.tokens > 1 ? (state.last - state.first) / (state.tokens - 1) : 0;
  state.owner = nullptr;
  const core::SloTarget& slo = input_.policy.slo;
  const bool met = !failed && state.ttft <= slo.ttft_s && state.tpot <= slo.tpot_s;
  last_end_ = now_;
  ++result_.ended;
  result_.met += met;
  result_.each[index] = {state.ttft, state.tpot, now_, met};
  policy_.Ended({Ns(now_), state.ttft, state.tpot, state.tokens, failed});
}

void CapacityWorld::FinishSteps() {
  std::vector<core::TokenEvent> events;
  for (Engine& engine : engines_)
    if (engine.instance->step_end() <= now_) {
      engine.instance->FinishStep(now_, events);
      ++result_.steps;
    }
  for (const core::TokenEvent& event : events) {
    const std::size_t index = event.request.value;
    State& state = states_[index];
    if (!event.tokens.empty()) {
      if (state.first < 0) {
        state.first = now_;
        state.ttft = now_ - Seconds(input_.requests[index].at_ns) + input_.cluster.request_s;
        waiting_tokens_ -= input_.requests[index].prompt_tokens;
        sample_.worst_ttft_s = std::max(sample_.worst_ttft_s, state.ttft);
      }
      state.last = now_;
      state.tokens += static_cast<int>(event.tokens.size());
      result_.output_tokens += static_cast<double>(event.tokens.size());
      sample_.output_tokens += static_cast<double>(event.tokens.size());
    }
    if (event.finish) End(index, false);
  }
}

void CapacityWorld::StartSteps() {
  // A worker joins first, then copies run.
  const bool copying = pending_ && now_ < pending_->ready && now_ >= pending_->ready - pending_->copy_s;
  for (Engine& engine : engines_) {
    if (engine.instance->Stepping() || now_ < engine.stopped_until) continue;
    // Copies of a resize take memory bandwidth from the steps beside them; two engines on the same devices
    // take turns.
    double slowdown = copying ? SlowdownOfCopies(input_.cluster) : 1;
    if (SharesDevices(input_.strategy) && Stepping()) slowdown *= 2;
    std::vector<RequestId> failed;
    if (engine.instance->StartStep(now_, slowdown, failed))
      policy_.Stepped(engine.instance->last_shape(), engine.instance->last_seconds());
    for (const RequestId request : failed) {
      if (states_[request.value].first < 0) waiting_tokens_ -= input_.requests[request.value].prompt_tokens;
      End(request.value, true);
    }
  }
}

void CapacityWorld::HandOver(RequestId request, Instance& from) {
  core::GenerationRequest again = from.TakeOut(request);
  Instance& to = *Least().instance;
  states_[request.value].owner = &to;
  if (!to.Add(std::move(again), now_)) End(request.value, true);
}

void CapacityWorld::StopIntake(Engine& engine) {
  engine.accepts = false;
  Instance& from = *engine.instance;
  for (std::size_t i = 0; i < next_; ++i)
    if (states_[i].owner == &from && !from.Running(RequestId(i))) HandOver(RequestId(i), from);
}

// ---------------------------------------------------------------- sizes

core::SchedulerStats CapacityWorld::Stats() const {
  core::SchedulerStats sum;
  for (const Engine& engine : engines_) {
    const core::SchedulerStats one = engine.instance->Stats();
    sum.running += one.running;
    sum.waiting += one.waiting;
  }
  return sum;
}

void CapacityWorld::Sample(const core::SchedulerStats& stats) {
  if (!result_.samples.empty() && now_ - result_.samples.back().at_s < 1) return;
  sample_.at_s = now_;
  sample_.devices = Paid();
  sample_.waiting = stats.waiting;
  sample_.running = stats.running;
  sample_.attainment = policy_.SeenAttainment(Ns(now_));
  result_.samples.push_back(sample_);
  sample_ = {};
}

Status CapacityWorld::Tick() {
  const bool resizing = pending_ != nullptr || Drains();
  if (!resizing && next_resize_ < input_.resizes.size() && input_.resizes[next_resize_].at_s <= now_) {
    core::Decision asked{.at = Ns(now_), .from = Size(), .to = input_.resizes[next_resize_++].to};
    asked.code = core::DecisionCode::kManual;
    asked.reason = "asked for by the scenario";
    EM_RETURN_IF_ERROR(Begin(std::move(asked)));
  }
  if (now_ < next_tick_) return {};
  const core::SchedulerStats stats = Stats();
  core::Decision decision = policy_.Tick(
      Ns(now_), {.devices = Size(),
                 .resizing = pending_ != nullptr || Drains(),
                 .running = stats.running,
                 .waiting = stats.waiting,
                 .waiting_prompt_tokens = stats.waiting == 0 ? 0 : std::max(0.0, waiting_tokens_)});
  Sample(stats);
  next_tick_ = (std::floor(now_ / kTick) + 1) * kTick;
  return decision.apply ? Begin(std::move(decision)) : Status{};
}

Status CapacityWorld::Begin(core::Decision decision) {
  const int from = Size();
  int to = decision.to;
  if (input_.strategy == ResizeStrategy::kHorizontal) {
    to = std::min((to + replica_ - 1) / replica_, input_.cluster.devices / replica_) * replica_;
    if (decision.to < from && to == from) return {};
  }
  // Beside the present size only so many devices are left.
  if (input_.strategy == ResizeStrategy::kExtravagant) to = std::min(to, input_.cluster.devices - from);
  if (to == from || to < std::min(from, least_) || (decision.to > from && to < from)) return {};
  const std::pair key(from, to);
  if (!resize_cost_.contains(key)) {
    EM_ASSIGN_OR_RETURN(const ResizeCost cost,
                        CostOfResize(input_.cluster, input_.model, input_.strategy, from, to, replica_));
    resize_cost_[key] = cost;
  }
  const ResizeCost& cost = resize_cost_[key];
  pending_ = std::make_unique<Pending>(Pending{to, now_, now_ + cost.latency_s, cost.copy_s});
  decision.to = to;
  result_.resizes.push_back({std::move(decision), pending_->ready, -1});
  if (input_.strategy == ResizeStrategy::kColdRestart) Restart(engines_.front(), cost.latency_s);
  return {};
}

void CapacityWorld::Advance() {
  std::erase_if(engines_, [](const Engine& one) { return !one.accepts && one.instance->Idle(); });
  if (!pending_ || now_ < pending_->ready) return;
  Instance& present = *engines_.front().instance;
  switch (input_.strategy) {
    case ResizeStrategy::kDrain:
    case ResizeStrategy::kElasticPaper:
      present.HoldIntake(true);  // nothing new starts until those running have ended
      if (present.Started()) return;
      [[fallthrough]];
    case ResizeStrategy::kElastic:
    case ResizeStrategy::kColdRestart:
      if (present.Stepping()) return;
      present.Resize(pending_->to);
      present.HoldIntake(false);
      break;
    case ResizeStrategy::kExtravagant:
    case ResizeStrategy::kColocated:
    case ResizeStrategy::kElasticPaperOverlap:
      AddEngine(pending_->to);
      StopIntake(engines_.front());
      break;
    case ResizeStrategy::kHorizontal:
      for (int size = Size(); size < pending_->to; size += replica_) AddEngine(replica_);
      for (std::size_t i = engines_.size(); i-- > 1 && Size() > pending_->to;) StopIntake(engines_[i]);
      break;
  }
  Finish();
}

void CapacityWorld::Finish() {
  CapacityResize& resize = result_.resizes.back();
  resize.done_s = now_;
  const double seconds = now_ - pending_->start;
  policy_.Resized({.from = resize.decision.from,
                   .to = pending_->to,
                   .seconds = seconds,
                   .stopped_s = StoppedSeconds(input_.cluster, input_.strategy, seconds, pending_->copy_s)});
  pending_.reset();
}

// ---------------------------------------------------------------- faults

void CapacityWorld::Restart(Engine& engine, double seconds) {
  engine.instance->AbandonStep();
  engine.instance->ForgetKv();
  engine.stopped_until = std::max(engine.stopped_until, now_ + seconds);
}

// Its sequences begin again from their tokens, its experts come from the checkpoint: to a spare device, else
// to those that are left.
void CapacityWorld::LoseDevice(Engine& engine, int device) {
  Instance& instance = *engine.instance;
  for (const RequestId request : instance.LastOn(device))
    if (instance.Knows(request)) HandOver(request, instance);
  const double share = input_.model.AllExpertBytes() / instance.devices();
  const bool spare = input_.cluster.devices > Paid();
  const int takers = spare ? 1 : std::max(1, instance.devices() - 1);
  const double bytes = share / takers + (spare ? static_cast<double>(input_.model.shared_bytes) : 0);
  engine.stopped_until =
      std::max(engine.stopped_until, now_ + input_.cluster.attach_s + bytes / input_.cluster.host_bytes_s);
  if (!spare && instance.devices() > least_) instance.Resize(instance.devices() - 1);
}

void CapacityWorld::Strike() {
  for (; next_fault_ < input_.faults.size() && input_.faults[next_fault_].at_s <= now_; ++next_fault_) {
    ++result_.faults;
    Engine& engine = engines_[next_fault_ % engines_.size()];
    const int devices = engine.instance->devices();
    if (!Ours(input_.strategy)) {  // an engine is one process group: all of it starts anew
      Restart(engine, StartSeconds(input_.cluster, input_.model, devices));
      continue;
    }
    engine.instance->AbandonStep();
    if (input_.faults[next_fault_].kind == FaultKind::kWorker)
      engine.stopped_until = std::max(engine.stopped_until, now_ + input_.cluster.attach_s);
    else
      LoseDevice(engine, static_cast<int>(next_fault_) % devices);
  }
}

}  // namespace elasticmoe::sim
