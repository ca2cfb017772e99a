// Families of which there are no reference logits at hand, and options that the goldens of the others do not
// have: a made model of each, written and read as its checkpoints are, against the plain formulas
// (plain_forward.h). It shows that names, settings and the
// forward pass belong together; that the settings mean what they mean in the original's code rests on reading
// it.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <map>

#include "compute/plain_forward.h"
#include "compute/test_model.h"
#include "model/gguf/export.h"
#include "model/make_model.h"

namespace elasticmoe::compute {
namespace {

using testing::Driver;
using testing::PlainForward;
using testing::TestModel;

const int kNoCpu[] = {-1, -1};

class Directory {
 public:
  Directory() {
    const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
    std::string name = test->name();
    std::ranges::replace(name, '/', '-');
    path_ = std::filesystem::path(::testing::TempDir()) / fmt::format("elasticmoe-{}-{}", name, getpid());
    std::filesystem::remove_all(path_);
  }
  ~Directory() { std::filesystem::remove_all(path_); }
  const std::filesystem::path& Path() const { return path_; }

 private:
  std::filesystem::path path_;
};

Json Sizes(const char* model_type) {
  return {{"model_type", model_type},
          {"vocab_size", 90},
          {"hidden_size", 48},
          {"num_hidden_layers", 3},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"head_dim", 16},
          {"intermediate_size", 70},
          {"moe_intermediate_size", 24},
          {"num_experts", 8},
          {"num_experts_per_tok", 3},
          {"max_position_embeddings", 64},
          {"rope_theta", 700.0},
          {"tie_word_embeddings", false}};
}

Json With(Json config, const Json& changes) {
  config.update(changes);
  return config;
}

// Of latent attention.
Json Latents(const char* model_type) {
  Json config = With(Sizes(model_type), {{"rms_norm_eps", 1e-2},
                                         {"q_lora_rank", nullptr},
                                         {"kv_lora_rank", 28},
                                         {"qk_nope_head_dim", 12},
                                         {"qk_rope_head_dim", 8},
                                         {"v_head_dim", 10},
                                         {"n_routed_experts", 8},
                                         {"n_shared_experts", 2},
                                         {"first_k_dense_replace", 1}});
  config.erase("head_dim");
  return config;
}

const Json kYarn = {{"rope_type", "yarn"}, {"factor", 6.0},    {"original_max_position_embeddings", 12},
                    {"beta_fast", 4.0},    {"beta_slow", 0.5}, {"truncate", false}};
const Json kLlama3 = {{"rope_type", "llama3"},
                      {"factor", 4.0},
                      {"low_freq_factor", 1.0},
                      {"high_freq_factor", 3.0},
                      {"original_max_position_embeddings", 24}};

struct Case {
  const char* name;
  Json config;
};

std::vector<float> Logits(const TestModel& model) {
  std::vector<TokenId> tokens;
  for (int i = 0; i < 24; ++i) tokens.push_back(static_cast<TokenId>(i * 37 % model.Spec().vocab));
  ThreadPool threads(kNoCpu);
  return Driver(model, *FindKernels("reference").value(), threads, 24, 2).Step({{0, tokens}});
}

// A safetensors file out of values.
class SafetensorsFile {
 public:
  void Add(const std::string& name, const std::vector<std::int64_t>& shape,
           const std::vector<float>& values) {
    const std::size_t begin = data_.size();
    for (const float value : values) {
      const Bf16 half = ToBf16(value);
      EM_CHECK(ToFloat(half) == value, "{} {}", name, value);
      data_.append(reinterpret_cast<const char*>(&half), sizeof(half));
    }
    header_[name] = {{"dtype", "BF16"}, {"shape", shape}, {"data_offsets", {begin, data_.size()}}};
  }
  void AddFloats(const std::string& name, const std::vector<std::int64_t>& shape,
                 const std::vector<float>& values) {
    const std::size_t begin = data_.size();
    data_.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
    header_[name] = {{"dtype", "F32"}, {"shape", shape}, {"data_offsets", {begin, data_.size()}}};
  }
  void Write(const std::filesystem::path& path) const {
    const std::string header = header_.dump();
    const std::uint64_t size = header.size();
    std::ofstream out(path, std::ios::binary);
    out.write(reinterpret_cast<const char*>(&size), sizeof(size));
    out << header << data_;
  }

 private:
  Json header_ = Json::object();
  std::string data_;
};

class MadeFamilies : public ::testing::TestWithParam<Case> {};

TEST_P(MadeFamilies, AgreeWithThePlainFormulas) {
  const auto spec = model::SpecOf(GetParam().config);
  ASSERT_TRUE(spec) << spec.error().message;
  Directory directory;
  model::MakeModelOptions options;
  options.directory = directory.Path();
  options.seed = 5;
  const auto made = model::WriteModel(*spec, options);
  ASSERT_TRUE(made) << made.error().message;
  const TestModel model = TestModel::Load(directory.Path());
  std::vector<TokenId> tokens;
  Rng rng(3);
  for (int i = 0; i < 40; ++i) tokens.push_back(static_cast<TokenId>(rng.Below(spec->vocab)));
  const auto want = PlainForward(model, tokens);
  ThreadPool threads(kNoCpu);
  Driver driver(model, *FindKernels("reference").value(), threads, 40, 3);
  const std::vector<float> got = driver.Step({{0, tokens}});
  double worst = 0, largest = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    worst = std::max(worst, std::abs(got[i] - want[i / spec->vocab][i % spec->vocab]));
    largest = std::max(largest, std::abs(want[i / spec->vocab][i % spec->vocab]));
  }
  RecordProperty("largest_difference", std::to_string(worst));
  EXPECT_GT(largest, 0.1);
  EXPECT_LT(worst, 1e-4);
}

class GgufFamilies : public ::testing::TestWithParam<Case> {};

const Json kV2 = {{"architectures", Json::array({"BailingMoeV2ForCausalLM"})},
                  {"num_shared_experts", 1},
                  {"first_k_dense_replace", 1},
                  {"moe_router_enable_expert_bias", true},
                  {"use_qk_norm", true},
                  {"use_qkv_bias", true},
                  {"moe_shared_expert_intermediate_size", 40},
                  {"partial_rotary_factor", 0.5},
                  {"n_group", 4},
                  {"topk_group", 2},
                  {"routed_scaling_factor", 2.5}};
const Json kErnie = {{"moe_num_experts", 8},
                     {"moe_k", 3},
                     {"moe_num_shared_experts", 2},
                     {"num_hidden_layers", 5},
                     {"moe_layer_interval", 2}};

INSTANTIATE_TEST_SUITE_P(
    Models, GgufFamilies,
    ::testing::Values(Case{"llama", With(Sizes("llama"), {{"attention_bias", true}, {"mlp_bias", true}})},
                      Case{"qwen2", Sizes("qwen2")}, Case{"qwen3", Sizes("qwen3")},
                      Case{"bailing_moe",
                           With(Sizes("bailing_moe"),
                                {{"num_shared_experts", 2}, {"use_bias", true}, {"norm_head", true}})},
                      Case{"bailing_moe_v2", With(Sizes("bailing_moe"), kV2)},
                      Case{"ernie4_5_moe", With(Sizes("ernie4_5_moe"), kErnie)},
                      Case{"ernie4_5_moe_bias", With(With(Sizes("ernie4_5_moe"), kErnie),
                                                     {{"use_bias", true}, {"moe_use_aux_free", false}})}),
    [](const auto& info) { return std::string(info.param.name); });

TEST_P(GgufFamilies, HaveTheSameLogitsFromGguf) {
  const Json& config = GetParam().config;
  Directory directory;
  model::MakeModelOptions options;
  options.directory = directory.Path();
  ASSERT_TRUE(model::WriteModel(*model::SpecOf(config), options));
  const auto path = directory.Path() / "model.gguf";
  const auto written = model::ExportGguf({directory.Path(), path, model::Encoding::kBf16});
  ASSERT_TRUE(written) << written.error().message;
  EXPECT_EQ(Logits(TestModel::Load(path)), Logits(TestModel::Load(directory.Path())));
}

// Ling's norm_head: the same logits as those of a head whose columns were divided by their lengths.
TEST(NormedHead, IsAHeadOfNormedColumns) {
  const Json config = With(Sizes("bailing_moe"), {{"norm_head", true}});
  Directory directory;
  model::MakeModelOptions options;
  options.directory = directory.Path() / "normed";
  ASSERT_TRUE(model::WriteModel(*model::SpecOf(config), options));
  const std::vector<float> normed = Logits(TestModel::Load(options.directory));
  std::ofstream(options.directory / "config.json") << Sizes("bailing_moe").dump();
  const TestModel plain = TestModel::Load(options.directory);
  SafetensorsFile file;
  const core::ModelSpec& spec = plain.Spec();
  for (const model::TensorName& tensor : (*model::FamilyOf(config))->Tensors(spec)) {
    const std::vector<float>& values = plain.Plain(tensor.role, tensor.layer, tensor.expert);
    if (tensor.role != Role::kLmHead) {
      file.Add(tensor.name, tensor.shape, values);
      continue;
    }
    std::vector<float> divided = values;
    for (int column = 0; column < spec.hidden; ++column) {
      double squares = 1e-14;
      for (int row = 0; row < spec.vocab; ++row) squares += std::pow(values[row * spec.hidden + column], 2);
      for (int row = 0; row < spec.vocab; ++row)
        divided[row * spec.hidden + column] =
            static_cast<float>(values[row * spec.hidden + column] / std::sqrt(squares));
    }
    file.AddFloats(tensor.name, tensor.shape, divided);
  }
  std::filesystem::create_directories(directory.Path() / "divided");
  file.Write(directory.Path() / "divided" / "model.safetensors");
  std::ofstream(directory.Path() / "divided" / "config.json") << Sizes("bailing_moe").dump();
  const std::vector<float> want = Logits(TestModel::Load(directory.Path() / "divided"));
  const std::vector<float> other = Logits(plain);
  ASSERT_EQ(normed.size(), want.size());
  double worst = 0, apart = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    worst = std::max<double>(worst, std::abs(normed[i] - want[i]));
    apart = std::max<double>(apart, std::abs(other[i] - want[i]));
  }
  // The reference table has the head in bf16, and that is where the two differ.
  EXPECT_LT(worst, 0.02);
  EXPECT_GT(apart, 0.2);
}

TEST(TopAny, ChoosesFromOneExpertToTheMost) {
  core::ModelSpec spec = *model::SpecOf(With(Sizes("qwen3_moe"), {{"moe_routing", "top_any"}}));
  const TestModel model = TestModel::Random(spec, 9);
  std::vector<TokenId> tokens;
  for (int i = 0; i < 48; ++i) tokens.push_back(static_cast<TokenId>(i * 37 % spec.vocab));
  ThreadPool threads(kNoCpu);
  const Kernels& kernels = *FindKernels("reference").value();
  Driver driver(model, kernels, threads, 48, 3);
  const std::vector<float> alone = driver.Step({{0, tokens}});
  std::vector<int> counts(spec.moe.top_k + 1);
  for (const auto& [layer, chosen] : driver.Routing())
    for (std::size_t row = 0; row < tokens.size(); ++row)
      ++counts[std::count_if(chosen.begin() + row * spec.moe.top_k,
                             chosen.begin() + (row + 1) * spec.moe.top_k,
                             [](int expert) { return expert >= 0; })];
  EXPECT_EQ(counts[0], 0);
  for (int count = 1; count <= spec.moe.top_k; ++count) EXPECT_GT(counts[count], 0) << count;
  EXPECT_EQ(alone, Driver(model, kernels, threads, 48, 3, 3).Step({{0, tokens}}));  // over three devices
}

INSTANTIATE_TEST_SUITE_P(
    Models, MadeFamilies,
    ::testing::Values(
        Case{"llama", With(Sizes("llama"), {{"attention_bias", true}, {"mlp_bias", true}})},
        Case{"mistral", Sizes("mistral")}, Case{"qwen2", Sizes("qwen2")}, Case{"qwen3", Sizes("qwen3")},
        Case{"bailing_moe", With(Sizes("bailing_moe"), {{"num_shared_experts", 2},
                                                        {"norm_topk_prob", true},
                                                        {"use_qkv_bias", true},
                                                        {"use_bias", true}})},
        Case{"bailing_moe_v2",
             With(Sizes("bailing_moe"), {{"architectures", Json::array({"BailingMoeV2ForCausalLM"})},
                                         {"num_shared_experts", 1},
                                         {"first_k_dense_replace", 1},
                                         {"score_function", "sigmoid"},
                                         {"moe_router_enable_expert_bias", true},
                                         {"use_qk_norm", true},
                                         {"partial_rotary_factor", 0.5},
                                         {"n_group", 4},
                                         {"topk_group", 2},
                                         {"routed_scaling_factor", 2.5}})},
        Case{"ernie4_5_moe", With(Sizes("ernie4_5_moe"), {{"moe_num_experts", 8},
                                                          {"moe_k", 3},
                                                          {"moe_num_shared_experts", 2},
                                                          {"moe_layer_start_index", 1},
                                                          {"moe_layer_end_index", 1}})},
        Case{"ernie4_5_moe_bias", With(Sizes("ernie4_5_moe"), {{"moe_num_experts", 8},
                                                               {"moe_k", 3},
                                                               {"use_bias", true},
                                                               {"moe_use_aux_free", false},
                                                               {"moe_num_shared_experts", 1}})},
        // Of families with goldens, what those do not have.
        Case{"deepseek_v2", With(Latents("deepseek_v2"), {{"q_lora_rank", 20},
                                                          {"attention_bias", true},
                                                          {"topk_method", "group_limited_greedy"},
                                                          {"n_group", 4},
                                                          {"topk_group", 2},
                                                          {"routed_scaling_factor", 16.0},
                                                          {"rope_scaling",
                                                           {{"type", "yarn"},
                                                            {"factor", 8.0},
                                                            {"original_max_position_embeddings", 16},
                                                            {"mscale", 0.9},
                                                            {"mscale_all_dim", 0.707}}}})},
        Case{"deepseek_v2_norm",
             With(Latents("deepseek_v2"),
                  {{"attention_bias", true}, {"norm_topk_prob", true}, {"moe_layer_freq", 2}})},
        Case{"deepseek_v3",
             With(Latents("deepseek_v3"),
                  {{"n_group", 2},
                   {"topk_group", 1},
                   {"rope_interleave", false},
                   {"norm_topk_prob", false},
                   {"rope_scaling", {{"rope_type", "linear"}, {"factor", 3.0}, {"mscale_all_dim", 1.0}}}})},
        Case{"glm4_moe", With(Sizes("glm4_moe"), {{"n_routed_experts", 8},
                                                  {"n_group", 4},
                                                  {"topk_group", 2},
                                                  {"use_qk_norm", true},
                                                  {"attention_bias", true},
                                                  {"norm_topk_prob", false},
                                                  {"routed_scaling_factor", 1.5},
                                                  {"rope_scaling", kYarn}})},
        Case{"qwen2_moe", With(Sizes("qwen2_moe"), {{"shared_expert_intermediate_size", 30},
                                                    {"norm_topk_prob", true},
                                                    {"use_sliding_window", true},
                                                    {"sliding_window", 7},
                                                    {"max_window_layers", 1},
                                                    {"rope_scaling", kLlama3}})},
        Case{"mixtral", With(Sizes("mixtral"),
                             {{"num_local_experts", 8}, {"sliding_window", 9}, {"rope_scaling", kYarn}})},
        Case{"olmoe", With(Sizes("olmoe"), {{"clip_qkv", 0.8},
                                            {"attention_bias", true},
                                            {"norm_topk_prob", true},
                                            {"rope_scaling", {{"type", "linear"}, {"factor", 2.5}}}})},
        Case{"gpt_oss", With(Sizes("gpt_oss"), {{"num_local_experts", 8},
                                                {"sliding_window", 6},
                                                {"swiglu_limit", 0.5},
                                                {"attention_bias", true},
                                                {"rope_scaling", kYarn}})},
        Case{"top_any", With(Sizes("qwen3_moe"), {{"moe_routing", "top_any"}})},
        // Every other layer, as GLaM has them.
        Case{"interleaved",
             With(Sizes("qwen3_moe"), {{"num_hidden_layers", 5}, {"decoder_sparse_step", 2}})}),
    [](const auto& info) { return std::string(info.param.name); });

// ---- What is fused in checkpoints

// MXFP4 values are bf16 numbers, so that the same model in gpt-oss's other form has the same logits.
TEST(FusedTensors, OfGptOssInBf16AreThoseOfItsMxfp4) {
  const auto golden = std::filesystem::path(ELASTICMOE_TESTDATA) / "goldens" / "gpt_oss_mxfp4";
  const TestModel model = TestModel::Load(golden);
  const core::ModelSpec& spec = model.Spec();
  Json config = testing::MustParse(testing::MustRead(golden / "config.json"));
  config.erase("quantization_config");
  const std::int64_t experts = spec.moe.experts, width = spec.moe.expert_width, hidden = spec.hidden;
  SafetensorsFile file;
  for (const model::TensorName& tensor : (*model::FamilyOf(config))->Tensors(spec))
    if (tensor.expert < 0) file.Add(tensor.name, tensor.shape, model.Plain(tensor.role, tensor.layer));
  for (int layer = 0; layer < spec.LayerCount(); ++layer) {
    std::vector<float> gate_up(experts * hidden * 2 * width), down(experts * width * hidden);
    std::vector<float> gate_up_bias, down_bias;
    for (int e = 0; e < experts; ++e) {
      const auto plain = [&](Role role) { return model.Plain(role, layer, e); };
      const auto gate = plain(Role::kExpertGate), up = plain(Role::kExpertUp), out = plain(Role::kExpertDown);
      for (int i = 0; i < hidden; ++i)
        for (int j = 0; j < width; ++j) {
          gate_up[((e * hidden + i) * width + j) * 2] = gate[j * hidden + i];
          gate_up[((e * hidden + i) * width + j) * 2 + 1] = up[j * hidden + i];
          down[(e * width + j) * hidden + i] = out[i * width + j];
        }
      const auto gate_bias = plain(Role::kExpertGateBias), up_bias = plain(Role::kExpertUpBias);
      for (int j = 0; j < width; ++j) gate_up_bias.insert(gate_up_bias.end(), {gate_bias[j], up_bias[j]});
      for (const float value : plain(Role::kExpertDownBias)) down_bias.push_back(value);
    }
    const std::string prefix = fmt::format("model.layers.{}.mlp.experts.", layer);
    file.Add(prefix + "gate_up_proj", {experts, hidden, 2 * width}, gate_up);
    file.Add(prefix + "down_proj", {experts, width, hidden}, down);
    file.Add(prefix + "gate_up_proj_bias", {experts, 2 * width}, gate_up_bias);
    file.Add(prefix + "down_proj_bias", {experts, hidden}, down_bias);
  }
  Directory directory;
  std::filesystem::create_directories(directory.Path());
  file.Write(directory.Path() / "model.safetensors");
  std::ofstream(directory.Path() / "config.json") << config.dump();
  EXPECT_EQ(Logits(TestModel::Load(directory.Path())), Logits(model));
}

// Gate above up, as transformers 5 holds the experts of most families.
class StackedExperts : public ::testing::TestWithParam<Case> {};

TEST_P(StackedExperts, AreTheirParts) {
  const Json& config = GetParam().config;
  const core::ModelSpec spec = *model::SpecOf(config);
  Directory parts;
  model::MakeModelOptions options;
  options.directory = parts.Path() / "parts";
  ASSERT_TRUE(model::WriteModel(spec, options));
  const TestModel model = TestModel::Load(options.directory);
  SafetensorsFile file;
  std::map<int, std::vector<float>> gate_up, down;
  for (const model::TensorName& tensor : (*model::FamilyOf(config))->Tensors(spec)) {
    const std::vector<float>& plain = model.Plain(tensor.role, tensor.layer, tensor.expert);
    if (tensor.expert < 0) {
      std::string name = tensor.name;  // as it is called there
      for (const auto& [from, to] : {std::pair("block_sparse_moe", "mlp"), {"mlp.moe_", "mlp.gate.moe_"}})
        if (const auto at = name.find(from); at != name.npos) name.replace(at, std::strlen(from), to);
      file.Add(name, tensor.shape, plain);
      continue;
    }
    // Tensors come expert by expert, gate before up.
    std::vector<float>& all = (tensor.role == Role::kExpertDown ? down : gate_up)[tensor.layer];
    all.insert(all.end(), plain.begin(), plain.end());
  }
  for (const auto& [layer, values] : gate_up) {
    const std::string prefix = fmt::format("model.layers.{}.mlp.experts.", layer);
    file.Add(prefix + "gate_up_proj", {spec.moe.experts, 2 * spec.moe.expert_width, spec.hidden}, values);
    file.Add(prefix + "down_proj", {spec.moe.experts, spec.hidden, spec.moe.expert_width}, down[layer]);
  }
  file.Write(parts.Path() / "model.safetensors");
  std::ofstream(parts.Path() / "config.json") << config.dump();
  EXPECT_EQ(Logits(TestModel::Load(parts.Path())), Logits(model));
}

INSTANTIATE_TEST_SUITE_P(
    Models, StackedExperts,
    ::testing::Values(Case{"qwen3_moe", Sizes("qwen3_moe")},
                      Case{"mixtral", With(Sizes("mixtral"), {{"num_local_experts", 8}})},
                      Case{"olmoe", Sizes("olmoe")},
                      Case{"ernie4_5_moe",
                           With(Sizes("ernie4_5_moe"), {{"moe_num_experts", 8}, {"moe_k", 3}})}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(FusedTensors, OfBailingAreItsParts) {
  const Json config = With(Sizes("bailing_moe"), {{"use_qkv_bias", true}});
  const core::ModelSpec spec = *model::SpecOf(config);
  Directory parts;
  model::MakeModelOptions options;
  options.directory = parts.Path() / "parts";
  ASSERT_TRUE(model::WriteModel(spec, options));
  const TestModel model = TestModel::Load(options.directory);
  SafetensorsFile file;
  for (const model::TensorName& tensor : (*model::FamilyOf(config))->Tensors(spec))
    if (tensor.name.find("query_key_value") == std::string::npos)
      file.Add(tensor.name, tensor.shape, model.Plain(tensor.role, tensor.layer, tensor.expert));
  for (int layer = 0; layer < spec.LayerCount(); ++layer) {
    const auto joined = [&](std::initializer_list<Role> roles) {
      std::vector<float> all;
      for (const Role role : roles)
        for (const float value : model.Plain(role, layer)) all.push_back(value);
      return all;
    };
    const std::string name = fmt::format("model.layers.{}.attention.query_key_value.", layer);
    const std::int64_t rows = spec.attention.QkvRows();
    file.Add(name + "weight", {rows, spec.hidden}, joined({Role::kQ, Role::kK, Role::kV}));
    file.Add(name + "bias", {rows}, joined({Role::kQBias, Role::kKBias, Role::kVBias}));
  }
  file.Write(parts.Path() / "model.safetensors");
  std::ofstream(parts.Path() / "config.json") << config.dump();
  EXPECT_EQ(Logits(TestModel::Load(parts.Path())), Logits(model));
}

}  // namespace
}  // namespace elasticmoe::compute
