// Families of which there are no reference logits at hand: a made model of each, written and read as its
// checkpoints are, against the plain formulas (plain_forward.h). It shows that names, settings and the
// forward pass belong together; that the settings mean what they mean in the original's code rests on reading
// it.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <fstream>

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

class MadeDenseFamilies : public ::testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Models, MadeDenseFamilies, ::testing::Values("llama", "qwen2", "qwen3"));

TEST_P(MadeDenseFamilies, HaveTheSameLogitsFromGguf) {
  Json config = Sizes(GetParam());
  config["attention_bias"] = GetParam() == std::string("llama");
  Directory directory;
  model::MakeModelOptions options;
  options.directory = directory.Path();
  ASSERT_TRUE(model::WriteModel(*model::SpecOf(config), options));
  const auto path = directory.Path() / "model.gguf";
  const auto written = model::ExportGguf({directory.Path(), path, model::Encoding::kBf16});
  ASSERT_TRUE(written) << written.error().message;
  EXPECT_EQ(Logits(TestModel::Load(path)), Logits(TestModel::Load(directory.Path())));
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
        Case{"llama", With(Sizes("llama"), {{"attention_bias", true}})}, Case{"mistral", Sizes("mistral")},
        Case{"qwen2", Sizes("qwen2")}, Case{"qwen3", Sizes("qwen3")},
        Case{"bailing_moe",
             With(Sizes("bailing_moe"),
                  {{"num_shared_experts", 2}, {"norm_topk_prob", true}, {"use_qkv_bias", true}, {"use_bias", true}})},
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
        Case{"top_any", With(Sizes("qwen3_moe"), {{"moe_routing", "top_any"}})},
        // Every other layer, as GLaM has them.
        Case{"interleaved",
             With(Sizes("qwen3_moe"), {{"num_hidden_layers", 5}, {"decoder_sparse_step", 2}})}),
    [](const auto& info) { return std::string(info.param.name); });

// ---- What is fused in checkpoints

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
