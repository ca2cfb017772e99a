#include "cli/scenario.h"

#include <algorithm>
#include <cmath>

#include "base/file.h"
#include "base/rng.h"
#include "cli/scenario_reader.h"
#include "model/family.h"

namespace elasticmoe::cli {
namespace {

Expected<core::ModelSpec> ReadModel(const Json& json, const std::filesystem::path& base) {
  Json config = json;
  if (json.is_string()) {
    std::filesystem::path file = base / json.get<std::string>();
    if (std::filesystem::is_directory(file)) file /= "config.json";
    EM_ASSIGN_OR_RETURN(const std::string text, ReadFile(file));
    auto parsed = ParseJson(text);
    if (!parsed) return Within("reading " + file.string(), parsed.error());
    config = std::move(*parsed);
  }
  EM_ASSIGN_OR_RETURN(const model::Family* family, model::FamilyOf(config));
  return family->Spec(config);
}

Status ReadLimits(const ScenarioReader& reader, sim::CapacityInput& out) {
  EM_ASSIGN_OR_RETURN(const ScenarioReader slo,
                      ScenarioReader::Make(reader["slo"], "slo", {"ttft_s", "tpot_s", "attainment"}));
  EM_ASSIGN_OR_RETURN(out.policy.slo.ttft_s, slo.Number("ttft_s", 1e-6, 1e6));
  EM_ASSIGN_OR_RETURN(out.policy.slo.tpot_s, slo.Number("tpot_s", 1e-6, 1e6));
  EM_ASSIGN_OR_RETURN(out.policy.slo.attainment, slo.Number("attainment", 1e-6, 1, 0.95));
  return {};
}

Status ReadEngine(const Json& json, sim::CapacityInput& out) {
  EM_ASSIGN_OR_RETURN(
      const ScenarioReader engine,
      ScenarioReader::Make(json, "engine", {"max_step_rows", "max_running", "max_running_per_device"}));
  EM_ASSIGN_OR_RETURN(out.max_step_rows, engine.Int("max_step_rows", 1, 1 << 20, out.max_step_rows));
  EM_ASSIGN_OR_RETURN(out.max_running, engine.Int("max_running", 1, 1 << 17, out.max_running));
  EM_ASSIGN_OR_RETURN(out.max_running_per_device, engine.Int("max_running_per_device", 0, 1 << 17, 0));
  return {};
}

Expected<sim::FaultKind> ParseFault(const std::string& name) {
  if (name == "worker") return sim::FaultKind::kWorker;
  if (name == "device") return sim::FaultKind::kDevice;
  return Fail(ErrorCode::kInvalidArgument, "reading the scenario: faults.kind={} (one of worker, device)",
              name);
}

// At a time, or by a rate until the last arrival.
Expected<std::vector<sim::SimFault>> ReadFaults(const ScenarioReader& scenario, double end_s) {
  std::vector<sim::SimFault> out;
  EM_ASSIGN_OR_RETURN(const std::vector<Json> list, scenario.List("faults"));
  for (std::size_t i = 0; i < list.size(); ++i) {
    EM_ASSIGN_OR_RETURN(const ScenarioReader one,
                        ScenarioReader::Make(list[i], fmt::format("faults[{}]", i),
                                             {"at_s", "rate_per_hour", "kind", "seed"}));
    EM_ASSIGN_OR_RETURN(const std::string name, one.Text("kind", "worker"));
    EM_ASSIGN_OR_RETURN(const sim::FaultKind kind, ParseFault(name));
    if (one.Has("at_s") == one.Has("rate_per_hour"))
      return Fail(ErrorCode::kInvalidArgument, "reading the scenario: {} wants one of at_s and rate_per_hour",
                  one.Where("at_s"));
    if (one.Has("at_s")) {
      EM_ASSIGN_OR_RETURN(const double at_s, one.Number("at_s", 0, 1e9));
      out.push_back({at_s, kind});
      continue;
    }
    EM_ASSIGN_OR_RETURN(const double rate, one.Number("rate_per_hour", 1e-6, 3600));
    EM_ASSIGN_OR_RETURN(const int seed, one.Int("seed", 0, 1 << 30, 1));
    Rng rng(static_cast<std::uint64_t>(seed));
    for (double at = 0; (at += -std::log(1 - rng.Uniform()) * 3600 / rate) < end_s;)
      out.push_back({at, kind});
  }
  std::ranges::stable_sort(out, {}, &sim::SimFault::at_s);
  return out;
}

Expected<ScenarioRun> ReadRun(const Json& json, const sim::CapacityInput& common, std::size_t index) {
  const std::string where = fmt::format("runs[{}]", index);
  EM_ASSIGN_OR_RETURN(
      const ScenarioReader reader,
      ScenarioReader::Make(json, where, {"name", "policy", "strategy", "devices", "threshold", "resizes"}));
  ScenarioRun run{.input = common};
  EM_ASSIGN_OR_RETURN(run.name, reader.Text("name", where));
  EM_ASSIGN_OR_RETURN(const std::string policy, reader.Text("policy", "slo"));
  EM_ASSIGN_OR_RETURN(run.input.policy.kind, core::ParsePolicy(policy));
  EM_ASSIGN_OR_RETURN(const std::string strategy, reader.Text("strategy", "elastic"));
  EM_ASSIGN_OR_RETURN(run.input.strategy, sim::ParseStrategy(strategy));
  EM_ASSIGN_OR_RETURN(run.input.start_devices, reader.Int("devices", 1, common.cluster.devices,
                                                          std::max(1, common.policy.min_devices)));
  EM_ASSIGN_OR_RETURN(run.input.policy.threshold, reader.Number("threshold", 1e-6, 1, 0.9));
  EM_ASSIGN_OR_RETURN(const std::vector<Json> resizes, reader.List("resizes"));
  for (const Json& one : resizes) {
    EM_ASSIGN_OR_RETURN(const ScenarioReader resize,
                        ScenarioReader::Make(one, where + ".resizes", {"at_s", "to"}));
    sim::SimResize asked;
    EM_ASSIGN_OR_RETURN(asked.at_s, resize.Number("at_s", 0, 1e9));
    EM_ASSIGN_OR_RETURN(asked.to, resize.Int("to", 1, common.cluster.devices));
    run.input.resizes.push_back(asked);
  }
  std::ranges::stable_sort(run.input.resizes, {}, &sim::SimResize::at_s);
  return run;
}

Expected<Scenario> Read(const Json& json, const std::filesystem::path& file) {
  const std::filesystem::path base = file.parent_path();
  EM_ASSIGN_OR_RETURN(const ScenarioReader reader,
                      ScenarioReader::Make(json, "scenario",
                                           {"name", "notes", "cluster", "model", "weight_bytes", "workload",
                                            "workloads", "slo", "engine", "faults", "min_devices",
                                            "max_devices", "step_devices", "window_s", "runs", "rows"}));
  const bool compares = reader.Has("rows");
  for (const char* key : {"cluster", "model", "workload", "slo", "runs"})
    if (!reader.Has(key) &&
        !(compares && key != std::string_view("cluster") && key != std::string_view("model")))
      return Fail(ErrorCode::kInvalidArgument, "reading the scenario: {} is missing", key);
  if (compares && reader.Has("runs"))
    return Fail(ErrorCode::kInvalidArgument, "reading the scenario: runs and rows exclude each other");
  Scenario scenario;
  EM_ASSIGN_OR_RETURN(scenario.name, reader.Text("name", file.stem().string()));
  EM_ASSIGN_OR_RETURN(const std::vector<Json> notes, reader.List("notes"));
  for (const Json& note : notes)
    scenario.notes.push_back(note.is_string() ? note.get<std::string>() : DumpJson(note));
  sim::CapacityInput common;
  EM_ASSIGN_OR_RETURN(common.cluster, ReadCluster(reader["cluster"], base));
  EM_ASSIGN_OR_RETURN(const core::ModelSpec model, ReadModel(reader["model"], base));
  EM_ASSIGN_OR_RETURN(const double weight_bytes, reader.Number("weight_bytes", 0.25, 4, 2));
  common.model = sim::ShapeOf(model, weight_bytes);
  if (reader.Has("slo")) EM_RETURN_IF_ERROR(ReadLimits(reader, common));
  if (reader.Has("engine")) EM_RETURN_IF_ERROR(ReadEngine(reader["engine"], common));
  if (reader.Has("workload")) {
    EM_ASSIGN_OR_RETURN(common.requests, ReadWorkload(reader["workload"], base));
  }
  const double end_s = common.requests.empty() ? 0 : static_cast<double>(common.requests.back().at_ns) * 1e-9;
  EM_ASSIGN_OR_RETURN(common.faults, ReadFaults(reader, end_s));
  EM_ASSIGN_OR_RETURN(common.policy.min_devices, reader.Int("min_devices", 1, common.cluster.devices, 1));
  EM_ASSIGN_OR_RETURN(common.policy.max_devices,
                      reader.Int("max_devices", 1, common.cluster.devices, common.cluster.devices));
  EM_ASSIGN_OR_RETURN(common.policy.step_devices,
                      reader.Int("step_devices", 1, common.cluster.devices, common.cluster.tensor_parallel));
  EM_ASSIGN_OR_RETURN(const double window_s, reader.Number("window_s", 0.25, 600, 10));
  common.policy.window_ns = static_cast<TimeNs>(window_s * 1e9);
  if (compares) {
    EM_ASSIGN_OR_RETURN(scenario.rows, ReadRows(json, common, base));
    return scenario;
  }
  if (!reader["runs"].is_array() || reader["runs"].empty())
    return Fail(ErrorCode::kInvalidArgument, "reading the scenario: runs must be a list with a run");
  for (const Json& one : reader["runs"]) {
    EM_ASSIGN_OR_RETURN(ScenarioRun run, ReadRun(one, common, scenario.runs.size()));
    scenario.runs.push_back(std::move(run));
  }
  return scenario;
}

}  // namespace

Expected<Scenario> ReadScenario(const std::filesystem::path& file, const std::filesystem::path& trace) {
  EM_ASSIGN_OR_RETURN(const std::string text, ReadFile(file));
  auto json = ParseJson(text);
  if (!json) return Within("reading " + file.string(), json.error());
  if (!trace.empty()) {
    const Json workload = json->is_object() ? json->value("workload", Json::object()) : Json::object();
    if (!workload.is_object() || !workload.contains("path"))
      return Fail(ErrorCode::kInvalidArgument,
                  "{}: reading the scenario: its workload is no trace (trace={})", file.string(),
                  trace.string());
    (*json)["workload"]["path"] = std::filesystem::absolute(trace).string();
  }
  auto scenario = Read(*json, file);
  if (!scenario) return Within(file.string(), scenario.error());
  return scenario;
}

}  // namespace elasticmoe::cli
