// A set of engines as the autoscaler sees it: what it has come to, which sizes it can be asked for, and what
// it costs.
#include <algorithm>

#include "base/clock.h"
#include "core/placement/planner.h"
#include "runtime/coordinator/replica_set.h"

namespace elasticmoe::runtime {

Status ReplicaSet::ResizeTo(int devices, const std::string& strategy) {
  core::ResizeCommand command;
  command.count = devices;
  const auto primary = Primary();
  const bool asleep = primary && primary->engine->Asleep();
  command.strategy = devices == 0 || asleep ? "elastic" : strategy;  // to zero and back there is one way
  command.operation = fmt::format("autoscale-{:x}-{}", Now(), next_operation_++);
  EM_RETURN_IF_ERROR(StartResize(std::move(command)));
  Account();
  return {};
}

Expected<core::ResizeReport> ReplicaSet::StartRebalance(std::string operation) {
  core::ResizeCommand command;
  command.count = Devices();
  command.strategy = "rebalance";
  command.operation =
      operation.empty() ? fmt::format("rebalance-{:x}-{}", Now(), next_operation_++) : std::move(operation);
  return StartResize(std::move(command));
}

Status ReplicaSet::Rebalance() {
  EM_RETURN_IF_ERROR(StartRebalance());
  return {};
}

std::optional<core::BalanceOutlook> ReplicaSet::Balance() {
  const auto primary = Primary();
  if (!primary || Replicas() != 1 || primary->engine->Asleep()) return std::nullopt;
  core::PlanInput input;
  input.present = primary->engine->PlacementNow();
  input.target = input.present->members();
  input.facts = primary->engine->Facts(static_cast<int>(input.target.size()));
  input.facts.even_load = true;
  const auto plan = core::PlanResize(input);
  if (!plan || input.facts.load.empty()) return std::nullopt;
  core::BalanceOutlook outlook;
  outlook.now = core::Imbalance(*input.present, input.facts.load);
  outlook.planned = core::Imbalance(plan->Final(), input.facts.load);
  for (const double rows : input.facts.load)
    outlook.rows_per_expert += rows / static_cast<double>(input.facts.load.size());
  outlook.moves = plan->moves;
  outlook.bytes_copied = plan->bytes_copied;
  return outlook;
}

double ReplicaSet::ExpertImbalance() const {
  const auto primary = Primary();
  if (!primary) return 1;
  const core::Placement placement = primary->engine->PlacementNow();
  return core::Imbalance(placement,
                         primary->engine->Facts(static_cast<int>(placement.members().size())).load);
}

void ReplicaSet::WakeForRequests() {
  core::ResizeCommand command;
  command.count = 1;
  command.operation = fmt::format("wake-{:x}-{}", Now(), next_operation_++);
  // Refused where one runs: then its end looks for requests again.
  if (StartResize(std::move(command))) Account();
}

void ReplicaSet::Account() const {
  const auto running = RunningResize();
  std::size_t devices = 0;
  if (running) {
    const std::size_t from = running->from.size(), to = running->to.size();
    devices = running->strategy == "extravagant" ? from + to : std::max(from, to);
  } else {
    const std::scoped_lock lock(mutex_);
    for (const auto& [id, member] : members_) devices += member.replica->engine->Stats().devices.size();
  }
  cost_.SetDevices(Now(), static_cast<int>(devices));
}

ScalingSnapshot ReplicaSet::Snapshot() {
  const EngineStats stats = Stats();
  ScalingSnapshot snapshot;
  snapshot.state.devices = static_cast<int>(stats.devices.size());
  snapshot.state.resizing = stats.resizing;
  snapshot.state.running = stats.running;
  snapshot.state.waiting = stats.waiting;
  snapshot.state.waiting_prompt_tokens = stats.waiting == 0 ? 0 : log_.WaitingPromptTokens();
  snapshot.state.kv_usage = stats.kv_usage;
  snapshot.since = log_.Take();
  if (const TimeNs at = commanded_; at >= 0) snapshot.commanded = at;
  return snapshot;
}

core::ServingShape ReplicaSet::Shape() const {
  core::ServingShape shape;
  for (const core::LayerSpec& layer : spec_.layers) shape.moe_layers += layer.moe ? 1 : 0;
  shape.experts = spec_.moe.experts;
  shape.top_k = spec_.moe.top_k;
  shape.max_step_rows = options_.max_step_rows;
  shape.max_running = options_.max_running;
  if (const auto primary = Primary()) {
    shape.kv_token_bytes = primary->engine->KvTokenBytes();
    shape.kv_tokens_per_device = static_cast<double>(options_.kv_memory_bytes) / shape.kv_token_bytes;
  }
  return shape;
}

}  // namespace elasticmoe::runtime
