// Batch invariance of the whole forward pass: a token's logits are the same bits whatever shared its step,
// however its prompt was cut, whoever ran its experts, and however many threads did.
#include <gtest/gtest.h>

#include "compute/test_model.h"

namespace elasticmoe::compute {
namespace {

using testing::Driver;
using testing::TestModel;

constexpr int kTokens = 45;  // into a third KV block

core::ModelSpec MixedSpec() {
  core::ModelSpec spec;
  spec.vocab = 131;
  spec.hidden = 70;
  spec.max_positions = 128;
  spec.attention = {.heads = 6,
                    .kv_heads = 2,
                    .head_dim = 26,
                    .qk_norm = true,
                    .qkv_bias = true,
                    .rope_theta = 1e4,
                    .scale = 0.2F};
  spec.moe = {.experts = 7, .top_k = 3, .expert_width = 45, .renormalize = true};
  spec.layers = {{true, 0}, {false, 51}, {true, 0}};
  return spec;
}

// Latent attention of sizes that fill no register, grouped routing, a shared expert.
core::ModelSpec LatentSpec() {
  core::ModelSpec spec = MixedSpec();
  spec.attention = {.heads = 19, .kv_heads = 19, .head_dim = 18, .rope_theta = 1e4, .scale = 0.2F};
  spec.attention.rope = {.dim = 6, .interleaved = true};
  spec.attention.q_lora_rank = 21;
  spec.attention.kv_lora_rank = 37;
  spec.attention.value_dim = 11;
  spec.moe = {.experts = 12, .top_k = 3, .expert_width = 45, .renormalize = true};
  spec.moe.scores = core::MoeSpec::Scores::kSigmoid;
  spec.moe.correction = true;
  spec.moe.groups = 4;
  spec.moe.chosen_groups = 2;
  spec.moe.group_score = core::MoeSpec::GroupScore::kTopTwoSum;
  spec.moe.scaling = 2.5F;
  spec.moe.shared_width = 29;
  spec.moe.shared_gate = true;
  return spec;
}

// Windows that begin inside of blocks and skip some, and sinks.
core::ModelSpec WindowSpec() {
  core::ModelSpec spec = MixedSpec();
  spec.attention.sinks = true;
  spec.attention.o_bias = true;
  spec.layers[0].window = 5;
  spec.layers[2].window = 21;
  return spec;
}

std::vector<TokenId> Tokens(const core::ModelSpec& spec, std::uint64_t seed, int count) {
  Rng rng(seed);
  std::vector<TokenId> tokens;
  for (int i = 0; i < count; ++i) tokens.push_back(static_cast<TokenId>(rng.Below(spec.vocab)));
  return tokens;
}

class BatchInvariance : public ::testing::TestWithParam<std::string> {
 protected:
  const Kernels& kernels_ = *FindKernels(GetParam()).value();
  const std::vector<TestModel> models_ = [] {
    std::vector<TestModel> models;
    models.push_back(TestModel::Random(MixedSpec(), 3));
    models.push_back(TestModel::Random(LatentSpec(), 3));
    models.push_back(TestModel::Random(WindowSpec(), 3));
    models.push_back(TestModel::Load(std::filesystem::path(ELASTICMOE_MODELS) / "demo"));
    return models;
  }();

  std::vector<float> Alone(const TestModel& model, const std::vector<TokenId>& tokens) {
    const int cpus[] = {-1};
    ThreadPool threads(cpus);
    Driver driver(model, kernels_, threads, kTokens, 4);
    return driver.Step({{0, tokens}});
  }
};

TEST_P(BatchInvariance, PromptInChunksOfAnySize) {
  const int cpus[] = {-1, -1};
  ThreadPool threads(cpus);
  for (const TestModel& model : models_) {
    const std::vector<TokenId> tokens = Tokens(model.Spec(), 5, kTokens);
    const std::vector<float> want = Alone(model, tokens);
    for (const int size : {1, 7, 16, 31}) {
      Driver driver(model, kernels_, threads, kTokens, 4);
      std::vector<float> got;
      for (int begin = 0; begin < kTokens; begin += size) {
        const int end = std::min(kTokens, begin + size);
        const std::vector<float> part = driver.Step({{0, {tokens.begin() + begin, tokens.begin() + end}}});
        got.insert(got.end(), part.begin(), part.end());
      }
      EXPECT_EQ(0, std::memcmp(want.data(), got.data(), want.size() * sizeof(float))) << "chunks of " << size;
    }
  }
}

TEST_P(BatchInvariance, BatchOf32WithOthersOnAnyNumberOfDevicesAndThreads) {
  for (const TestModel& model : models_) {
    const std::size_t vocab = model.Spec().vocab;
    const std::vector<TokenId> tokens = Tokens(model.Spec(), 5, kTokens);
    const std::vector<float> want = Alone(model, tokens);
    for (const int devices : {1, 2, 3, 5}) {
      const std::vector<int> cpus(devices, -1);
      ThreadPool threads(cpus);
      Driver driver(model, kernels_, threads, 400, 200, devices);
      // 31 others with prompts of their own lengths; ours is prefilled in chunks of 10 among them, then one
      // by one.
      std::vector<Driver::Part> parts;
      for (int other = 1; other < 32; ++other)
        parts.push_back({other, Tokens(model.Spec(), 100 + other, 1 + other % 13)});
      std::vector<float> got;
      for (int begin = 0; begin < kTokens;) {
        const int end = begin < 30 ? begin + 10 : begin + 1;
        const std::size_t place = static_cast<std::size_t>(begin) % parts.size();
        parts.insert(parts.begin() + place, {0, {tokens.begin() + begin, tokens.begin() + end}});
        std::size_t first_row = 0;
        for (std::size_t i = 0; i < place; ++i) first_row += parts[i].tokens.size();
        const std::vector<float> logits = driver.Step(parts);
        got.insert(got.end(), logits.begin() + first_row * vocab,
                   logits.begin() + (first_row + end - begin) * vocab);
        parts.erase(parts.begin() + place);
        for (Driver::Part& part : parts) part.tokens = Tokens(model.Spec(), 1000 + begin + part.sequence, 1);
        begin = end;
      }
      ASSERT_EQ(want.size(), got.size());
      EXPECT_EQ(0, std::memcmp(want.data(), got.data(), want.size() * sizeof(float)))
          << devices << " devices";
    }
  }
}

// A step that died half way is begun again: what it wrote does no harm.
TEST_P(BatchInvariance, RepeatedStepGivesTheSame) {
  const int cpus[] = {-1};
  ThreadPool threads(cpus);
  const TestModel& model = models_[0];
  const std::vector<TokenId> tokens = Tokens(model.Spec(), 5, kTokens);
  const core::ModelSpec& spec = model.Spec();
  const KvLayout layout = KvLayout::Of(spec, kernels_.kv_element_bytes);
  testing::Blob memory(4 * layout.BlockBytes());
  memory.Fill(0xff);
  std::byte* const chunk = memory.data();
  const KvCache kv{layout, &chunk, 4};
  const std::uint32_t table[] = {2, 0, 3};
  const Chunk chunks[] = {{0, kTokens, 0, table}};
  Forward forward(spec, kernels_, threads, kTokens);
  const auto run = [&] {
    forward.Begin(model.Shared(), tokens, chunks);
    forward.Attention(0, model.Shared(), kv);
    forward.DenseMlp(1, model.Shared());
    std::vector<float> logits(spec.vocab);
    const int last[] = {kTokens - 1};
    forward.Logits(model.Shared(), last, logits.data());
    return logits;
  };
  const std::vector<float> whole = run();
  forward.Begin(model.Shared(), tokens, chunks);
  forward.Attention(0, model.Shared(), kv);
  EXPECT_EQ(whole, run());
}

INSTANTIATE_TEST_SUITE_P(Tables, BatchInvariance, ::testing::ValuesIn([] {
                           std::vector<std::string> names;
                           for (const Kernels* table : AvailableKernels()) names.emplace_back(table->name);
                           return names;
                         }()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace elasticmoe::compute
