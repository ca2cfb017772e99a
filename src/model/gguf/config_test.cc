// What GGUF's metadata of the architectures with keys of their own come to.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/gguf/gguf.h"
#include "model/gguf/model.h"
#include "model/gguf/writer.h"

namespace elasticmoe::model {
namespace {

using testing::HasSubstr;

GgufWriter Writer(const char* architecture, const std::vector<std::pair<const char*, int>>& counts) {
  GgufWriter writer;
  writer.Add("general.architecture", std::string(architecture));
  writer.AddTensor("token_embd.weight", {90, 64}, Encoding::kF16);
  writer.Add(fmt::format("{}.attention.layer_norm_rms_epsilon", architecture), 1e-5F);
  for (const auto& [key, value] : counts)
    writer.Add(fmt::format("{}.{}", architecture, key), static_cast<std::uint32_t>(value));
  return writer;
}

Gguf Parsed(const GgufWriter& writer) {
  const std::string header = writer.Header();
  return *ParseGguf(header, header.size() + writer.DataBytes());
}

Expected<core::ModelSpec> SpecOf(const Gguf& gguf) {
  EM_ASSIGN_OR_RETURN(const Json config, GgufConfig(gguf));
  EM_ASSIGN_OR_RETURN(const Family* family, FamilyOf(config));
  return family->Spec(config);
}

const std::vector<std::pair<const char*, int>> kDeepseek = {{"block_count", 3},
                                                            {"context_length", 64},
                                                            {"embedding_length", 64},
                                                            {"feed_forward_length", 96},
                                                            {"attention.head_count", 4},
                                                            {"attention.kv_lora_rank", 32},
                                                            {"attention.q_lora_rank", 24},
                                                            {"rope.dimension_count", 8},
                                                            {"expert_count", 16},
                                                            {"expert_used_count", 4},
                                                            {"expert_feed_forward_length", 32},
                                                            {"expert_shared_count", 2},
                                                            {"leading_dense_block_count", 1}};

std::vector<std::pair<const char*, int>> With(std::vector<std::pair<const char*, int>> counts,
                                              std::vector<std::pair<const char*, int>> more) {
  counts.insert(counts.end(), more.begin(), more.end());
  return counts;
}

TEST(GgufConfigs, OfDeepseekHaveTheirHeadsInBothForms) {
  // Before llama.cpp's absorbed attention, and since.
  const auto older = With(kDeepseek, {{"attention.key_length", 24}, {"attention.value_length", 20}});
  const auto newer = With(kDeepseek, {{"attention.key_length", 40},
                                      {"attention.value_length", 32},
                                      {"attention.key_length_mla", 24},
                                      {"attention.value_length_mla", 20}});
  for (const auto& counts : {older, newer}) {
    GgufWriter writer = Writer("deepseek2", counts);
    writer.Add("deepseek2.rope.scaling.type", std::string("yarn"));
    writer.Add("deepseek2.rope.scaling.factor", 40.0F);
    writer.Add("deepseek2.rope.scaling.original_context_length", std::uint32_t{32});
    writer.Add("deepseek2.rope.scaling.yarn_log_multiplier", 0.0707F);
    writer.Add("deepseek2.expert_weights_scale", 16.0F);
    const auto spec = SpecOf(Parsed(writer));
    ASSERT_TRUE(spec) << spec.error().message;
    EXPECT_EQ(spec->family, "deepseek_v2");
    EXPECT_EQ(spec->attention.head_dim, 24);
    EXPECT_EQ(spec->attention.RopeDim(), 8);
    EXPECT_EQ(spec->attention.value_dim, 20);
    EXPECT_DOUBLE_EQ(spec->attention.rope.mscale_all_dim, 0.707);
    EXPECT_EQ(spec->attention.rope.amplitude, 1.0);
    EXPECT_EQ(spec->moe.shared_width, 64);
    EXPECT_EQ(spec->moe.scaling, 16.0F);
    EXPECT_FALSE(spec->layers[0].moe);
    EXPECT_TRUE(spec->layers[1].moe);
  }
}

TEST(GgufConfigs, OfDeepseekNameTheirLatentsInBothForms) {
  const auto counts = With(kDeepseek, {{"attention.key_length", 24}, {"attention.value_length", 20}});
  GgufWriter writer = Writer("deepseek2", counts);
  const core::ModelSpec spec = *SpecOf(Parsed(writer));
  const std::vector<TensorName> needed = {{TensorRole::kO, 0, -1, "o", {64, 80}},
                                          {TensorRole::kKvUp, 0, -1, "a.kv_b_proj.weight", {144, 32}}};
  EXPECT_EQ(GgufNeeded(Parsed(writer), spec, needed).size(), 2u);
  writer.AddTensor("blk.0.attn_k_b.weight", {4, 32, 16}, Encoding::kF16);
  const auto both = GgufNeeded(Parsed(writer), spec, needed);
  ASSERT_EQ(both.size(), 3u);
  EXPECT_EQ(both[1].name, "a.k_b_proj.weight");
  EXPECT_EQ(both[1].shape, (std::vector<std::int64_t>{4, 32, 16}));
  EXPECT_EQ(both[2].role, TensorRole::kValueUp);
  EXPECT_EQ(both[2].shape, (std::vector<std::int64_t>{4, 20, 32}));
}

TEST(GgufConfigs, GatingDecidesBetweenFamilies) {
  const auto family = [](const char* architecture, int gating) {
    const auto spec = SpecOf(Parsed(Writer(architecture, With(kDeepseek, {{"attention.key_length", 24},
                                                                          {"attention.value_length", 20},
                                                                          {"expert_gating_func", gating}}))));
    return spec ? spec->family : spec.error().message;
  };
  EXPECT_EQ(family("deepseek2", 1), "deepseek_v2");
  EXPECT_EQ(family("deepseek2", 2), "deepseek_v3");
  EXPECT_THAT(family("deepseek2", 3), HasSubstr("expert_gating_func=3"));
  EXPECT_THAT(family("qwen3moe", 2), HasSubstr("expert_gating_func=2"));
  EXPECT_THAT(family("nobody", 1), HasSubstr("deepseek2 with experts, glm4moe with experts"));
}

TEST(GgufConfigs, PredictionLayersAreNotLayers) {
  const std::vector<std::pair<const char*, int>> counts = {{"block_count", 4},
                                                           {"nextn_predict_layers", 1},
                                                           {"context_length", 64},
                                                           {"embedding_length", 64},
                                                           {"feed_forward_length", 96},
                                                           {"attention.head_count", 4},
                                                           {"attention.head_count_kv", 2},
                                                           {"attention.key_length", 16},
                                                           {"attention.value_length", 16},
                                                           {"rope.dimension_count", 8},
                                                           {"expert_count", 8},
                                                           {"expert_used_count", 2},
                                                           {"expert_feed_forward_length", 32},
                                                           {"expert_shared_count", 1},
                                                           {"leading_dense_block_count", 1}};
  const auto spec = SpecOf(Parsed(Writer("glm4moe", counts)));
  ASSERT_TRUE(spec) << spec.error().message;
  EXPECT_EQ(spec->LayerCount(), 3);
  EXPECT_EQ(spec->attention.RopeDim(), 8);
  EXPECT_FALSE(spec->attention.qk_norm);  // there is no such tensor
}

}  // namespace
}  // namespace elasticmoe::model
