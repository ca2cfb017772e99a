#include "model/make_model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>

#include "model/checkpoint.h"
#include "model/inspect.h"
#include "model/test_models.h"

namespace elasticmoe::model {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

TEST(ParameterCount, ReadsTheUsualForms) {
  EXPECT_EQ(ParseParameterCount("1.4B"), 1'400'000'000u);
  EXPECT_EQ(ParseParameterCount("300M"), 300'000'000u);
  EXPECT_EQ(ParseParameterCount("64k"), 64'000u);
  EXPECT_EQ(ParseParameterCount("1T"), 1'000'000'000'000u);
  EXPECT_EQ(ParseParameterCount("1234567"), 1'234'567u);
}

TEST(ParameterCount, RefusesOtherForms) {
  for (const char* text :
       {"", "B", "1.4G", "1.4 B", "-1B", "0", "nan", "inf", "1e9", "11T", "1BB", "0.0000001M", "0x10"}) {
    const auto count = ParseParameterCount(text);
    ASSERT_FALSE(count) << text;
    EXPECT_THAT(count.error().message, HasSubstr(fmt::format("\"{}\"", text)));
  }
}

TEST(Shape, ComesWithinThreePercentOverSevenDecades) {
  for (const char* shape : {"qwen3-moe", "mixtral"}) {
    for (double wish = 5e5; wish < 1e12; wish *= 1.17) {
      MakeModelOptions options;
      options.shape = shape;
      options.parameters = static_cast<std::uint64_t>(wish);
      const auto spec = PickShape(options);
      ASSERT_TRUE(spec) << spec.error().message;
      EXPECT_NEAR(static_cast<double>(CountParameters(*spec)) / wish, 1.0, 0.03) << wish;
      EXPECT_LE(spec->moe.top_k, spec->moe.experts / 4);
    }
  }
}

TEST(Shape, GivesABillionParametersTheProportionsOfARealModel) {
  MakeModelOptions options;
  options.parameters = 1'400'000'000;
  const auto spec = PickShape(options);
  ASSERT_TRUE(spec) << spec.error().message;
  EXPECT_EQ(spec->hidden, 1024);
  EXPECT_EQ(spec->moe.experts, 32);
  EXPECT_EQ(spec->moe.top_k, 4);
  EXPECT_EQ(spec->moe.expert_width % 256, 0);
  EXPECT_TRUE(spec->tied_head);
}

TEST(Shape, KeepsOverrides) {
  MakeModelOptions options;
  options.parameters = 100'000'000;
  options.hidden = 320;
  options.layers = 7;
  options.experts = 24;
  options.top_k = 3;
  options.vocab = 1000;
  options.heads = 6;
  options.kv_heads = 2;
  options.head_dim = 128;
  options.tied_head = false;
  const auto spec = PickShape(options);
  ASSERT_TRUE(spec) << spec.error().message;
  EXPECT_EQ(spec->hidden, 320);
  EXPECT_EQ(spec->LayerCount(), 7);
  EXPECT_EQ(spec->moe.experts, 24);
  EXPECT_EQ(spec->moe.top_k, 3);
  EXPECT_EQ(spec->vocab, 1000);
  EXPECT_EQ(spec->attention.heads, 6);
  EXPECT_EQ(spec->attention.kv_heads, 2);
  EXPECT_EQ(spec->attention.head_dim, 128);
  EXPECT_FALSE(spec->tied_head);
}

TEST(Shape, RefusesWhatCannotBe) {
  const auto message = [](auto change) {
    MakeModelOptions options;
    options.parameters = 1'000'000;
    change(options);
    const auto spec = PickShape(options);
    return spec ? "no error" : spec.error().message;
  };
  EXPECT_THAT(message([](auto& o) { o.shape = "dbrx"; }), HasSubstr("shape=\"dbrx\""));
  EXPECT_THAT(message([](auto& o) { o.parameters = 1000; }), HasSubstr("parameters=1000 cannot be met"));
  EXPECT_THAT(message([](auto& o) { o.parameters = 0; }), HasSubstr("parameters=0"));
  EXPECT_THAT(message([](auto& o) { o.parameters = ~0ULL; }), HasSubstr("parameters=18446744073709551615"));
  EXPECT_THAT(message([](auto& o) { o.hidden = 100; }), HasSubstr("hidden=100"));
  EXPECT_THAT(message([](auto& o) { o.layers = 0; }), HasSubstr("layers=0"));
  EXPECT_THAT(message([](auto& o) { o.experts = -1; }), HasSubstr("experts=-1"));
  EXPECT_THAT(message([](auto& o) { o.experts = 4, o.top_k = 5; }), HasSubstr("top-k=5"));
  EXPECT_THAT(message([](auto& o) { o.hidden = 65536; }), HasSubstr("cannot be met"));
  EXPECT_THAT(message([](auto& o) { o.head_dim = 33; }), HasSubstr("head-dim=33"));
  EXPECT_THAT(message([](auto& o) { o.head_dim = 100'000; }), HasSubstr("head-dim=100000"));
  EXPECT_THAT(message([](auto& o) { o.heads = 6, o.kv_heads = 4; }), HasSubstr("kv-heads=4"));
}

// bf16 values of all tensors of one role of a made model.
std::vector<float> ValuesOf(const ScratchDirectory& directory, const Checkpoint& checkpoint,
                            TensorRole role) {
  const std::string bytes = directory.Read("model.safetensors");
  std::vector<float> values;
  for (const TensorSource& tensor : checkpoint.tensors) {
    if (tensor.tensor.role != role) continue;
    for (std::uint64_t i = tensor.offset; i < tensor.offset + tensor.bytes; i += 2) {
      const std::uint32_t bits =
          static_cast<unsigned char>(bytes[i]) | static_cast<unsigned char>(bytes[i + 1]) << 8;
      values.push_back(std::bit_cast<float>(bits << 16));
    }
  }
  return values;
}

TEST(MadeModel, OpensAndIsDescribed) {
  ScratchDirectory directory;
  const auto made = MakeModel(TinyModel(directory.Path()));
  ASSERT_TRUE(made) << made.error().message;
  const auto checkpoint = Checkpoint::Open(directory.Path());
  ASSERT_TRUE(checkpoint) << checkpoint.error().message;
  EXPECT_EQ(checkpoint->parameters, made->parameters);
  EXPECT_EQ(CountParameters(checkpoint->spec), made->parameters);
  EXPECT_EQ(checkpoint->parameters, 20'960u);
  EXPECT_TRUE(checkpoint->spec.eos_ids.empty());
  const Json report = InspectModel(*checkpoint);
  EXPECT_EQ(report["has_tokenizer"], false);
  EXPECT_EQ(report["bytes_on_disk"], fs::file_size(directory / "model.safetensors"));
  const std::string text = DescribeModel(report);
  EXPECT_THAT(text, HasSubstr("21.0 K, 14.8 K active per token"));
  EXPECT_THAT(text, HasSubstr("token ids only"));
}

TEST(MadeModel, HasSaneWeights) {
  ScratchDirectory directory;
  ASSERT_TRUE(MakeModel(TinyModel(directory.Path())));
  const auto checkpoint = Checkpoint::Open(directory.Path());
  ASSERT_TRUE(checkpoint);
  const auto moments = [&](TensorRole role) {
    const std::vector<float> values = ValuesOf(directory, *checkpoint, role);
    double sum = 0, squares = 0;
    for (const float value : values) sum += value;
    const double mean = sum / values.size();
    for (const float value : values) squares += (value - mean) * (value - mean);
    return std::pair(mean, std::sqrt(squares / values.size()));
  };
  // 4096 values of deviation 1/sqrt(32): the mean's own deviation is 0.003, the deviation's 1.1 %.
  const auto [mean, deviation] = moments(TensorRole::kExpertGate);
  EXPECT_NEAR(mean, 0.0, 0.012);
  EXPECT_NEAR(deviation, 0.1768, 0.1768 * 0.045);
  const auto [down_mean, down] = moments(TensorRole::kExpertDown);  // 1/sqrt(16) over sqrt(2 * 2 layers)
  EXPECT_NEAR(down, 0.125, 0.125 * 0.045);
  const auto [norm, spread] = moments(TensorRole::kMlpNorm);
  EXPECT_NEAR(norm, 1.0, 0.03);
  EXPECT_LT(spread, 0.1);
}

TEST(MadeModel, DependsOnTheSeedAlone) {
  ScratchDirectory directory;
  MakeModelOptions options = TinyModel(directory / "a");
  ASSERT_TRUE(MakeModel(options));
  options.directory = directory / "b";
  ASSERT_TRUE(MakeModel(options));
  options.directory = directory / "c";
  options.seed = 2;
  ASSERT_TRUE(MakeModel(options));
  EXPECT_EQ(directory.Read("a/model.safetensors"), directory.Read("b/model.safetensors"));
  EXPECT_NE(directory.Read("a/model.safetensors"), directory.Read("c/model.safetensors"));
}

TEST(MadeModel, ReportsProgressToTheLastByte) {
  ScratchDirectory directory;
  MakeModelOptions options = TinyModel(directory.Path());
  std::uint64_t done = 0, total = 1;
  options.progress = [&](std::uint64_t done_bytes, std::uint64_t total_bytes) {
    EXPECT_GE(done_bytes, done);
    done = done_bytes;
    total = total_bytes;
  };
  const auto made = MakeModel(options);
  ASSERT_TRUE(made);
  EXPECT_EQ(done, total);
  EXPECT_EQ(total, made->bytes);
}

TEST(MadeModel, LeavesAnExistingModelAlone) {
  ScratchDirectory directory;
  ASSERT_TRUE(MakeModel(TinyModel(directory.Path())));
  const auto again = MakeModel(TinyModel(directory.Path()));
  ASSERT_FALSE(again);
  EXPECT_EQ(again.error().code, ErrorCode::kAlreadyExists);
  EXPECT_TRUE(Checkpoint::Open(directory.Path()));
}

TEST(MadeModel, RefusesADirectoryThatCannotBe) {
  ScratchDirectory directory;
  directory.Write("file", "x");
  const auto made = MakeModel(TinyModel(directory / "file"));
  ASSERT_FALSE(made);
  EXPECT_THAT(made.error().message, HasSubstr("/file"));
}

TEST(MadeModel, RefusesWhatTheDiskCannotHold) {
  ScratchDirectory directory;
  MakeModelOptions options;
  options.parameters = 9'000'000'000'000;  // 18 TB
  if (fs::space(directory.Path()).available > 17'000'000'000'000U) GTEST_SKIP() << "this disk is too large";
  options.directory = directory.Path();
  const auto made = MakeModel(options);
  ASSERT_FALSE(made);
  EXPECT_EQ(made.error().code, ErrorCode::kResourceExhausted) << made.error().message;
  EXPECT_TRUE(fs::is_empty(directory.Path()));
}

}  // namespace
}  // namespace elasticmoe::model
