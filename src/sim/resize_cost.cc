#include "sim/resize_cost.h"

#include <algorithm>
#include <array>
#include <set>

#include "core/placement/planner.h"

namespace elasticmoe::sim {
namespace {

constexpr std::array kStrategies = {ResizeStrategy::kElastic,      ResizeStrategy::kDrain,
                                    ResizeStrategy::kElasticPaper, ResizeStrategy::kElasticPaperOverlap,
                                    ResizeStrategy::kColdRestart,  ResizeStrategy::kExtravagant,
                                    ResizeStrategy::kColocated,    ResizeStrategy::kHorizontal};

std::vector<DeviceId> Devices(int count) {
  std::vector<DeviceId> out;
  for (int i = 0; i < count; ++i) out.emplace_back(i);
  return out;
}

int NodeOf(const ClusterProfile& cluster, int device) {
  return cluster.devices_per_node > 0 ? device / cluster.devices_per_node : 0;
}

struct Copies {
  double seconds = 0;       // peer to peer, links side by side
  double host_seconds = 0;  // the same bytes from the host instead
  double bytes = 0;
  double largest_stage_bytes = 0;  // of experts: held twice until the commit
  double expert_bytes = 0;
};

// The planner's own plan over links: a device takes at its link's pace, a node at its own.
Expected<Copies> PlannedCopies(const ClusterProfile& cluster, const ModelShape& model, int from, int to) {
  core::PlanInput plan;
  plan.facts.layers = model.moe_layers;
  plan.facts.experts = model.experts;
  plan.facts.expert_bytes = model.expert_bytes;
  plan.facts.shared_bytes = model.shared_bytes;
  for (int i = 0; i < std::max(from, to); ++i)
    plan.facts.devices.push_back({.device = DeviceId(i), .domain = DomainId(i)});
  plan.target = Devices(from);
  EM_ASSIGN_OR_RETURN(const core::ResizePlan first, core::PlanResize(plan));
  plan.present = first.Final();
  plan.target = Devices(to);
  EM_ASSIGN_OR_RETURN(const core::ResizePlan resize, core::PlanResize(plan));
  const auto widest = static_cast<std::size_t>(std::max(from, to));
  std::vector<double> device(widest, 0.0), node(widest, 0.0);
  const auto take = [&](int source, int target, double bytes) {
    device[static_cast<std::size_t>(target)] += bytes;
    if (NodeOf(cluster, source) != NodeOf(cluster, target))
      node[static_cast<std::size_t>(NodeOf(cluster, target))] += bytes;
  };
  // An arriving device takes the shared weights from its own node where a member is there, its like before
  // it included (a chain).
  std::set<int> nodes;
  for (int i = 0; i < from; ++i) nodes.insert(NodeOf(cluster, i));
  Copies out;
  for (int i = from; i < to; ++i) {
    const bool near = !nodes.insert(NodeOf(cluster, i)).second;
    take(near ? i : 0, i, static_cast<double>(model.shared_bytes));
    out.bytes += static_cast<double>(model.shared_bytes);
  }
  for (const core::PlanStage& stage : resize.stages) {
    double bytes = 0;
    for (const core::ExpertMove& move : stage.moves) {
      take(move.from.value, move.to.value, static_cast<double>(move.bytes));
      bytes += static_cast<double>(move.bytes);
    }
    out.largest_stage_bytes = std::max(out.largest_stage_bytes, bytes);
    out.expert_bytes += bytes;
  }
  out.bytes += out.expert_bytes;
  out.seconds = std::ranges::max(device) / cluster.link_bytes_s;
  if (cluster.node_bytes_s > 0)
    out.seconds = std::max(out.seconds, std::ranges::max(node) / cluster.node_bytes_s);
  out.host_seconds =
      std::max(std::ranges::max(device) / cluster.host_bytes_s, out.bytes / cluster.disk_bytes_s);
  return out;
}

}  // namespace

std::string_view ToString(ResizeStrategy strategy) {
  switch (strategy) {
    case ResizeStrategy::kElastic:
      return "elastic";
    case ResizeStrategy::kDrain:
      return "drain";
    case ResizeStrategy::kElasticPaper:
      return "elastic-paper";
    case ResizeStrategy::kElasticPaperOverlap:
      return "elastic-paper-overlap";
    case ResizeStrategy::kColdRestart:
      return "cold-restart";
    case ResizeStrategy::kExtravagant:
      return "extravagant";
    case ResizeStrategy::kColocated:
      return "colocated";
    case ResizeStrategy::kHorizontal:
      return "horizontal";
  }
  return "?";
}

Expected<ResizeStrategy> ParseStrategy(std::string_view name) {
  std::string names;
  for (const auto one : kStrategies) {
    if (name == ToString(one)) return one;
    names += fmt::format("{}{}", names.empty() ? "" : ", ", ToString(one));
  }
  return Fail(ErrorCode::kInvalidArgument, "reading the strategy: strategy={} (one of {})", name, names);
}

double BootSeconds(const ClusterProfile& cluster, int devices) {
  const int at_once = cluster.devices_per_node > 0 ? std::min(devices, cluster.devices_per_node) : devices;
  return cluster.boot_s + cluster.boot_device_s * at_once;
}

double LoadSeconds(const ClusterProfile& cluster, const ModelShape& model, int devices) {
  const double one = static_cast<double>(model.shared_bytes) + model.AllExpertBytes() / devices;
  return std::max(one / cluster.host_bytes_s, model.AllBytes() / cluster.disk_bytes_s);
}

double StartSeconds(const ClusterProfile& cluster, const ModelShape& model, int devices) {
  return BootSeconds(cluster, devices) + LoadSeconds(cluster, model, devices) +
         cluster.warmup_layer_s * model.layers + cluster.kv_init_s + cluster.allocator_s;
}

double SlowdownOfCopies(const ClusterProfile& cluster) {
  return 1 + cluster.link_bytes_s / cluster.memory_bytes_s;
}

double StoppedSeconds(const ClusterProfile& cluster, ResizeStrategy strategy, double seconds, double copy_s) {
  if (strategy != ResizeStrategy::kElastic) return seconds;
  return copy_s * (1 - 1 / SlowdownOfCopies(cluster));
}

Expected<ResizeCost> CostOfResize(const ClusterProfile& cluster, const ModelShape& model,
                                  ResizeStrategy strategy, int from, int to, int replica,
                                  const Without& without) {
  ResizeCost out;
  if (from == to) return out;
  const int least = LeastDevices(cluster, model);
  if (least == 0 || std::min(from, to) < least)
    return Fail(
        ErrorCode::kResourceExhausted,
        "resizing from {} to {} devices: weights={:.1f} GB (limit={:.1f} GB a device, so {} devices at "
        "least); take larger sizes",
        from, to, model.AllBytes() * 1e-9, cluster.memory_bytes * 1e-9, least);
  const double shared = static_cast<double>(model.shared_bytes), experts = model.AllExpertBytes();
  const int widest = std::max(from, to);
  const auto kv = [&](int devices) {
    const double left = cluster.memory_bytes * 0.95 - shared - experts / std::max(1, devices);
    return devices * (cluster.kv_memory_bytes > 0 ? cluster.kv_memory_bytes : std::max(0.0, left));
  };
  const auto whole = [&](int devices) { return devices * shared + experts + kv(devices); };
  const auto starts = [&](int devices) {
    out.boot_s = BootSeconds(cluster, devices);
    out.load_s = LoadSeconds(cluster, model, devices);
    out.warmup_s = cluster.warmup_layer_s * model.layers;
    out.latency_s = StartSeconds(cluster, model, devices);
  };
  switch (strategy) {
    case ResizeStrategy::kElastic:
    case ResizeStrategy::kDrain: {
      EM_ASSIGN_OR_RETURN(const Copies copies, PlannedCopies(cluster, model, from, to));
      out.copy_s = copies.seconds;
      out.bytes_copied = copies.bytes;
      out.latency_s = (to > from ? cluster.attach_s : 0) + out.copy_s;
      out.peak_bytes = whole(widest) + copies.largest_stage_bytes;
      break;
    }
    case ResizeStrategy::kElasticPaper:
    case ResizeStrategy::kElasticPaperOverlap: {
      EM_ASSIGN_OR_RETURN(const Copies copies, PlannedCopies(cluster, model, from, to));
      out.peak_bytes =
          (whole(widest) + copies.expert_bytes) * (without.allocator ? 1 + cluster.allocator_share : 1.0);
      if (without.zero_copy) {
        starts(to);
        out.downtime_s = out.latency_s;
        break;
      }
      out.warmup_s = cluster.warmup_layer_s * model.layers;
      (without.peer_copies ? out.load_s : out.copy_s) =
          without.peer_copies ? copies.host_seconds : copies.seconds;
      out.bytes_copied = without.peer_copies ? 0 : copies.bytes;
      out.boot_s = without.standby ? BootSeconds(cluster, to) : 0;
      out.latency_s =
          out.warmup_s + out.copy_s + out.load_s + out.boot_s + (without.allocator ? cluster.allocator_s : 0);
      break;
    }
    case ResizeStrategy::kColdRestart:
      starts(to);
      out.downtime_s = out.latency_s;
      out.peak_bytes = whole(widest);
      break;
    case ResizeStrategy::kExtravagant:
      starts(to);
      out.peak_bytes = whole(from) + whole(to);
      break;
    case ResizeStrategy::kColocated:
      starts(to);
      out.peak_bytes = (from + to) * shared + 2 * experts + kv(widest);
      break;
    case ResizeStrategy::kHorizontal:
      if (to > from) starts(replica);
      out.peak_bytes = (widest + replica - 1) / std::max(1, replica) * whole(replica);
      break;
  }
  return out;
}

}  // namespace elasticmoe::sim
