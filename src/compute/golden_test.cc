// The forward pass against logits of the Hugging Face modeling code (tests/data/README.md) and against a
// plain float64 transcription of the formulas.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "compute/test_model.h"

namespace elasticmoe::compute {
namespace {

using testing::Array;
using testing::Driver;
using testing::MustParse;
using testing::MustRead;
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
    // Where two experts' scores lie closer than bf16 (deepseek_v3: 1e-4 apart), another one may be chosen and
    // its output be anything; that may befall a row in ten.
    const auto elsewhere = RoutedElsewhere(golden_, driver, ids_.size(), model_.Spec().moe.top_k);
    EXPECT_LE(std::ranges::count(elsewhere, true) * 10, std::ssize(ids_)) << kernels->name;
    const Distance distance = Compare(want_, got, elsewhere);
    RecordProperty(fmt::format("kl_{}", kernels->name),
                   fmt::format("{:.2e} worst {:.2e} best {:.4f}", distance.mean_kl, distance.largest_kl,
                               distance.same_best));
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

// ---- A second implementation: float64, no cache, no tricks
// -----------------------------------------------------

using Vector = std::vector<double>;

Vector Times(const std::vector<float>& w, const Vector& x) {
  Vector y(w.size() / x.size());
  for (std::size_t j = 0; j < y.size(); ++j)
    for (std::size_t i = 0; i < x.size(); ++i) y[j] += w[j * x.size() + i] * x[i];
  return y;
}

void Normalize(const std::vector<float>& weight, float eps, double* x) {
  double sum = 0;
  for (std::size_t i = 0; i < weight.size(); ++i) sum += x[i] * x[i];
  for (std::size_t i = 0; i < weight.size(); ++i)
    x[i] *= weight[i] / std::sqrt(sum / static_cast<double>(weight.size()) + eps);
}

Vector Normed(const std::vector<float>& weight, float eps, Vector x) {
  Normalize(weight, eps, x.data());
  return x;
}

Vector PlainMlp(const std::vector<float>& gate, const std::vector<float>& up, const std::vector<float>& down,
                const Vector& x) {
  Vector g = Times(gate, x);
  const Vector u = Times(up, x);
  for (std::size_t i = 0; i < g.size(); ++i) g[i] = g[i] / (1 + std::exp(-g[i])) * u[i];
  return Times(down, g);
}

Vector PlainMoe(const TestModel& model, int layer, const Vector& x) {
  const core::MoeSpec& moe = model.Spec().moe;
  Vector p = Times(model.Plain(Role::kRouter, layer), x);
  double sum = 0;
  for (double& logit : p) sum += logit = std::exp(logit);
  std::vector<int> order(p.size());
  for (std::size_t e = 0; e < order.size(); ++e) order[e] = static_cast<int>(e);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return p[a] > p[b]; });
  double chosen = 0;
  for (int j = 0; j < moe.top_k; ++j) chosen += p[order[j]];
  Vector out(x.size());
  for (int j = 0; j < moe.top_k; ++j) {
    const Vector y = PlainMlp(model.Plain(Role::kExpertGate, layer, order[j]),
                              model.Plain(Role::kExpertUp, layer, order[j]),
                              model.Plain(Role::kExpertDown, layer, order[j]), x);
    for (std::size_t i = 0; i < x.size(); ++i)
      out[i] += y[i] * p[order[j]] / (moe.renormalize ? chosen : sum);
  }
  return out;
}

// out[t] = attention of token t over tokens 0..t, before the output projection.
std::vector<Vector> PlainAttention(const TestModel& model, int layer, const std::vector<Vector>& residual) {
  const core::ModelSpec& spec = model.Spec();
  const core::AttentionSpec& a = spec.attention;
  const std::size_t dim = a.head_dim;
  std::vector<Vector> q, k, v, out;
  for (std::size_t t = 0; t < residual.size(); ++t) {
    const Vector x = Normed(model.Plain(Role::kAttentionNorm, layer), spec.rms_eps, residual[t]);
    const auto project = [&](Role weight, Role bias, Role norm, bool rotate) {
      Vector y = Times(model.Plain(weight, layer), x);
      if (a.qkv_bias)
        for (std::size_t i = 0; i < y.size(); ++i) y[i] += model.Plain(bias, layer)[i];
      if (a.qk_norm_whole && rotate) Normalize(model.Plain(norm, layer), spec.rms_eps, y.data());
      for (double& value : y)
        if (a.clip_qkv > 0) value = std::clamp<double>(value, -a.clip_qkv, a.clip_qkv);
      for (std::size_t head = 0; rotate && head < y.size() / dim; ++head) {
        double* h = &y[head * dim];
        if (a.qk_norm) Normalize(model.Plain(norm, layer), spec.rms_eps, h);
        const std::size_t turned = a.RopeDim();
        for (std::size_t i = 0; i < turned / 2; ++i) {
          const double angle =
              static_cast<double>(t) *
              std::pow(a.rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(turned));
          double& one = h[a.rope.interleaved ? 2 * i : i];
          double& other = h[a.rope.interleaved ? 2 * i + 1 : i + turned / 2];
          const double first = one, second = other;
          one = first * std::cos(angle) - second * std::sin(angle);
          other = second * std::cos(angle) + first * std::sin(angle);
        }
      }
      return y;
    };
    q.push_back(project(Role::kQ, Role::kQBias, Role::kQNorm, true));
    k.push_back(project(Role::kK, Role::kKBias, Role::kKNorm, true));
    v.push_back(project(Role::kV, Role::kVBias, Role::kQNorm, false));
    Vector& y = out.emplace_back(a.heads * dim);
    for (int head = 0; head < a.heads; ++head) {
      const std::size_t kv = head / (a.heads / a.kv_heads) * dim;
      double sum = a.sinks ? std::exp(model.Plain(Role::kSinks, layer)[head]) : 0;
      const int window = spec.layers[layer].window;
      for (std::size_t s = 0; s <= t; ++s) {
        if (window > 0 && s + window <= t) continue;
        double score = 0;
        for (std::size_t i = 0; i < dim; ++i) score += q[t][head * dim + i] * k[s][kv + i];
        const double weight = std::exp(score * a.scale);
        sum += weight;
        for (std::size_t i = 0; i < dim; ++i) y[head * dim + i] += weight * v[s][kv + i];
      }
      for (std::size_t i = 0; i < dim; ++i) y[head * dim + i] /= sum;
    }
  }
  return out;
}

std::vector<Vector> PlainForward(const TestModel& model, const std::vector<TokenId>& tokens) {
  const core::ModelSpec& spec = model.Spec();
  const std::vector<float>& embedding = model.Plain(Role::kEmbedding);
  std::vector<Vector> residual;
  for (const TokenId token : tokens)
    residual.emplace_back(embedding.begin() + std::ptrdiff_t(token) * spec.hidden,
                          embedding.begin() + std::ptrdiff_t(token + 1) * spec.hidden);
  for (int layer = 0; layer < spec.LayerCount(); ++layer) {
    const std::vector<Vector> attended = PlainAttention(model, layer, residual);
    for (std::size_t t = 0; t < tokens.size(); ++t) {
      Vector o = Times(model.Plain(Role::kO, layer), attended[t]);
      for (int i = 0; spec.attention.o_bias && i < spec.hidden; ++i)
        o[i] += model.Plain(Role::kOBias, layer)[i];
      for (int i = 0; i < spec.hidden; ++i) residual[t][i] += o[i];
      const Vector x = Normed(model.Plain(Role::kMlpNorm, layer), spec.rms_eps, residual[t]);
      const Vector y = spec.layers[layer].moe ? PlainMoe(model, layer, x)
                                              : PlainMlp(model.Plain(Role::kDenseGate, layer),
                                                         model.Plain(Role::kDenseUp, layer),
                                                         model.Plain(Role::kDenseDown, layer), x);
      for (int i = 0; i < spec.hidden; ++i) residual[t][i] += y[i];
    }
  }
  std::vector<Vector> logits;
  for (const Vector& row : residual)
    logits.push_back(Times(model.Plain(spec.tied_head ? Role::kEmbedding : Role::kLmHead),
                           Normed(model.Plain(Role::kFinalNorm), spec.rms_eps, row)));
  return logits;
}

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
    for (const int layer : {0, 1, 3}) spec.layers[layer].window = tied ? 3 + 8 * layer : 0;
    const TestModel model = TestModel::Random(spec, 11);
    const std::vector<Vector> want = PlainForward(model, tokens);
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
