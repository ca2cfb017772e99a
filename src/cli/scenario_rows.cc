// Rows of a scenario that compares with published numbers.
#include <cstdlib>
#include <map>

#include "cli/scenario.h"
#include "cli/scenario_reader.h"

namespace elasticmoe::cli {
namespace {

Expected<sim::Without> ReadWithout(const ScenarioReader& reader) {
  sim::Without out;
  EM_ASSIGN_OR_RETURN(const std::vector<Json> list, reader.List("without"));
  for (const Json& one : list) {
    const std::string name = one.is_string() ? one.get<std::string>() : DumpJson(one);
    if (name == "allocator")
      out.allocator = true;
    else if (name == "peer-copies")
      out.peer_copies = true;
    else if (name == "standby")
      out.standby = true;
    else if (name == "zero-copy")
      out.zero_copy = true;
    else
      return Fail(ErrorCode::kInvalidArgument,
                  "reading the scenario: {}={} (of allocator, peer-copies, standby, zero-copy)",
                  reader.Where("without"), name);
  }
  return out;
}

// A number, or a bound as text: ">= 90".
Status ReadPublished(const ScenarioReader& reader, sim::ComparisonRow& row) {
  if (!reader.Has("paper")) return {};
  if (reader["paper"].is_number()) {
    row.published = reader["paper"].get<double>();
    return {};
  }
  EM_ASSIGN_OR_RETURN(const std::string text, reader.Text("paper"));
  char* rest = nullptr;
  const double value = text.size() > 2 ? std::strtod(text.c_str() + 2, &rest) : 0;
  if ((!text.starts_with(">=") && !text.starts_with("<=")) || rest == text.c_str() + 2 || *rest != '\0')
    return Fail(ErrorCode::kInvalidArgument,
                "reading the scenario: {}='{}' (a number, or a bound as \">= 90\")", reader.Where("paper"),
                text);
  row.bound = text.substr(0, 2);
  row.published = value;
  return {};
}

}  // namespace

Expected<std::vector<sim::ComparisonRow>> ReadRows(const Json& scenario, const sim::CapacityInput& common,
                                                   const std::filesystem::path& base) {
  std::map<std::string, std::vector<sim::SimRequest>> workloads;
  if (scenario.contains("workloads")) {
    if (!scenario["workloads"].is_object())
      return Fail(ErrorCode::kInvalidArgument, "reading the scenario: workloads must be an object");
    for (const auto& [name, one] : scenario["workloads"].items()) {
      auto requests = ReadWorkload(one, base);
      if (!requests) return Within("reading workloads." + name, requests.error());
      workloads[name] = std::move(*requests);
    }
  }
  if (!scenario["rows"].is_array() || scenario["rows"].empty())
    return Fail(ErrorCode::kInvalidArgument, "reading the scenario: rows must be a list with a row");
  std::vector<sim::ComparisonRow> out;
  for (const Json& one : scenario["rows"]) {
    const std::string where = fmt::format("rows[{}]", out.size());
    EM_ASSIGN_OR_RETURN(const ScenarioReader reader,
                        ScenarioReader::Make(one, where,
                                             {"name", "unit", "paper", "fitted", "measure", "strategy",
                                              "from", "to", "without", "against", "against_static",
                                              "workload", "at_s", "policy", "ttft_s", "tpot_s"}));
    sim::ComparisonRow row{.input = common};
    EM_ASSIGN_OR_RETURN(row.name, reader.Text("name"));
    EM_ASSIGN_OR_RETURN(row.unit, reader.Text("unit", ""));
    EM_RETURN_IF_ERROR(ReadPublished(reader, row));
    EM_ASSIGN_OR_RETURN(row.fitted, reader.Bool("fitted", false));
    EM_ASSIGN_OR_RETURN(const std::string measure, reader.Text("measure"));
    EM_ASSIGN_OR_RETURN(row.measure, sim::ParseMeasure(measure));
    EM_ASSIGN_OR_RETURN(const std::string strategy, reader.Text("strategy", "elastic-paper"));
    EM_ASSIGN_OR_RETURN(row.strategy, sim::ParseStrategy(strategy));
    const int most = common.cluster.devices;
    EM_ASSIGN_OR_RETURN(row.from, reader.Int("from", 1, most));
    EM_ASSIGN_OR_RETURN(row.to, reader.Int("to", 1, most, row.from));
    const int group = common.cluster.tensor_parallel;
    if (row.from % group != 0 || row.to % group != 0)
      return Fail(ErrorCode::kInvalidArgument,
                  "reading the scenario: {}: from={} to={} (multiples of tensor_parallel={})", where,
                  row.from, row.to, group);
    EM_ASSIGN_OR_RETURN(row.without, ReadWithout(reader));
    EM_ASSIGN_OR_RETURN(const std::vector<Json> against, reader.List("against"));
    for (const Json& name : against) {
      EM_ASSIGN_OR_RETURN(const auto baseline,
                          sim::ParseStrategy(name.is_string() ? name.get<std::string>() : DumpJson(name)));
      row.against.push_back(baseline);
    }
    EM_ASSIGN_OR_RETURN(row.against_static, reader.Int("against_static", 0, most, 0));
    EM_ASSIGN_OR_RETURN(row.at_s, reader.Number("at_s", 0, 1e9, 0));
    EM_ASSIGN_OR_RETURN(const std::string policy, reader.Text("policy", "static"));
    EM_ASSIGN_OR_RETURN(row.input.policy.kind, core::ParsePolicy(policy));
    EM_ASSIGN_OR_RETURN(row.input.policy.slo.ttft_s,
                        reader.Number("ttft_s", 1e-6, 1e6, common.policy.slo.ttft_s));
    EM_ASSIGN_OR_RETURN(row.input.policy.slo.tpot_s,
                        reader.Number("tpot_s", 1e-6, 1e6, common.policy.slo.tpot_s));
    EM_ASSIGN_OR_RETURN(row.key, reader.Text("workload", ""));
    if (!row.key.empty()) {
      if (!workloads.contains(row.key))
        return Fail(ErrorCode::kInvalidArgument, "reading the scenario: {}={} is none of workloads",
                    reader.Where("workload"), row.key);
      row.input.requests = workloads[row.key];
    }
    row.key += fmt::format("/{}/{}", row.input.policy.slo.ttft_s, row.input.policy.slo.tpot_s);
    out.push_back(std::move(row));
  }
  return out;
}

}  // namespace elasticmoe::cli
