// The forward pass against logits of the Hugging Face modeling code (tests/data/README.md) and against a
// plain float64 transcription of the formulas.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "compute/plain_forward.h"
#include "compute/test_model.h"

namespace elasticmoe::compute {
namespace {

using testing::Array;
using testing::Driver;
using testing::MustParse;
using testing::MustRead;
using testing::PlainForward;
using testing::ReadNpy;
using testing::TestModel;

const std::filesystem::path kGoldens = std::filesystem::path(ELASTICMOE_TESTDATA) / "goldens";
const int kNoCpu[] = {-1, -1};

std::vector<TokenId> Ids(const Json& json) {
  return json.get<std::vector<TokenId>>();
}

TokenId Best(const float* logits, std::size_t count) {
  return static_cast<TokenId>(std::max_element(logits, logits + count) - logits);
}

// Greedy continuation of `prompt`, `count` tokens, by a fresh driver.
std::vector<TokenId> Greedy(const TestModel& model, const Kernels& kernels,
                            const std::vector<TokenId>& prompt, std::size_t count) {
  ThreadPool threads(kNoCpu);
  const int length = static_cast<int>(prompt.size() + count);
  Driver driver(model, kernels, threads, static_cast<int>(prompt.size()), length / kBlockTokens + 1);
  const std::size_t vocab = model.Spec().vocab;
  std::vector<float> logits = driver.Step({{0, prompt}});
  std::vector<TokenId> tokens;
  while (tokens.size() < count) {
    tokens.push_back(Best(logits.data() + logits.size() - vocab, vocab));
    logits = driver.Step({{0, {tokens.back()}}});
  }
  return tokens;
}

double LogSum(const float* logits, std::size_t count) {
  const double largest = *std::max_element(logits, logits + count);
  double sum = 0;
  for (std::size_t i = 0; i < count; ++i) sum += std::exp(logits[i] - largest);
  return largest + std::log(sum);
}

// KL(want || got), and how often the largest logit is the same.
struct Distance {
  double mean_kl = 0, largest_kl = 0, same_best = 0;
};
// Rows that `skip` names do not count.
Distance Compare(const Array& want, const std::vector<float>& got, const std::vector<bool>& skip) {
  Distance distance;
  const double rows = static_cast<double>(std::ranges::count(skip, false));
  const std::size_t n = want.columns;
  for (std::size_t row = 0; row < want.Rows(); ++row) {
    if (skip[row]) continue;
    const float* p = want.Row(row);
    const float* q = &got[row * n];
    const double p_sum = LogSum(p, n), q_sum = LogSum(q, n);
    double kl = 0;
    for (std::size_t i = 0; i < n; ++i) kl += std::exp(p[i] - p_sum) * ((p[i] - p_sum) - (q[i] - q_sum));
    distance.mean_kl += kl / rows;
    distance.largest_kl = std::max(distance.largest_kl, kl);
    distance.same_best += (Best(p, n) == Best(q, n)) / rows;
  }
  return distance;
}

// Rows for which the driver's last step chose other experts than the golden, in any layer.
std::vector<bool> RoutedElsewhere(const Json& golden, const Driver& driver, std::size_t rows, int top_k) {
  std::vector<bool> elsewhere(rows, false);
  if (!golden.contains("routing")) return elsewhere;
  for (const Json& layer : golden["routing"]) {
    const std::vector<std::int32_t>& chosen = driver.Routing().at(layer["layer"].get<int>());
    for (std::size_t row = 0; row < layer["experts"].size(); ++row) {
      std::vector<std::int32_t> got(chosen.begin() + row * top_k, chosen.begin() + (row + 1) * top_k);
      auto want = layer["experts"][row].get<std::vector<std::int32_t>>();
      std::ranges::sort(got);
      std::ranges::sort(want);
      if (got != want) elsewhere[row] = true;
    }
  }
  return elsewhere;
}

struct Case {
  const char* name;
  std::filesystem::path model;
};

class Goldens : public ::testing::TestWithParam<Case> {
 protected:
  TestModel model_ = TestModel::Load(GetParam().model);
  Json golden_ = MustParse(MustRead(kGoldens / GetParam().name / "golden.json"));
  std::vector<TokenId> ids_ = Ids(golden_["ids"]);
  Array want_ = ReadNpy(kGoldens / GetParam().name / "logits.npy", model_.Spec().vocab);
};

TEST_P(Goldens, ReferenceLogitsAgreeWithin1e4) {
  ThreadPool threads(kNoCpu);
  Driver driver(model_, *FindKernels("reference").value(), threads, static_cast<int>(ids_.size()), 8);
  const std::vector<float> got = driver.Step({{0, ids_}});
  ASSERT_EQ(want_.values.size(), got.size());
  float worst = 0;
  for (std::size_t i = 0; i < got.size(); ++i) worst = std::max(worst, std::abs(got[i] - want_.values[i]));
  RecordProperty("largest_difference", std::to_string(worst));
  EXPECT_LT(worst, 1e-4F);
  const auto elsewhere = RoutedElsewhere(golden_, driver, ids_.size(), model_.Spec().moe.top_k);
  EXPECT_EQ(0, std::ranges::count(elsewhere, true));
}

TEST_P(Goldens, EveryTableIsCloseInDistribution) {
  for (const Kernels* kernels : AvailableKernels()) {
    ThreadPool threads(kNoCpu);
    Driver driver(model_, *kernels, threads, static_cast<int>(ids_.size()), 8);
    const std::vector<float> got = driver.Step({{0, ids_}});
    // Where two experts' scores lie closer than bf16 tells apart (deepseek_v3: 1e-4), another one may be
    // chosen and its output be anything; that may befall a row in ten. Where the golden says that none do, in
    // no row.
    const auto elsewhere = RoutedElsewhere(golden_, driver, ids_.size(), model_.Spec().moe.top_k);
    const bool apart = golden_.value("router_margin", 0.0) > 0x1p-8;
    EXPECT_LE(std::ranges::count(elsewhere, true), apart ? 0 : std::ssize(ids_) / 10) << kernels->name;
    RecordProperty(fmt::format("elsewhere_{}", kernels->name),
                   static_cast<int>(std::ranges::count(elsewhere, true)));
    const Distance distance = Compare(want_, got, elsewhere);
    RecordProperty(fmt::format("kl_{}", kernels->name),
                   fmt::format("{:.2e} worst {:.2e} best {:.4f}", distance.mean_kl, distance.largest_kl,
                               distance.same_best));
    const Distance all = Compare(want_, got, std::vector<bool>(elsewhere.size(), false));
    RecordProperty(
        fmt::format("kl_all_rows_{}", kernels->name),
        fmt::format("{:.2e} worst {:.2e} best {:.4f}", all.mean_kl, all.largest_kl, all.same_best));
    EXPECT_LT(distance.mean_kl, 1e-3) << kernels->name;
    EXPECT_GE(distance.same_best, 0.97) << kernels->name;
  }
}

TEST_P(Goldens, ReferenceContinuesGreedily) {
  const Kernels& kernels = *FindKernels("reference").value();
  if (golden_.contains("greedy")) {
    const auto want = Ids(golden_["greedy"]);
    EXPECT_EQ(want, Greedy(model_, kernels, Ids(golden_["prompt"]), want.size()));
    return;
  }
  for (const Json& text : golden_["generations"]) {
    const auto want = Ids(text["greedy_ids"]);
    EXPECT_EQ(want, Greedy(model_, kernels, Ids(text["ids"]), want.size())) << text["name"];
  }
}

INSTANTIATE_TEST_SUITE_P(
    Models, Goldens,
    ::testing::Values(Case{"qwen3_moe", kGoldens / "qwen3_moe"}, Case{"mixtral", kGoldens / "mixtral"},
                      Case{"qwen2_moe", kGoldens / "qwen2_moe"}, Case{"olmoe", kGoldens / "olmoe"},
                      Case{"deepseek_v2_lite", kGoldens / "deepseek_v2_lite"},
                      Case{"deepseek_v3", kGoldens / "deepseek_v3"}, Case{"glm4_moe", kGoldens / "glm4_moe"},
                      Case{"gpt_oss_mxfp4", kGoldens / "gpt_oss_mxfp4"},
                      Case{"demo", std::filesystem::path(ELASTICMOE_MODELS) / "demo"}),
    [](const auto& info) { return std::string(info.param.name); });

// Every field of the spec in a value that the bundled models do not have.
TEST(Forward, AgreesWithThePlainFormulasOnAMixedModel) {
  core::ModelSpec spec;
  spec.vocab = 75;  // no multiple of a panel
  spec.hidden = 46;
  spec.max_positions = 64;
  spec.rms_eps = 1e-5F;
  spec.attention = {.heads = 6,
                    .kv_heads = 2,
                    .head_dim = 10,
                    .qk_norm = false,
                    .qkv_bias = true,
                    .rope_theta = 500.0,
                    .scale = 0.25F};
  spec.moe = {.experts = 5, .top_k = 3, .expert_width = 21, .renormalize = false};
  spec.layers = {{false, 53}, {true, 0}, {false, 7}, {true, 0}};
  std::vector<TokenId> tokens;
  Rng rng(7);
  for (int i = 0; i < 37; ++i) tokens.push_back(static_cast<TokenId>(rng.Below(spec.vocab)));
  for (const bool tied : {false, true}) {
    spec.tied_head = tied;
    spec.attention.qk_norm = tied;
    spec.attention.qk_norm_whole = !tied;
    spec.attention.clip_qkv = tied ? 0 : 0.9F;
    spec.attention.sinks = spec.attention.o_bias = tied;
    spec.attention.rope.dim = tied ? 6 : 0;
    spec.attention.rope.interleaved = tied;
    spec.moe.router_bias = spec.moe.expert_bias = tied;
    if (tied) spec.activation = {core::ActivationSpec::Kind::kClampedSwiglu, 1.702F, 1.5F};
    for (const int layer : {0, 1, 3}) spec.layers[layer].window = tied ? 3 + 8 * layer : 0;
    const TestModel model = TestModel::Random(spec, 11);
    const std::vector<std::vector<double>> want = PlainForward(model, tokens);
    ThreadPool threads(kNoCpu);
    Driver driver(model, *FindKernels("reference").value(), threads, 37, 3);
    const std::vector<float> got = driver.Step({{0, tokens}});
    double worst = 0;
    for (std::size_t i = 0; i < got.size(); ++i)
      worst = std::max(worst, std::abs(got[i] - want[i / spec.vocab][i % spec.vocab]));
    RecordProperty("largest_difference", std::to_string(worst));
    EXPECT_LT(worst, 1e-4);
  }
}

}  // namespace
}  // namespace elasticmoe::compute
