#include "cli/scenario.h"

#include <cmath>
#include <initializer_list>

#include "base/file.h"
#include "base/json.h"
#include "cli/load_plan.h"
#include "cli/trace_csv.h"
#include "model/family.h"

namespace elasticmoe::cli {
namespace {

// An object whose keys are all known, with where it stands for messages.
class Reader {
 public:
  static Expected<Reader> Make(const Json& json, std::string where,
                               std::initializer_list<std::string_view> keys) {
    if (!json.is_object())
      return Fail(ErrorCode::kInvalidArgument, "reading the scenario: {} is no object", where);
    for (const auto& [key, value] : json.items()) {
      bool known = false;
      std::string all;
      for (const std::string_view one : keys) {
        known = known || one == key;
        all += fmt::format("{}{}", all.empty() ? "" : ", ", one);
      }
      if (!known)
        return Fail(ErrorCode::kInvalidArgument, "reading the scenario: unknown key {}.{} (one of {})", where,
                    key, all);
    }
    return Reader(json, std::move(where));
  }

  bool Has(const char* key) const { return json_->contains(key); }
  const Json& operator[](const char* key) const { return json_->at(key); }

  Expected<double> Number(const char* key, double low, double high,
                          std::optional<double> fallback = {}) const {
    if (!Has(key)) {
      if (fallback) return *fallback;
      return Fail(ErrorCode::kInvalidArgument, "reading the scenario: {}.{} is missing", where_, key);
    }
    const Json& value = json_->at(key);
    if (!value.is_number() || value.get<double>() < low || value.get<double>() > high)
      return Fail(ErrorCode::kInvalidArgument, "reading the scenario: {}.{}={} (limit={}..{})", where_, key,
                  DumpJson(value), low, high);
    return value.get<double>();
  }
  Expected<int> Int(const char* key, int low, int high, std::optional<int> fallback = {}) const {
    EM_ASSIGN_OR_RETURN(const double value, Number(key, low, high, fallback));
    if (value != std::floor(value))
      return Fail(ErrorCode::kInvalidArgument, "reading the scenario: {}.{}={} (whole numbers only)", where_,
                  key, value);
    return static_cast<int>(value);
  }
  Expected<std::string> Text(const char* key, std::optional<std::string> fallback = {}) const {
    if (!Has(key) && fallback) return *fallback;
    if (!Has(key) || !json_->at(key).is_string())
      return Fail(ErrorCode::kInvalidArgument, "reading the scenario: {}.{} must be a string", where_, key);
    return json_->at(key).get<std::string>();
  }

 private:
  Reader(const Json& json, std::string where) : json_(&json), where_(std::move(where)) {}
  const Json* json_;
  std::string where_;
};

Expected<sim::ClusterProfile> ReadCluster(const Json& json) {
  EM_ASSIGN_OR_RETURN(
      const Reader reader,
      Reader::Make(json, "cluster",
                   {"profile", "devices", "memory_bytes", "flops", "memory_bytes_s", "link_bytes_s",
                    "disk_bytes_s", "step_s", "peer_s", "attach_s", "boot_s", "idle_watts", "busy_watts"}));
  EM_ASSIGN_OR_RETURN(const std::string name, reader.Text("profile"));
  EM_ASSIGN_OR_RETURN(sim::ClusterProfile out, sim::ProfileOf(name));
  EM_ASSIGN_OR_RETURN(out.devices, reader.Int("devices", 1, 4096, out.devices));
  const std::initializer_list<std::pair<const char*, double*>> positive = {
      {"memory_bytes", &out.memory_bytes},
      {"flops", &out.flops},
      {"memory_bytes_s", &out.memory_bytes_s},
      {"link_bytes_s", &out.link_bytes_s},
      {"disk_bytes_s", &out.disk_bytes_s}};
  for (const auto& [key, field] : positive) {
    EM_ASSIGN_OR_RETURN(*field, reader.Number(key, 1, 1e20, *field));
  }
  const std::initializer_list<std::pair<const char*, double*>> any = {
      {"step_s", &out.step_s}, {"peer_s", &out.peer_s},         {"attach_s", &out.attach_s},
      {"boot_s", &out.boot_s}, {"idle_watts", &out.idle_watts}, {"busy_watts", &out.busy_watts}};
  for (const auto& [key, field] : any) {
    EM_ASSIGN_OR_RETURN(*field, reader.Number(key, 0, 1e6, *field));
  }
  return out;
}

Expected<core::ModelSpec> ReadModel(const Json& json, const std::filesystem::path& base) {
  Json config = json;
  if (json.is_string()) {
    EM_ASSIGN_OR_RETURN(const std::string text, ReadFile(base / json.get<std::string>()));
    EM_ASSIGN_OR_RETURN(config, ParseJson(text));
  }
  EM_ASSIGN_OR_RETURN(const model::Family* family, model::FamilyOf(config));
  return family->Spec(config);
}

Expected<std::vector<sim::SimRequest>> ReadWorkload(const Json& json, const std::filesystem::path& base) {
  EM_ASSIGN_OR_RETURN(const Reader reader, Reader::Make(json, "workload",
                                                        {"kind", "path", "speed", "schedule", "prompt_tokens",
                                                         "output_tokens", "seed"}));
  EM_ASSIGN_OR_RETURN(const std::string kind, reader.Text("kind"));
  std::vector<sim::SimRequest> out;
  if (kind == "trace") {
    EM_ASSIGN_OR_RETURN(const std::string path, reader.Text("path"));
    EM_ASSIGN_OR_RETURN(const double speed, reader.Number("speed", 1e-3, 1e6, 1));
    EM_ASSIGN_OR_RETURN(const std::string text, ReadFile(base / path));
    auto rows = ParseTraceCsv(text);
    if (!rows) return Within("reading " + path, rows.error());
    for (const TraceRow& row : *rows)
      out.push_back({static_cast<TimeNs>(static_cast<double>(row.at_ns) / speed), row.context_tokens,
                     row.generated_tokens});
    return out;
  }
  if (kind != "poisson")
    return Fail(ErrorCode::kInvalidArgument, "reading the scenario: workload.kind={} (one of poisson, trace)",
                kind);
  EM_ASSIGN_OR_RETURN(const std::string schedule_text, reader.Text("schedule"));
  auto schedule = ParseRateSchedule(schedule_text);
  if (!schedule) return Within("reading workload.schedule", schedule.error());
  LoadShape shape;
  const auto range = [&](const char* key, TokenRange* to) -> Status {
    EM_ASSIGN_OR_RETURN(const std::string text, reader.Text(key));
    auto parsed = ParseTokenRange(text);
    if (!parsed) return Within(fmt::format("reading workload.{}", key), parsed.error());
    *to = *parsed;
    return {};
  };
  EM_RETURN_IF_ERROR(range("prompt_tokens", &shape.input));
  EM_RETURN_IF_ERROR(range("output_tokens", &shape.output));
  EM_ASSIGN_OR_RETURN(const int seed, reader.Int("seed", 0, 1 << 30, 1));
  shape.seed = static_cast<std::uint64_t>(seed);
  Arrivals arrivals = Arrivals::Poisson(*schedule, shape.seed);
  while (const auto at = arrivals.Next()) {
    const RequestLength length = LengthOf(shape, out.size());
    out.push_back({*at, length.input_tokens, length.output_tokens});
  }
  return out;
}

Expected<ScenarioRun> ReadRun(const Json& json, const sim::CapacityInput& common, std::size_t index) {
  const std::string where = fmt::format("runs[{}]", index);
  EM_ASSIGN_OR_RETURN(const Reader reader,
                      Reader::Make(json, where, {"name", "policy", "strategy", "devices", "threshold"}));
  ScenarioRun run{.input = common};
  EM_ASSIGN_OR_RETURN(run.name, reader.Text("name", where));
  EM_ASSIGN_OR_RETURN(const std::string policy, reader.Text("policy", "slo"));
  EM_ASSIGN_OR_RETURN(run.input.policy.kind, core::ParsePolicy(policy));
  EM_ASSIGN_OR_RETURN(const std::string strategy, reader.Text("strategy", "elastic"));
  EM_ASSIGN_OR_RETURN(run.input.strategy, sim::ParseStrategy(strategy));
  EM_ASSIGN_OR_RETURN(run.input.start_devices, reader.Int("devices", 1, common.cluster.devices,
                                                          std::max(1, common.policy.min_devices)));
  EM_ASSIGN_OR_RETURN(run.input.policy.threshold, reader.Number("threshold", 1e-6, 1, 0.9));
  return run;
}

}  // namespace

Expected<Scenario> ReadScenario(const std::filesystem::path& file) {
  EM_ASSIGN_OR_RETURN(const std::string text, ReadFile(file));
  auto json = ParseJson(text);
  if (!json) return Within("reading " + file.string(), json.error());
  const std::filesystem::path base = file.parent_path();
  EM_ASSIGN_OR_RETURN(const Reader reader,
                      Reader::Make(*json, "scenario",
                                   {"name", "cluster", "model", "workload", "slo", "min_devices",
                                    "max_devices", "step_devices", "runs"}));
  for (const char* key : {"cluster", "model", "workload", "slo", "runs"})
    if (!reader.Has(key))
      return Fail(ErrorCode::kInvalidArgument, "reading {}: {} is missing", file.string(), key);
  Scenario scenario;
  EM_ASSIGN_OR_RETURN(scenario.name, reader.Text("name", file.stem().string()));
  sim::CapacityInput common;
  EM_ASSIGN_OR_RETURN(common.cluster, ReadCluster(reader["cluster"]));
  EM_ASSIGN_OR_RETURN(common.model, ReadModel(reader["model"], base));
  EM_ASSIGN_OR_RETURN(common.requests, ReadWorkload(reader["workload"], base));
  EM_ASSIGN_OR_RETURN(const Reader slo,
                      Reader::Make(reader["slo"], "slo", {"ttft_s", "tpot_s", "attainment"}));
  EM_ASSIGN_OR_RETURN(common.policy.slo.ttft_s, slo.Number("ttft_s", 1e-6, 1e6));
  EM_ASSIGN_OR_RETURN(common.policy.slo.tpot_s, slo.Number("tpot_s", 1e-6, 1e6));
  EM_ASSIGN_OR_RETURN(common.policy.slo.attainment, slo.Number("attainment", 1e-6, 1, 0.95));
  EM_ASSIGN_OR_RETURN(common.policy.min_devices, reader.Int("min_devices", 1, common.cluster.devices, 1));
  EM_ASSIGN_OR_RETURN(common.policy.max_devices,
                      reader.Int("max_devices", 1, common.cluster.devices, common.cluster.devices));
  EM_ASSIGN_OR_RETURN(common.policy.step_devices, reader.Int("step_devices", 1, common.cluster.devices, 1));
  if (!reader["runs"].is_array() || reader["runs"].empty())
    return Fail(ErrorCode::kInvalidArgument, "reading {}: runs must be a list with a run", file.string());
  for (const Json& one : reader["runs"]) {
    EM_ASSIGN_OR_RETURN(ScenarioRun run, ReadRun(one, common, scenario.runs.size()));
    scenario.runs.push_back(std::move(run));
  }
  return scenario;
}

}  // namespace elasticmoe::cli
