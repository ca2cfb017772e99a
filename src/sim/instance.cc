#include "sim/instance.h"

#include <algorithm>

namespace elasticmoe::sim {
namespace {

constexpr int kBlockTokens = 16;
const DomainId kDomain(0);

TimeNs Ns(double seconds) {
  return static_cast<TimeNs>(seconds * 1e9);
}

}  // namespace

Instance::Instance(const core::StepCost& cost, const core::ServingShape& shape, const EngineLimits& limits,
                   int devices)
    : cost_(cost),
      serving_(shape),
      limits_(limits),
      scheduler_(std::make_unique<core::Scheduler>(
          core::SchedulerOptions{.vocab = 2,
                                 .max_model_len = 1 << 20,
                                 .block_tokens = kBlockTokens,
                                 .max_running = limits.max_running,
                                 .max_waiting = std::numeric_limits<int>::max() / 2,
                                 .max_step_rows = limits.max_step_rows,
                                 .max_chunk_rows = limits.max_step_rows,
                                 .prefix_cache = false})) {
  SetDevices(devices);
}

void Instance::SetDevices(int devices) {
  // Devices that leave hand their sequences over before they are left out.
  std::vector<core::SchedulerDevice> list;
  for (int i = 0; i < std::max(devices, devices_); ++i)
    list.push_back({DeviceId(i), kDomain, 1.0, i < devices});
  scheduler_->SetDevices(list);
  if (devices < devices_) scheduler_->Rebalance();
  list.resize(static_cast<std::size_t>(devices));
  scheduler_->SetDevices(list);
  const double room = limits_.kv_tokens_fixed + limits_.kv_tokens_per_device * devices;
  const double tokens = std::min(room, limits_.kv_tokens_most);
  scheduler_->SetBlocks(kDomain, static_cast<std::uint32_t>(std::clamp(tokens / kBlockTokens, 1.0, 4e8)));
  if (devices > devices_ && devices_ > 0) scheduler_->Rebalance();
  devices_ = devices;
}

void Instance::Resize(int devices) {
  SetDevices(devices);
}

Status Instance::Add(core::GenerationRequest request, double now_s) {
  return scheduler_->Add(std::move(request), Ns(now_s));
}

core::GenerationRequest Instance::TakeOut(RequestId request) {
  core::GenerationRequest out = scheduler_->Request(request);
  const auto tokens = scheduler_->Tokens(request);
  out.max_tokens -= scheduler_->GeneratedCount(request);
  out.prompt.assign(tokens.begin(), tokens.end());
  std::vector<core::TokenEvent> gone;
  scheduler_->Cancel(request, gone);
  return out;
}

bool Instance::StartStep(double now_s, double slowdown, std::vector<RequestId>& failed) {
  const bool full = limits_.max_running_per_device > 0 &&
                    scheduler_->Stats().running >= limits_.max_running_per_device * devices_;
  scheduler_->HoldIntake(hold_ || full);
  core::StepPlan plan = scheduler_->Plan(Ns(now_s));
  for (const core::TokenEvent& event : plan.failed) failed.push_back(event.request);
  if (plan.Empty()) return false;
  plan_ = std::move(plan);
  shape_ = core::ShapeOf(plan_, serving_, devices_);
  seconds_ = cost_.Seconds(shape_);
  step_end_ = now_s + std::max(1e-9, seconds_ * slowdown);
  return true;
}

void Instance::FinishStep(double now_s, std::vector<core::TokenEvent>& events) {
  core::StepResult done{.step = plan_.step};
  for (const core::DevicePlan& device : plan_.devices)
    for (const core::SequenceStep& one : device.sequences) {
      core::SequenceResult sampled{.request = one.request};
      sampled.sampled.token = 1;
      done.sequences.push_back(std::move(sampled));
    }
  step_end_ = kNever;
  scheduler_->Complete(done, Ns(now_s), events);
}

void Instance::AbandonStep() {
  if (!Stepping()) return;
  step_end_ = kNever;
  scheduler_->AbandonStep();
}

void Instance::ForgetKv() {
  scheduler_->ForgetKv(kDomain);
}

std::vector<RequestId> Instance::LastOn(int device) const {
  std::vector<RequestId> out;
  for (const core::DevicePlan& one : plan_.devices)
    if (one.device == DeviceId(device))
      for (const core::SequenceStep& step : one.sequences) out.push_back(step.request);
  return out;
}

}  // namespace elasticmoe::sim
