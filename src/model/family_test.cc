#include "model/family.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "base/check.h"
#include "base/file.h"
#include "model/inspect.h"

namespace elasticmoe::model {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr const char* kFamilies[] = {"qwen3_moe",        "mixtral",     "qwen2_moe", "olmoe",
                                     "deepseek_v2_lite", "deepseek_v3", "glm4_moe",  "gpt_oss_mxfp4"};

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
  for (const char* name : kFamilies) {
    Json config = GoldenConfig(name);
    if (config["model_type"] == "qwen3_moe") config["mlp_only_layers"] = {1};
    if (config["rope_scaling"].is_object()) config.erase("rope_scaling");  // written in one form out of many
    config["eos_token_id"] = {1, 2};
    config["bos_token_id"] = nullptr;  // the spec has no use for it
    const Family& family = **FamilyOf(config);
    const Json written = family.Config(*SpecOf(config));
    for (const auto& [key, value] : written.items()) {
      if (config.contains(key)) {
        EXPECT_EQ(value, config[key]) << name << " " << key;
      }
    }
    EXPECT_EQ(family.Config(*SpecOf(written)), written);
  }
}

TEST(Family, WritesEveryScalingWindowAndOptionThatItReads) {
  const auto expect = [](const char* name, const Json& changes) {
    Json config = GoldenConfig(name);
    config.update(changes);
    const auto spec = SpecOf(config);
    ASSERT_TRUE(spec) << spec.error().message;
    const Family& family = **FamilyOf(config);
    const Json written = family.Config(*spec);
    const auto again = SpecOf(written);
    ASSERT_TRUE(again) << again.error().message;
    EXPECT_EQ(family.Config(*again), written);
    EXPECT_EQ(again->attention.scale, spec->attention.scale) << name;
    EXPECT_EQ(again->attention.rope.amplitude, spec->attention.rope.amplitude) << name;
    EXPECT_EQ(family.Tensors(*again).size(), family.Tensors(*spec).size()) << name;
  };
  for (const char* name : kFamilies) expect(name, Json::object());
  for (const char* name : {"qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe"}) {
    expect(name, {{"rope_scaling", {{"type", "linear"}, {"factor", 4}}}});
    expect(name, {{"rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}, {"attention_factor", 0.7}}}});
    expect(name, {{"rope_scaling", {{"rope_type", "llama3"}, {"factor", 8.0}}}});
  }
  expect("qwen3_moe", {{"use_sliding_window", true}, {"sliding_window", 12}});
  expect("qwen2_moe", {{"use_sliding_window", true}, {"sliding_window", 12}, {"max_window_layers", 1}});
  expect("mixtral", {{"sliding_window", 12}});
  expect("deepseek_v3", {{"rope_interleave", false}});
  expect("deepseek_v3",
         {{"rope_scaling", {{"rope_type", "linear"}, {"factor", 4.0}, {"mscale_all_dim", 0.8}}}});
  expect("olmoe", {{"clip_qkv", 7.3}, {"attention_bias", true}, {"norm_topk_prob", true}});
  expect("deepseek_v2_lite",
         {{"n_shared_experts", nullptr}, {"moe_layer_freq", 2}, {"attention_bias", true}});
  expect(
      "deepseek_v2_lite",
      {{"topk_method", "group_limited_greedy"}, {"n_group", 4}, {"topk_group", 2}, {"norm_topk_prob", true}});
  expect("glm4_moe", {{"use_qk_norm", false}, {"first_k_dense_replace", 0}, {"n_shared_experts", 0}});
}

TEST(Family, WritesTheFamiliesWithoutGoldens) {
  const Json sizes = {{"vocab_size", 90},           {"hidden_size", 48},    {"num_hidden_layers", 6},
                      {"num_attention_heads", 4},   {"head_dim", 16},       {"max_position_embeddings", 64},
                      {"intermediate_size", 70},    {"num_experts", 8},     {"num_experts_per_tok", 3},
                      {"moe_intermediate_size", 4}, {"moe_num_experts", 8}, {"moe_k", 2}};
  const auto expect = [&](const char* type, const Json& changes) {
    Json config = sizes;
    config["model_type"] = type;
    config.update(changes);
    const auto spec = SpecOf(config);
    ASSERT_TRUE(spec) << spec.error().message;
    const Family& family = **FamilyOf(config);
    const auto again = SpecOf(family.Config(*spec));
    ASSERT_TRUE(again) << again.error().message;
    EXPECT_EQ(family.Config(*again), family.Config(*spec));
    ASSERT_EQ(family.Tensors(*again).size(), family.Tensors(*spec).size());
    for (std::size_t layer = 0; layer < spec->layers.size(); ++layer) {
      EXPECT_EQ(again->layers[layer].moe, spec->layers[layer].moe) << type << " " << layer;
      EXPECT_EQ(again->layers[layer].window, spec->layers[layer].window) << type << " " << layer;
    }
  };
  expect("bailing_moe", {{"norm_topk_prob", true}, {"num_shared_experts", 2}, {"first_k_dense_replace", 2}});
  expect("bailing_moe_v2",
         {{"partial_rotary_factor", 0.5}, {"use_qk_norm", true}, {"n_group", 4}, {"topk_group", 2}});
  expect("ernie4_5_moe", {{"moe_layer_start_index", 1}, {"moe_num_shared_experts", 2}});
  expect("ernie4_5_moe", {{"moe_layer_interval", 2}, {"moe_layer_end_index", 3}});
  expect("ernie4_5_moe", {{"moe_layer_interval", 5}});
  expect("ernie4_5_moe", {{"moe_layer_start_index", 6}});
  expect("ernie4_5_moe", {{"moe_use_aux_free", false}});
  expect("bailing_moe", {{"use_bias", true},
                         {"num_shared_experts", 1},
                         {"moe_shared_expert_intermediate_size", 6},
                         {"rotary_dim", 16}});
  expect("gpt_oss", {{"num_local_experts", 4}, {"sliding_window", 12}, {"swiglu_limit", 3.5}});
}

TEST(Family, TakesWhatIsLeftOutAsTheOriginalsConfigDoes) {
  const auto without = [](const char* name, std::initializer_list<const char*> keys) {
    Json config = GoldenConfig(name);
    for (const char* key : keys) config.erase(key);
    const auto spec = SpecOf(config);
    EM_CHECK(spec.has_value(), "{}", spec.error().message);
    return *spec;
  };
  for (const char* name : {"mixtral", "olmoe", "glm4_moe", "gpt_oss_mxfp4"})
    EXPECT_EQ(without(name, {"rms_norm_eps"}).rms_eps, 1e-5F) << name;
  EXPECT_EQ(without("qwen3_moe", {"rms_norm_eps"}).rms_eps, 1e-6F);
  EXPECT_EQ(without("mixtral", {"rope_theta"}).attention.rope_theta, 1e6);
  const auto gpt_oss = without("gpt_oss_mxfp4", {"rope_scaling", "rope_theta"});
  EXPECT_EQ(gpt_oss.attention.rope_theta, 150000.0);
  EXPECT_EQ(gpt_oss.attention.rope.factor, 32.0);
  EXPECT_FALSE(gpt_oss.attention.rope.truncate);
  Json none = GoldenConfig("gpt_oss_mxfp4");
  none["rope_scaling"] = nullptr;  // there, and nothing
  EXPECT_EQ(SpecOf(none)->attention.rope.scaling, core::RopeSpec::Scaling::kNone);
  const auto v3 = without("deepseek_v3", {"routed_scaling_factor", "norm_topk_prob"});
  EXPECT_EQ(v3.moe.scaling, 2.5F);
  EXPECT_TRUE(v3.moe.renormalize);
  EXPECT_FALSE(without("deepseek_v2_lite", {"norm_topk_prob"}).moe.renormalize);
}

TEST(Family, ReadsTheKeysOfNewerVersions) {
  Json config = GoldenConfig("qwen3_moe");
  config["num_local_experts"] = config["num_experts"];
  for (const char* key : {"num_experts", "rope_theta", "rope_scaling", "torch_dtype"}) config.erase(key);
  config["dtype"] = "bfloat16";
  config["rope_parameters"] = {{"rope_type", "yarn"}, {"rope_theta", 3e6}, {"factor", 4.0}};
  const auto spec = SpecOf(config);
  ASSERT_TRUE(spec) << spec.error().message;
  EXPECT_EQ(spec->moe.experts, 8);
  EXPECT_EQ(spec->attention.rope_theta, 3e6);
  EXPECT_EQ(spec->attention.rope.factor, 4.0);
  Json gpt_oss = GoldenConfig("gpt_oss_mxfp4");
  gpt_oss["experts_per_token"] = gpt_oss["num_experts_per_tok"];
  gpt_oss.erase("num_experts_per_tok");
  EXPECT_EQ(SpecOf(gpt_oss)->moe.top_k, SpecOf(GoldenConfig("gpt_oss_mxfp4"))->moe.top_k);
  config["hidden_act"] = "swish";
  EXPECT_TRUE(SpecOf(config));
}

TEST(Family, ReadsTheFormsOfScaling) {
  Json config = GoldenConfig("qwen3_moe");
  config["max_position_embeddings"] = 4096;
  config["rope_scaling"] = {{"rope_type", "dynamic"}, {"factor", 2.0}};  // nothing within the context
  EXPECT_EQ(SpecOf(config)->attention.rope.scaling, core::RopeSpec::Scaling::kNone);
  config["rope_scaling"] = {{"rope_type", "yarn"}, {"original_max_position_embeddings", 1024}};
  EXPECT_EQ(SpecOf(config)->attention.rope.factor, 4.0);
  config["rope_scaling"]["original_max_position_embeddings"] = 8192;
  EXPECT_THAT(SpecOf(config).error().message, HasSubstr("factor is missing"));
  // DeepSeek's correction of the scores goes with every scaling.
  Json v3 = GoldenConfig("deepseek_v3");
  v3["rope_scaling"] = {{"rope_type", "linear"}, {"factor", 4.0}};
  const float plain = SpecOf(v3)->attention.scale;
  v3["rope_scaling"]["mscale_all_dim"] = 1.0;
  const float correction = static_cast<float>(0.1 * std::log(4.0) + 1.0);
  EXPECT_FLOAT_EQ(SpecOf(v3)->attention.scale, plain * correction * correction);
  v3["rope_interleave"] = false;
  EXPECT_FALSE(SpecOf(v3)->attention.rope.interleaved);
}

TEST(Family, ReadsWindowsFromALayerOn) {
  Json config = GoldenConfig("qwen3_moe");
  config["use_sliding_window"] = true;
  config["sliding_window"] = 12;
  config.erase("max_window_layers");
  EXPECT_EQ(SpecOf(config)->layers[0].window, 12);
  config["max_window_layers"] = 2;
  EXPECT_EQ(SpecOf(config)->layers[1].window, 0);
  EXPECT_EQ(SpecOf(config)->layers[2].window, 12);
}

TEST(Family, ReadsGptOss) {
  const auto spec = SpecOf(GoldenConfig("gpt_oss_mxfp4"));
  ASSERT_TRUE(spec) << spec.error().message;
  EXPECT_TRUE(spec->attention.sinks && spec->attention.qkv_bias && spec->attention.o_bias);
  EXPECT_TRUE(spec->moe.router_bias && spec->moe.expert_bias && spec->moe.renormalize);
  EXPECT_EQ(spec->activation.limit, 7.0F);
  EXPECT_EQ(spec->layers[0].window, 8);
  EXPECT_EQ(spec->layers[1].window, 0);
  EXPECT_FALSE(spec->attention.rope.truncate);
  Json config = GoldenConfig("gpt_oss_mxfp4");
  config.erase("layer_types");  // then every other layer, the first one with a window
  EXPECT_EQ(SpecOf(config)->layers[2].window, 8);
  EXPECT_EQ(SpecOf(config)->layers[3].window, 0);
}

TEST(Family, TellsAllThatIsNotSupportedAtOnce) {
  Json config = GoldenConfig("deepseek_v3");
  config["hidden_act"] = "gelu";
  config["rope_scaling"] = {{"rope_type", "longrope"}, {"factor", 4.0}};
  config["layer_types"] = {"linear_attention", "linear_attention", "full_attention"};
  config["scoring_func"] = "softmax";
  config["topk_method"] = "greedy";
  Error error = SpecOf(config).error();
  EXPECT_EQ(error.code, ErrorCode::kUnimplemented);
  for (const char* text : {"hidden_act=\"gelu\"", "rope_scaling: rope_type=\"longrope\"", "linear_attention",
                           "scoring_func=\"softmax\"", "topk_method=\"greedy\""})
    EXPECT_THAT(error.message, HasSubstr(text));
  EXPECT_EQ(error.message.find("linear_attention"), error.message.rfind("linear_attention"));  // told once
  config["n_group"] = 3;  // a wrong value comes last
  error = SpecOf(config).error();
  EXPECT_THAT(error.message, AllOf(HasSubstr("gelu"), HasSubstr("n_group=3")));
}

TEST(Family, ReadsTheRulesOfEachRouting) {
  const auto v2 = SpecOf(GoldenConfig("deepseek_v2_lite"));
  ASSERT_TRUE(v2) << v2.error().message;
  EXPECT_EQ(v2->attention.LatentDim(), 40);
  EXPECT_EQ(v2->attention.head_dim, 24);
  EXPECT_EQ(v2->moe.shared_width, 64);
  EXPECT_FALSE(v2->layers[0].moe);
  Json config = GoldenConfig("deepseek_v2_lite");
  config["routed_scaling_factor"] = 16.0;
  EXPECT_EQ(SpecOf(config)->moe.scaling, 16.0F);
  config["norm_topk_prob"] = true;  // V2 scales or renormalises, V3 does both
  EXPECT_EQ(SpecOf(config)->moe.scaling, 1.0F);
  const auto v3 = SpecOf(GoldenConfig("deepseek_v3"));
  ASSERT_TRUE(v3) << v3.error().message;
  EXPECT_TRUE(v3->moe.renormalize && v3->moe.correction);
  EXPECT_EQ(v3->moe.scaling, 2.5F);
  EXPECT_FALSE(v3->moe.left_out_as_zero);
  EXPECT_TRUE(SpecOf(GoldenConfig("glm4_moe"))->moe.left_out_as_zero);
  EXPECT_EQ(SpecOf(GoldenConfig("glm4_moe"))->attention.RopeDim(), 16);
}

// From the model cards.
TEST(Family, FiguresAreThePublishedOnes) {
  const auto figures = [](const Json& config) {
    const auto spec = SpecOf(config);
    EM_CHECK(spec.has_value(), "{}", spec.error().message);
    return FiguresOf(*spec, (*FamilyOf(config))->Tensors(*spec));
  };
  Json qwen3 = GoldenConfig("qwen3_moe");
  qwen3.update({{"vocab_size", 151936}, {"hidden_size", 2048}, {"num_hidden_layers", 48}});
  qwen3.update({{"num_attention_heads", 32}, {"num_key_value_heads", 4}, {"head_dim", 128}});
  qwen3.update({{"num_experts", 128}, {"num_experts_per_tok", 8}, {"moe_intermediate_size", 768}});
  const ModelFigures a3b = figures(qwen3);
  EXPECT_NEAR(static_cast<double>(a3b.parameters), 30.5e9, 0.05e9);
  EXPECT_NEAR(static_cast<double>(a3b.active_parameters), 3.3e9, 0.06e9);
  EXPECT_EQ(a3b.expert_parameters, 3u * 2048 * 768);
  EXPECT_EQ(a3b.kv_values_per_token, 48u * 2 * 4 * 128);

  Json lite = GoldenConfig("deepseek_v2_lite");
  lite.update({{"vocab_size", 102400}, {"hidden_size", 2048}, {"num_hidden_layers", 27}});
  lite.update({{"num_attention_heads", 16}, {"kv_lora_rank", 512}, {"qk_nope_head_dim", 128}});
  lite.update({{"qk_rope_head_dim", 64}, {"v_head_dim", 128}, {"n_routed_experts", 64}});
  lite.update({{"num_experts_per_tok", 6}, {"moe_intermediate_size", 1408}, {"intermediate_size", 10944}});
  const ModelFigures v2_lite = figures(lite);
  EXPECT_NEAR(static_cast<double>(v2_lite.parameters), 15.7e9, 0.05e9);
  EXPECT_EQ(v2_lite.kv_values_per_token, 27u * 576);

  Json v3 = GoldenConfig("deepseek_v3");
  v3.update({{"vocab_size", 129280}, {"hidden_size", 7168}, {"num_hidden_layers", 61}});
  v3.update({{"num_attention_heads", 128}, {"q_lora_rank", 1536}, {"kv_lora_rank", 512}});
  v3.update({{"qk_nope_head_dim", 128}, {"qk_rope_head_dim", 64}, {"v_head_dim", 128}});
  v3.update({{"n_routed_experts", 256}, {"num_experts_per_tok", 8}, {"moe_intermediate_size", 2048}});
  v3.update({{"intermediate_size", 18432}, {"first_k_dense_replace", 3}, {"n_group", 8}, {"topk_group", 4}});
  const ModelFigures v3_figures = figures(v3);
  EXPECT_NEAR(static_cast<double>(v3_figures.parameters), 671e9, 0.5e9);
  EXPECT_NEAR(static_cast<double>(v3_figures.active_parameters), 37e9, 0.6e9);
}

TEST(Family, ReadsDenseDecoders) {
  Json config = GoldenConfig("qwen3_moe");
  config["attention_bias"] = true;
  const auto tensors = [&](const char* type) {
    config["model_type"] = type;
    const auto spec = SpecOf(config);
    EM_CHECK(spec.has_value(), "{}", spec.error().message);
    EXPECT_EQ(spec->moe.experts, 0);
    std::vector<std::string> names;
    for (const TensorName& tensor : (*FamilyOf(config))->Tensors(*spec)) names.push_back(tensor.name);
    return names;
  };
  using testing::Contains;
  using testing::Not;
  const std::string o_bias = "model.layers.0.self_attn.o_proj.bias";
  const std::string q_bias = "model.layers.2.self_attn.q_proj.bias";
  EXPECT_THAT(tensors("llama"), AllOf(Contains(o_bias), Contains(q_bias)));
  EXPECT_THAT(tensors("qwen3"), AllOf(Contains(o_bias), Contains("model.layers.1.self_attn.q_norm.weight")));
  EXPECT_THAT(tensors("qwen2"), AllOf(Not(Contains(o_bias)), Contains(q_bias)));
  EXPECT_THAT(tensors("mistral"), Not(Contains(q_bias)));
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
  expect("model_type", "gpt2", "supported: qwen3_moe, mixtral");
  expect("rope_scaling", {{"rope_type", "longrope"}, {"factor", 4.0}}, "longrope");
  expect("rope_scaling", {{"factor", 4.0}}, "factor");
  expect("rope_parameters", {{"rope_type", "ntk"}}, "ntk");
  expect("rope_parameters",
         {{"full_attention", {{"rope_theta", 1e4}}}, {"sliding_attention", {{"rope_theta", 1e5}}}},
         "full_attention");
  expect("rope_parameters", {{"rope_type", "default"}, {"partial_rotary_factor", 0.5}},
         "rope_parameters: partial_rotary_factor=0.5");
  expect("partial_rotary_factor", 0.5, "0.5");
  expect("scoring_func", "softmax", "softmax", "deepseek_v3");
  expect("topk_method", "greedy", "greedy", "deepseek_v3");
  expect("topk_method", "noaux_tc", "noaux_tc", "deepseek_v2_lite");
  expect("rope_interleave", false, "false", "deepseek_v2_lite");
  expect("mlp_bias", true, "true", "deepseek_v2_lite");
  expect("hidden_act", "gelu", "gelu");
  expect("layer_types", {"full_attention", "sliding_attention"}, "sliding_attention");
  expect("layer_types", {"full_attention", "linear_attention", "full_attention"}, "linear_attention",
         "mixtral");
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
  expect("rope_scaling", {{"rope_type", "yarn"}}, "factor is missing");
  expect("model_type", 3, "model_type=3");
  expect("model_type", nullptr, "is missing");
}

TEST(Family, NamesTheKeyOfWrongGroupsAndHeads) {
  const auto expect = [](const char* name, const char* key, const Json& value, const char* found) {
    const Error error = ErrorWith(key, value, name);
    EXPECT_EQ(error.code, ErrorCode::kInvalidArgument) << error.message;
    EXPECT_THAT(error.message, AllOf(HasSubstr(key), HasSubstr(found)));
  };
  expect("deepseek_v3", "n_group", 3, "divisor of the 16");
  expect("deepseek_v3", "topk_group", 5, "n_group=4");
  expect("deepseek_v3", "num_experts_per_tok", 9, "at most the 8");
  expect("deepseek_v3", "qk_rope_head_dim", 7, "even");
  expect("deepseek_v3", "kv_lora_rank", 4096, "=4096");
  expect("deepseek_v3", "v_head_dim", nullptr, "is missing");
  expect("glm4_moe", "partial_rotary_factor", 0.1, "even part of head_dim=32");
  expect("qwen2_moe", "shared_expert_intermediate_size", nullptr, "is missing");
  expect("mixtral", "layer_types", {"full_attention"}, "num_hidden_layers=3");
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
