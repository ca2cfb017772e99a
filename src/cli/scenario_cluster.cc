// The cluster of a scenario: a profile by name or from a file, and numbers that replace its own.
#include <array>
#include <utility>

#include "base/file.h"
#include "cli/scenario.h"
#include "cli/scenario_reader.h"

namespace elasticmoe::cli {
namespace {

using sim::ClusterProfile;

struct Field {
  const char* key;
  double ClusterProfile::*value;
  bool positive;  // else it may be zero
};
constexpr std::array kFields = {
    Field{"memory_bytes", &ClusterProfile::memory_bytes, true},
    Field{"kv_memory_bytes", &ClusterProfile::kv_memory_bytes, false},
    Field{"flops", &ClusterProfile::flops, true},
    Field{"memory_bytes_s", &ClusterProfile::memory_bytes_s, true},
    Field{"link_bytes_s", &ClusterProfile::link_bytes_s, true},
    Field{"node_bytes_s", &ClusterProfile::node_bytes_s, false},
    Field{"disk_bytes_s", &ClusterProfile::disk_bytes_s, true},
    Field{"host_bytes_s", &ClusterProfile::host_bytes_s, true},
    Field{"step_s", &ClusterProfile::step_s, false},
    Field{"peer_s", &ClusterProfile::peer_s, false},
    Field{"token_s", &ClusterProfile::token_s, false},
    Field{"request_s", &ClusterProfile::request_s, false},
    Field{"idle_watts", &ClusterProfile::idle_watts, false},
    Field{"busy_watts", &ClusterProfile::busy_watts, false},
    Field{"attach_s", &ClusterProfile::attach_s, false},
    Field{"boot_s", &ClusterProfile::boot_s, false},
    Field{"boot_device_s", &ClusterProfile::boot_device_s, false},
    Field{"warmup_layer_s", &ClusterProfile::warmup_layer_s, false},
    Field{"kv_init_s", &ClusterProfile::kv_init_s, false},
    Field{"allocator_s", &ClusterProfile::allocator_s, false},
    Field{"allocator_share", &ClusterProfile::allocator_share, false},
};

struct StepField {
  const char* key;
  double core::StepCost::*value;
};
constexpr std::array kStepFields = {StepField{"fixed_s", &core::StepCost::fixed_s},
                                    StepField{"row_s", &core::StepCost::row_s},
                                    StepField{"expert_row_s", &core::StepCost::expert_row_s},
                                    StepField{"expert_s", &core::StepCost::expert_s},
                                    StepField{"kv_byte_s", &core::StepCost::kv_byte_s},
                                    StepField{"token_s", &core::StepCost::token_s},
                                    StepField{"peer_s", &core::StepCost::peer_s}};

Expected<ClusterProfile> Read(const Json& json, const std::filesystem::path& base, int depth) {
  EM_ASSIGN_OR_RETURN(
      const ScenarioReader reader,
      ScenarioReader::Make(
          json, "cluster",
          {"profile",         "notes",           "devices",        "tensor_parallel", "devices_per_node",
           "memory_bytes",    "kv_memory_bytes", "flops",          "memory_bytes_s",  "link_bytes_s",
           "node_bytes_s",    "disk_bytes_s",    "host_bytes_s",   "step_s",          "peer_s",
           "token_s",         "request_s",       "idle_watts",     "busy_watts",      "attach_s",
           "boot_s",          "boot_device_s",   "warmup_layer_s", "kv_init_s",       "allocator_s",
           "allocator_share", "measured"}));
  EM_ASSIGN_OR_RETURN(const std::string name, reader.Text("profile"));
  ClusterProfile out;
  if (name.ends_with(".json")) {
    if (depth > 3)
      return Fail(ErrorCode::kInvalidArgument, "reading the cluster: profile={} names itself", name);
    const std::filesystem::path file = base / name;
    EM_ASSIGN_OR_RETURN(const std::string text, ReadFile(file));
    auto inner = ParseJson(text);
    if (!inner) return Within("reading " + file.string(), inner.error());
    auto profile = Read(*inner, file.parent_path(), depth + 1);
    if (!profile) return Within("reading " + file.string(), profile.error());
    out = std::move(*profile);
    out.name = file.stem().string();
  } else {
    EM_ASSIGN_OR_RETURN(out, sim::ProfileOf(name));
  }
  EM_ASSIGN_OR_RETURN(out.devices, reader.Int("devices", 1, 4096, out.devices));
  EM_ASSIGN_OR_RETURN(out.tensor_parallel, reader.Int("tensor_parallel", 1, 64, out.tensor_parallel));
  EM_ASSIGN_OR_RETURN(out.devices_per_node, reader.Int("devices_per_node", 0, 4096, out.devices_per_node));
  if (out.devices % out.tensor_parallel != 0)
    return Fail(ErrorCode::kInvalidArgument,
                "reading the cluster: devices={} is no multiple of tensor_parallel={}", out.devices,
                out.tensor_parallel);
  for (const Field& field : kFields) {
    EM_ASSIGN_OR_RETURN(out.*field.value,
                        reader.Number(field.key, field.positive ? 1e-9 : 0, 1e20, out.*field.value));
  }
  if (reader.Has("measured")) {
    EM_ASSIGN_OR_RETURN(const ScenarioReader measured,
                        ScenarioReader::Make(reader["measured"], "cluster.measured",
                                             {"model", "fixed_s", "row_s", "expert_row_s", "expert_s",
                                              "kv_byte_s", "token_s", "peer_s"}));
    core::StepCost cost;
    for (const StepField& field : kStepFields) {
      EM_ASSIGN_OR_RETURN(cost.*field.value, measured.Number(field.key, 0, 1e6));
    }
    out.measured = cost;
  }
  return out;
}

}  // namespace

Expected<ClusterProfile> ReadCluster(const Json& json, const std::filesystem::path& base) {
  return Read(json, base, 0);
}

Json ProfileJson(const ClusterProfile& profile) {
  Json out = {{"profile", profile.name}, {"devices", profile.devices}};
  if (profile.devices_per_node > 0) out["devices_per_node"] = profile.devices_per_node;
  for (const Field& field : kFields) out[field.key] = profile.*field.value;
  if (profile.measured) {
    Json measured = Json::object();
    for (const StepField& field : kStepFields) measured[field.key] = (*profile.measured).*field.value;
    out["measured"] = std::move(measured);
  }
  return out;
}

}  // namespace elasticmoe::cli
