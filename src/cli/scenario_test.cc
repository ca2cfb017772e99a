#include "cli/scenario.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>

#include "cli/capacity_report.h"

namespace elasticmoe::cli {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr char kModel[] = R"({"model_type": "qwen3_moe", "vocab_size": 1000, "hidden_size": 256,
  "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
  "intermediate_size": 512, "moe_intermediate_size": 128, "num_experts": 16, "num_experts_per_tok": 2,
  "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 4096,
  "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false,
  "eos_token_id": 1})";

class ScenarioTest : public ::testing::Test {
 protected:
  void SetUp() override {
    directory_ = std::filesystem::path(::testing::TempDir()) /
                 fmt::format("scenario_{}", ::testing::UnitTest::GetInstance()->random_seed());
    directory_ /= ::testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::create_directories(directory_);
    scenario_ = {
        {"cluster", {{"profile", "cpu-core"}, {"devices", 8}}},
        {"model", *ParseJson(kModel)},
        {"workload",
         {{"kind", "poisson"}, {"schedule", "2:10"}, {"prompt_tokens", "10-20"}, {"output_tokens", "5-9"}}},
        {"slo", {{"ttft_s", 1}, {"tpot_s", 0.1}}},
        {"runs", {{{"name", "one"}, {"policy", "static"}, {"devices", 2}}}}};
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  void Write(const std::string& name, const std::string& text) { std::ofstream(directory_ / name) << text; }
  Expected<Scenario> Read() {
    Write("scenario.json", DumpJson(scenario_));
    return ReadScenario(directory_ / "scenario.json");
  }
  std::string Complaint() {
    const auto scenario = Read();
    if (scenario) return "it was read";
    EXPECT_EQ(scenario.error().code, ErrorCode::kInvalidArgument) << scenario.error().message;
    return scenario.error().message;
  }

  std::filesystem::path directory_;
  Json scenario_;
};

TEST_F(ScenarioTest, IsReadWithItsDefaults) {
  const Scenario scenario = *Read();
  ASSERT_EQ(scenario.runs.size(), 1U);
  const sim::CapacityInput& input = scenario.runs[0].input;
  EXPECT_EQ(input.cluster.devices, 8);
  EXPECT_EQ(input.start_devices, 2);
  EXPECT_EQ(input.policy.max_devices, 8);
  EXPECT_EQ(input.max_step_rows, 512);
  EXPECT_GT(input.requests.size(), 5U);
  for (const sim::SimRequest& one : input.requests) {
    EXPECT_GE(one.prompt_tokens, 10);
    EXPECT_LE(one.output_tokens, 9);
  }
}

TEST_F(ScenarioTest, AnUnknownKeyIsNamedWithThoseThereAre) {
  scenario_["cluster"]["devcies"] = 4;
  EXPECT_THAT(Complaint(), AllOf(HasSubstr("unknown key cluster.devcies"), HasSubstr("devices_per_node")));
  scenario_["cluster"].erase("devcies");
  scenario_["speed"] = 1;
  EXPECT_THAT(Complaint(), HasSubstr("unknown key scenario.speed"));
}

TEST_F(ScenarioTest, WrongValuesAreNamedWithTheirLimits) {
  scenario_["workload"]["schedule"] = "-2:10";
  EXPECT_THAT(Complaint(), HasSubstr("workload.schedule"));
  scenario_["workload"]["schedule"] = "2:10";
  scenario_["cluster"]["flops"] = -1;
  EXPECT_THAT(Complaint(), HasSubstr("cluster.flops=-1"));
  scenario_["cluster"].erase("flops");
  scenario_["cluster"]["tensor_parallel"] = 3;
  EXPECT_THAT(Complaint(), HasSubstr("tensor_parallel=3"));
  scenario_["cluster"].erase("tensor_parallel");
  scenario_["runs"][0]["strategy"] = "magic";
  EXPECT_THAT(Complaint(), AllOf(HasSubstr("strategy=magic"), HasSubstr("cold-restart")));
  scenario_["runs"][0].erase("strategy");
  scenario_["slo"]["ttft_s"] = "fast";
  EXPECT_THAT(Complaint(), HasSubstr("slo.ttft_s"));
  scenario_["slo"]["ttft_s"] = 1;
  scenario_.erase("model");
  EXPECT_THAT(Complaint(), HasSubstr("model is missing"));
}

TEST_F(ScenarioTest, ABadRowOfATraceIsNamedByItsLine) {
  scenario_["workload"] = {{"kind", "trace"}, {"path", "trace.csv"}, {"copies", 2}};
  Write("trace.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n0,10,5\n1.5,many,5\n");
  EXPECT_THAT(Complaint(), AllOf(HasSubstr("trace.csv"), HasSubstr("line 3"), HasSubstr("many")));
  Write("trace.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n0,10,5\n1.5,20,5\n");
  EXPECT_EQ(Read()->runs[0].input.requests.size(), 4U);
}

TEST_F(ScenarioTest, ATraceIsScaledToARateAndItsCopiesAreSpread) {
  std::string rows = "TIMESTAMP,ContextTokens,GeneratedTokens\n";
  for (int i = 0; i <= 100; ++i) rows += fmt::format("{},10,5\n", i);
  Write("trace.csv", rows);
  for (const double rate : {0.25, 7.5}) {
    scenario_["workload"] = {{"kind", "trace"}, {"path", "trace.csv"}, {"rate", rate}, {"spread_s", 5}};
    const auto requests = Read()->runs[0].input.requests;
    EXPECT_NEAR(static_cast<double>(requests.size()), 100 * rate, 5 * std::sqrt(100 * 0.25)) << rate;
    EXPECT_TRUE(std::ranges::is_sorted(requests, {}, &sim::SimRequest::at_ns));
    EXPECT_LT(requests.back().at_ns, 105'000'000'000);
  }
  scenario_["workload"]["copies"] = 2;
  EXPECT_THAT(Complaint(), HasSubstr("exclude each other"));
}

TEST_F(ScenarioTest, AnotherTraceIsReadInsteadOfItsOwn) {
  Write("trace.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n0,10,5\n");
  Write("other.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n0,10,5\n1,20,5\n");
  const auto file = directory_ / "scenario.json", other = directory_ / "other.csv";
  Write("scenario.json", DumpJson(scenario_));
  EXPECT_THAT(ReadScenario(file, other).error().message, HasSubstr("its workload is no trace"));
  scenario_["workload"] = {{"kind", "trace"}, {"path", "trace.csv"}};
  Write("scenario.json", DumpJson(scenario_));
  EXPECT_EQ(ReadScenario(file)->runs[0].input.requests.size(), 1U);
  EXPECT_EQ(ReadScenario(file, other)->runs[0].input.requests.size(), 2U);
}

TEST_F(ScenarioTest, ARampRisesAndWrongPointsAreRefused) {
  scenario_["workload"] = {
      {"kind", "ramp"}, {"points", "0:0,100:20"}, {"prompt_tokens", "8"}, {"output_tokens", "8"}};
  const auto requests = Read()->runs[0].input.requests;
  EXPECT_NEAR(static_cast<double>(requests.size()), 1000, 5 * std::sqrt(1000));
  const auto early =
      std::ranges::count_if(requests, [](const auto& one) { return one.at_ns < 50'000'000'000; });
  EXPECT_NEAR(static_cast<double>(early), 250, 5 * std::sqrt(250));
  for (const char* wrong : {"0:1", "0:1,0:2", "5:1,3:1", "0:1,10:-1", "0:1,10", "a:1,10:1", "", "0:1,,5:1"}) {
    scenario_["workload"]["points"] = wrong;
    EXPECT_THAT(Complaint(), HasSubstr("workload.points")) << wrong;
  }
}

TEST_F(ScenarioTest, BurstsComeAtTheirTimes) {
  scenario_["workload"] = {{"kind", "bursts"},     {"rate", 0},           {"burst_rate", 10},
                           {"every_s", 20},        {"burst_s", 5},        {"seconds", 60},
                           {"prompt_tokens", "8"}, {"output_tokens", "8"}};
  const auto requests = Read()->runs[0].input.requests;
  ASSERT_GT(requests.size(), 50U);
  for (const auto& one : requests) EXPECT_GE(one.at_ns % 20'000'000'000, 15'000'000'000 - 1);
}

TEST_F(ScenarioTest, FaultsComeByTimeAndByRate) {
  scenario_["faults"] = {{{"at_s", 3}, {"kind", "device"}}, {{"rate_per_hour", 3600}, {"seed", 2}}};
  const auto faults = Read()->runs[0].input.faults;
  ASSERT_GT(faults.size(), 2U);
  EXPECT_TRUE(std::ranges::is_sorted(faults, {}, &sim::SimFault::at_s));
  scenario_["faults"] = {{{"kind", "device"}}};
  EXPECT_THAT(Complaint(), HasSubstr("rate_per_hour"));
  scenario_["faults"] = {{{"at_s", 3}, {"kind", "flood"}}};
  EXPECT_THAT(Complaint(), HasSubstr("flood"));
}

TEST_F(ScenarioTest, AProfileFileIsReadAndWhatCalibrateWritesComesBack) {
  sim::ClusterProfile profile = *sim::ProfileOf("cpu-core");
  profile.attach_s = 0.125;
  profile.measured =
      core::StepCost{.fixed_s = 1e-3, .row_s = 2e-3, .expert_s = 3e-6, .kv_byte_s = 4e-12, .peer_s = 5e-5};
  Write("cpu.json", DumpJson(ProfileJson(profile)));
  scenario_["cluster"] = {{"profile", "cpu.json"}, {"devices", 4}};
  const Scenario scenario = *Read();
  const sim::ClusterProfile& cluster = scenario.runs[0].input.cluster;
  EXPECT_EQ(cluster.devices, 4);
  EXPECT_DOUBLE_EQ(cluster.attach_s, 0.125);
  ASSERT_TRUE(cluster.measured);
  EXPECT_DOUBLE_EQ(cluster.measured->row_s, 2e-3);
  EXPECT_DOUBLE_EQ(sim::CostOf(cluster, scenario.runs[0].input.model).peer_s, 5e-5);
  Write("cpu.json", R"({"profile": "cpu.json"})");
  EXPECT_THAT(Complaint(), HasSubstr("names itself"));
}

TEST_F(ScenarioTest, RowsAreComparedWithPublishedNumbers) {
  scenario_.erase("workload");
  scenario_.erase("slo");
  scenario_.erase("runs");
  scenario_["cluster"]["profile"] = "ascend-910c";
  scenario_["rows"] = {{{"name", "cold"},
                        {"measure", "latency_s"},
                        {"strategy", "cold-restart"},
                        {"from", 2},
                        {"to", 4},
                        {"paper", 50}},
                       {{"name", "ratio"},
                        {"measure", "latency_s"},
                        {"from", 2},
                        {"to", 4},
                        {"paper", "<= 0.5"},
                        {"against", {"cold-restart", "extravagant"}}}};
  const Scenario scenario = *Read();
  ASSERT_EQ(scenario.rows.size(), 2U);
  sim::Comparison comparison;
  std::vector<ComparedRow> rows;
  for (const sim::ComparisonRow& row : scenario.rows) rows.push_back({row, *comparison.Evaluate(row)});
  const sim::ResizeCost cold = *sim::CostOfResize(rows[0].row.input.cluster, rows[0].row.input.model,
                                                  sim::ResizeStrategy::kColdRestart, 2, 4);
  EXPECT_DOUBLE_EQ(rows[0].value.simulated, cold.latency_s);
  EXPECT_LT(rows[0].value.ours, rows[0].value.simulated);
  EXPECT_DOUBLE_EQ(*Deviation(rows[0]), cold.latency_s / 50 - 1);
  EXPECT_DOUBLE_EQ(*Deviation(rows[1]), 0);  // the bound holds
  const Json json = ComparisonJson(rows);
  for (const char* key : {"name", "paper", "simulated", "ours", "deviation"})
    EXPECT_TRUE(json[0].contains(key));
  EXPECT_THAT(ComparisonTable(rows), AllOf(HasSubstr("<= 0.50"), HasSubstr("holds")));
  EXPECT_THAT(ComparisonHtml("a <b>", {"note & note"}, rows),
              AllOf(HasSubstr("a &lt;b&gt;"), HasSubstr("note &amp; note"), HasSubstr("<td>cold</td>")));
}

TEST_F(ScenarioTest, WrongRowsAreRefused) {
  scenario_.erase("runs");
  const Json good = {{"name", "a"}, {"measure", "latency_s"}, {"from", 2}, {"to", 4}};
  for (const auto& [key, value] : std::initializer_list<std::pair<const char*, Json>>{{"measure", "speed"},
                                                                                      {"paper", "about 3"},
                                                                                      {"without", {"luck"}},
                                                                                      {"workload", "none"},
                                                                                      {"from", 99}}) {
    Json row = good;
    row[key] = value;
    scenario_["rows"] = {row};
    EXPECT_THAT(Complaint(), HasSubstr(key)) << key;
  }
  scenario_["rows"] = {good};
  EXPECT_TRUE(Read()) << Read().error().message;
  scenario_["runs"] = Json::array();
  EXPECT_THAT(Complaint(), HasSubstr("exclude"));
}

TEST_F(ScenarioTest, ALoadMeasureWithoutALoadIsRefused) {
  scenario_.erase("runs");
  scenario_.erase("workload");
  scenario_["rows"] = {{{"name", "a"}, {"measure", "goodput"}, {"from", 2}}};
  const Scenario scenario = *Read();
  const auto value = sim::Comparison().Evaluate(scenario.rows[0]);
  ASSERT_FALSE(value);
  EXPECT_THAT(value.error().message, HasSubstr("without a workload"));
}

TEST_F(ScenarioTest, EveryScenarioThatComesAlongIsRead) {
  const std::filesystem::path all = std::filesystem::path(ELASTICMOE_MODELS).parent_path() / "scenarios";
  int read = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(all)) {
    if (entry.path().extension() != ".json" || entry.path().parent_path().filename() == "models" ||
        entry.path().filename() == "ascend-910c.json")
      continue;
    const auto scenario = ReadScenario(entry.path());
    EXPECT_TRUE(scenario) << scenario.error().message;
    ++read;
  }
  EXPECT_GE(read, 10);
}

// ---------------------------------------------------------------- reports

TEST(CapacityReport, NamesWhatTheRunsDid) {
  sim::CapacityResult result;
  result.requests = result.ended = 4;
  result.met = 3;
  result.attainment = 0.75;
  result.device_s = 100;
  result.joules = 50;
  result.output_tokens = 25;
  result.faults = 1;
  result.samples = {{.at_s = 0, .devices = 2}, {.at_s = 1, .arrivals = 3, .devices = 4, .worst_ttft_s = 1.5}};
  sim::CapacityResize resize{
      .decision = {.at = 500'000'000, .from = 2, .to = 4}, .ready_s = 1, .done_s = 1.25};
  resize.decision.reason = "too <slow>";
  result.resizes = {resize};
  const std::vector<NamedRun> runs = {{"a & b", result}};
  EXPECT_THAT(CapacityTable(runs), AllOf(HasSubstr("a & b"), HasSubstr("75.00"), HasSubstr("2.00")));
  const Json json = CapacityJson(runs);
  EXPECT_DOUBLE_EQ(json[0]["joules_per_token"].get<double>(), 2);
  EXPECT_DOUBLE_EQ(json[0]["device_seconds_per_request"].get<double>(), 25);
  EXPECT_DOUBLE_EQ(json[0]["resizes"][0]["done_s"].get<double>(), 1.25);
  const std::string page = CapacityHtml("title", runs);
  EXPECT_THAT(page, AllOf(HasSubstr("a &amp; b"), HasSubstr("Worst TTFT"), HasSubstr("too &lt;slow&gt;")));
  EXPECT_EQ(page.find("<script"), std::string::npos);  // nothing is loaded, nothing runs
}

TEST(CapacityReport, ARunThatDidNothingIsNoDivisionByZero) {
  const std::vector<NamedRun> runs = {{"empty", {}}};
  EXPECT_DOUBLE_EQ(CapacityJson(runs)[0]["joules_per_token"].get<double>(), 0);
  EXPECT_THAT(CapacityHtml("t", runs), HasSubstr("empty"));
}

TEST(CapacityReport, MeasuredRowsShowTheirDeviation) {
  const std::vector<MeasuredRow> rows = {{"throughput", "tokens/s", 100, 110}, {"nothing", "ms", 0, 5}};
  EXPECT_NEAR(rows[0].Deviation(), 0.1, 1e-12);
  EXPECT_DOUBLE_EQ(rows[1].Deviation(), 0);
  EXPECT_THAT(MeasuredTable(rows), HasSubstr("+10 %"));
  EXPECT_DOUBLE_EQ(MeasuredJson(rows)[0]["simulated"].get<double>(), 110);
}

}  // namespace
}  // namespace elasticmoe::cli
