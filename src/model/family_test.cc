#include "model/family.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/file.h"

namespace elasticmoe::model {
namespace {

using testing::AllOf;
using testing::HasSubstr;

Json GoldenConfig(const std::string& name) {
  return *ParseJson(*ReadFile(std::string(ELASTICMOE_TESTDATA "/goldens/") + name + "/config.json"));
}

Expected<core::ModelSpec> SpecOf(const Json& config) {
  const auto family = FamilyOf(config);
  if (!family) return tl::unexpected<Error>(family.error());
  return (*family)->Spec(config);
}

// The error after one key of a valid config has been changed.
Error ErrorWith(const char* key, const Json& value, const std::string& family = "qwen3_moe") {
  Json config = GoldenConfig(family);
  config[key] = value;
  const auto spec = SpecOf(config);
  if (spec) return {ErrorCode::kInternal, fmt::format("{}={}: no error", key, value.dump())};
  return spec.error();
}

TEST(Family, ReadsQwen3Moe) {
  const auto spec = SpecOf(GoldenConfig("qwen3_moe"));
  ASSERT_TRUE(spec) << spec.error().message;
  EXPECT_EQ(spec->family, "qwen3_moe");
  EXPECT_EQ(spec->attention.head_dim, 32);
  EXPECT_TRUE(spec->attention.qk_norm);
  EXPECT_FLOAT_EQ(spec->attention.scale, 0.17677669F);
  EXPECT_EQ(spec->moe.experts, 8);
  EXPECT_EQ(spec->moe.top_k, 2);
  EXPECT_TRUE(spec->moe.renormalize);
  EXPECT_EQ(spec->LayerCount(), 3);
  EXPECT_EQ(spec->eos_ids, std::vector<TokenId>{1});
}

TEST(Family, ReadsMixtral) {
  const auto spec = SpecOf(GoldenConfig("mixtral"));
  ASSERT_TRUE(spec) << spec.error().message;
  EXPECT_FALSE(spec->attention.qk_norm);
  EXPECT_EQ(spec->attention.head_dim, 16);  // hidden / heads: the key is absent
  EXPECT_EQ(spec->moe.expert_width, 96);
  EXPECT_TRUE(spec->moe.renormalize);
  EXPECT_DOUBLE_EQ(spec->attention.rope_theta, 1e6);
}

TEST(Family, PutsDenseLayersAmongMoeLayers) {
  Json config = GoldenConfig("qwen3_moe");
  config["num_hidden_layers"] = 6;
  config["mlp_only_layers"] = {3, 5, 99};
  config["decoder_sparse_step"] = 2;
  const auto spec = SpecOf(config);
  ASSERT_TRUE(spec) << spec.error().message;
  std::vector<bool> moe;
  for (const core::LayerSpec& layer : spec->layers) moe.push_back(layer.moe);
  EXPECT_EQ(moe, (std::vector<bool>{false, true, false, false, false, false}));
  EXPECT_EQ(spec->layers[0].dense_width, 96);
  EXPECT_EQ(spec->layers[1].dense_width, 0);
  const auto tensors = (*FindFamily("qwen3_moe"))->Tensors(*spec);
  EXPECT_EQ(std::ranges::count(tensors, TensorRole::kDenseDown, &TensorName::role), 5);
  EXPECT_EQ(std::ranges::count(tensors, TensorRole::kExpertDown, &TensorName::role), 8);
}

TEST(Family, AddsBiasesAndDropsATiedHead) {
  Json config = GoldenConfig("qwen3_moe");
  config["attention_bias"] = true;
  config["tie_word_embeddings"] = true;
  const auto spec = SpecOf(config);
  ASSERT_TRUE(spec) << spec.error().message;
  const auto tensors = (*FindFamily("qwen3_moe"))->Tensors(*spec);
  EXPECT_EQ(std::ranges::count(tensors, TensorRole::kLmHead, &TensorName::role), 0);
  const auto bias = std::ranges::find(tensors, TensorRole::kKBias, &TensorName::role);
  ASSERT_NE(bias, tensors.end());
  EXPECT_EQ(bias->name, "model.layers.0.self_attn.k_proj.bias");
  EXPECT_EQ(bias->shape, std::vector<std::int64_t>{64});
}

TEST(Family, WritesTheConfigThatItReads) {
  for (const char* name : {"qwen3_moe", "mixtral"}) {
    Json config = GoldenConfig(name);
    if (config["model_type"] == "qwen3_moe") config["mlp_only_layers"] = {1};
    config["eos_token_id"] = {1, 2};
    config["bos_token_id"] = nullptr;  // the spec has no use for it
    const Family& family = **FamilyOf(config);
    const Json written = family.Config(*SpecOf(config));
    for (const auto& [key, value] : written.items()) {
      if (config.contains(key)) {
        EXPECT_EQ(value, config[key]) << key;
      }
    }
    EXPECT_EQ(family.Config(*SpecOf(written)), written);
  }
}

TEST(Family, TakesEveryUsualFormOfEosAndRope) {
  Json config = GoldenConfig("qwen3_moe");
  config["eos_token_id"] = nullptr;
  config.erase("rope_theta");
  config["rope_scaling"] = {{"type", "default"}};
  config["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 5000000}};
  const auto spec = SpecOf(config);
  ASSERT_TRUE(spec) << spec.error().message;
  EXPECT_TRUE(spec->eos_ids.empty());
  EXPECT_DOUBLE_EQ(spec->attention.rope_theta, 5e6);
}

TEST(Family, NamesWhatItDoesNotSupport) {
  const auto expect = [](const char* key, const Json& value, const char* found,
                         const char* family = "qwen3_moe") {
    const Error error = ErrorWith(key, value, family);
    EXPECT_EQ(error.code, ErrorCode::kUnimplemented) << error.message;
    EXPECT_THAT(error.message, AllOf(HasSubstr(key), HasSubstr(found)));
  };
  expect("model_type", "llama", "supported: qwen3_moe, mixtral");
  expect("rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}}, "yarn");
  expect("rope_scaling", {{"factor", 4.0}}, "factor");
  expect("rope_parameters", {{"type", "linear"}}, "linear");
  expect("partial_rotary_factor", 0.5, "0.5");
  expect("use_sliding_window", true, "true");
  expect("hidden_act", "gelu", "gelu");
  expect("layer_types", {"full_attention", "sliding_attention"}, "sliding_attention");
  expect("sliding_window", 128, "128", "mixtral");
}

TEST(Family, NamesTheKeyOfEveryWrongValue) {
  const auto expect = [](const char* key, const Json& value, const char* found) {
    const Error error = ErrorWith(key, value);
    EXPECT_EQ(error.code, ErrorCode::kInvalidArgument) << error.message;
    EXPECT_THAT(error.message, AllOf(HasSubstr(key), HasSubstr(found)));
  };
  for (const char* key : {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim",
                          "num_key_value_heads", "max_position_embeddings", "num_experts",
                          "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"}) {
    expect(key, 0, "expected an integer from 1");
    expect(key, -3, "=-3");
    expect(key, 1.5, "=1.5");
    expect(key, "many", "=\"many\"");
    expect(key, {1, 2}, "=[1,2]");
    expect(key, 2'000'000'000, "=2000000000");
    expect(key, std::uint64_t{18'446'744'073'709'551'615U}, "=18446744073709551615");
    expect(key, 1e300, "=1e+300");
  }
  expect("hidden_size", nullptr, "is missing");
  expect("head_dim", 31, "even");
  expect("num_key_value_heads", 3, "divisor");
  expect("num_experts_per_tok", 9, "from 1 to 8");
  expect("eos_token_id", 320, "from 0 to 319");
  expect("eos_token_id", {1, -1}, "[1,-1]");
  expect("eos_token_id", "end", "\"end\"");
  expect("rms_norm_eps", -1e-6, "-1e-06");
  expect("rope_theta", 0, "rope_theta=0");
  expect("rope_scaling", 3, "rope_scaling=3");
  expect("tie_word_embeddings", 1, "true or false");
  expect("norm_topk_prob", "yes", "true or false");
  expect("mlp_only_layers", {-1}, "[-1]");
  expect("mlp_only_layers", {{"a", 1}}, "{\"a\":1}");
  expect("model_type", 3, "model_type=3");
  expect("model_type", nullptr, "is missing");
}

TEST(Family, BoundsTheNumberOfTensors) {
  Json config = GoldenConfig("qwen3_moe");
  config["num_hidden_layers"] = 1024;
  config["num_experts"] = 4096;
  const auto spec = SpecOf(config);
  ASSERT_FALSE(spec);
  EXPECT_THAT(spec.error().message, HasSubstr("limit=65536"));
}

TEST(Family, RefusesAModelWithoutExpertsAndAConfigThatIsNoObject) {
  EXPECT_EQ(ErrorWith("mlp_only_layers", {0, 1, 2}).code, ErrorCode::kUnimplemented);
  for (const char* text : {"[]", "3", "null", "\"qwen3_moe\""})
    EXPECT_FALSE(SpecOf(*ParseJson(text))) << text;
  EXPECT_FALSE((*FindFamily("mixtral"))->Spec(Json::array()));
}

TEST(Family, CutsLongForeignValuesInErrors) {
  const Error error = ErrorWith("model_type", std::string(100'000, 'x') + "\n");
  EXPECT_LT(error.message.size(), 300u);
  EXPECT_EQ(error.message.find('\n'), std::string::npos);
}

}  // namespace
}  // namespace elasticmoe::model
