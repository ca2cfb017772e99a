#include "model/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "model/inspect.h"
#include "model/test_models.h"

namespace elasticmoe::model {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr char kWeights[] = "model.safetensors";
constexpr char kGate[] = "model.layers.1.mlp.experts.3.gate_proj.weight";

TEST(CheckpointGoldens, OpenWithEveryTensorInPlace) {
  for (const char* name : {"qwen3_moe", "mixtral"}) {
    const auto checkpoint = Checkpoint::Open(fs::path(ELASTICMOE_TESTDATA "/goldens") / name);
    ASSERT_TRUE(checkpoint) << checkpoint.error().message;
    EXPECT_EQ(checkpoint->spec.family, name);
    EXPECT_TRUE(checkpoint->unused.empty());
    EXPECT_TRUE(std::ranges::is_sorted(checkpoint->tensors, {}, &TensorSource::offset));
    std::uint64_t bytes = 0;
    for (const TensorSource& tensor : checkpoint->tensors) bytes += tensor.bytes;
    EXPECT_EQ(bytes, checkpoint->parameters * 2);
    EXPECT_EQ(checkpoint->tensors.back().offset + checkpoint->tensors.back().bytes,
              checkpoint->file_bytes[0]);
  }
}

TEST(CheckpointGoldens, BundledModelTakesEosAndDefaultsFromGenerationConfig) {
  const auto checkpoint = Checkpoint::Open(ELASTICMOE_MODELS "/demo");
  ASSERT_TRUE(checkpoint) << checkpoint.error().message;
  EXPECT_THAT(checkpoint->spec.eos_ids, ElementsAre(4091, 4089));
  EXPECT_FLOAT_EQ(checkpoint->generation.temperature.value(), 0.7F);
  EXPECT_EQ(checkpoint->generation.top_k, 40);
  EXPECT_FLOAT_EQ(checkpoint->generation.top_p.value(), 0.95F);
  EXPECT_FALSE(checkpoint->generation.min_p.has_value());
  const Json report = InspectModel(*checkpoint);
  EXPECT_EQ(report["has_tokenizer"], true);
  EXPECT_EQ(report["has_chat_template"], true);
  EXPECT_EQ(report["bytes_per_expert"], 3 * 256 * 128 * 2);
  EXPECT_EQ(report["kv_bytes_per_token"], 2 * 2 * 5 * 2 * 64);
  EXPECT_EQ(report["parameters"].get<std::uint64_t>() - report["active_parameters"].get<std::uint64_t>(),
            5u * 12 * 3 * 256 * 128);
}

class Checkpoints : public testing::Test {
 protected:
  void SetUp() override {
    const auto made = MakeModel(TinyModel(directory_.Path()));
    ASSERT_TRUE(made) << made.error().message;
  }

  // Opens the directory, which must fail, and checks that the error names it.
  Error ErrorOfOpening() {
    const auto checkpoint = Checkpoint::Open(directory_.Path());
    if (checkpoint) return {ErrorCode::kInternal, "no error"};
    EXPECT_THAT(checkpoint.error().message, HasSubstr("opening model " + directory_.Path().string()));
    return checkpoint.error();
  }

  void ExpectError(ErrorCode code, const testing::Matcher<const std::string&>& message) {
    const Error error = ErrorOfOpening();
    EXPECT_EQ(error.code, code) << error.message;
    EXPECT_THAT(error.message, message);
  }

  ScratchDirectory directory_;
};

TEST_F(Checkpoints, ReadHalfAndSinglePrecision) {
  EditHeader(directory_, kWeights, [](Json& header) { header[kGate]["dtype"] = "F16"; });
  auto checkpoint = Checkpoint::Open(directory_.Path());
  ASSERT_TRUE(checkpoint) << checkpoint.error().message;
  EXPECT_EQ(InspectModel(*checkpoint)["dtypes"], Json({"bf16", "f16"}));
  const std::uint64_t parameters = checkpoint->parameters;

  // The last tensor can grow: its bytes are put where the data end.
  std::uint64_t end = 0;
  std::string last;
  EditHeader(directory_, kWeights, [&](Json& header) {
    for (auto& [name, tensor] : header.items()) {
      if (name == "__metadata__" || tensor["data_offsets"][1] <= end) continue;
      end = tensor["data_offsets"][1];
      last = name;
    }
    Json& tensor = header[last];
    const std::uint64_t begin = tensor["data_offsets"][0];
    tensor["dtype"] = "F32";
    tensor["data_offsets"][1] = begin + 2 * (end - begin);
  });
  directory_.Write(kWeights, directory_.Read(kWeights) + std::string(end, '\0'));
  checkpoint = Checkpoint::Open(directory_.Path());
  ASSERT_TRUE(checkpoint) << checkpoint.error().message;
  EXPECT_EQ(checkpoint->parameters, parameters);
  EXPECT_EQ(checkpoint->tensors.back().encoding, Encoding::kF32);
}

TEST_F(Checkpoints, NameAMissingDirectoryFileOrConfig) {
  const auto missing = Checkpoint::Open(directory_ / "gone");
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().code, ErrorCode::kNotFound);
  EXPECT_THAT(missing.error().message, HasSubstr("gone: no such directory"));
  const auto file = Checkpoint::Open(directory_ / "config.json");
  ASSERT_FALSE(file);
  EXPECT_EQ(file.error().code, ErrorCode::kInvalidArgument);
  EXPECT_THAT(file.error().message, HasSubstr("not a directory"));
  fs::create_directory(directory_ / "empty");
  const auto empty = Checkpoint::Open(directory_ / "empty");
  ASSERT_FALSE(empty);
  EXPECT_EQ(empty.error().code, ErrorCode::kNotFound);
  EXPECT_THAT(empty.error().message, HasSubstr("no config.json"));
  fs::remove(directory_ / kWeights);
  ExpectError(ErrorCode::kNotFound, HasSubstr("neither model.safetensors nor model.safetensors.index.json"));
}

TEST_F(Checkpoints, RefuseAConfigThatIsNoJsonOrNoFile) {
  directory_.Write("config.json", "{\"model_type\": \"qwen3_moe\",}");
  ExpectError(ErrorCode::kInvalidArgument, AllOf(HasSubstr("config.json"), HasSubstr("line 1")));
  directory_.Write("config.json", std::string("\x00\xff\xfe garbage", 11));
  ExpectError(ErrorCode::kInvalidArgument, HasSubstr("config.json"));
  directory_.Write("config.json", std::string(200'000, '['));
  ExpectError(ErrorCode::kInvalidArgument, HasSubstr("nested deeper"));
  directory_.Write("config.json", "");
  ExpectError(ErrorCode::kInvalidArgument, HasSubstr("config.json"));
  fs::remove(directory_ / "config.json");
  fs::create_directory(directory_ / "config.json");
  ExpectError(ErrorCode::kInvalidArgument, HasSubstr("not a regular file"));
}

TEST_F(Checkpoints, RefuseAnUnknownFamily) {
  EditJson(directory_, "config.json", [](Json& config) { config["model_type"] = "grok"; });
  ExpectError(ErrorCode::kUnimplemented, AllOf(HasSubstr("config.json"), HasSubstr("\"grok\""),
                                               HasSubstr("supported: qwen3_moe, mixtral")));
}

TEST_F(Checkpoints, RefuseACutOffFileAndSayHowMuchIsMissing) {
  const std::string bytes = directory_.Read(kWeights);
  directory_.Write(kWeights, bytes.substr(0, bytes.size() - 123));
  ExpectError(ErrorCode::kDataLoss, AllOf(HasSubstr(kWeights), HasSubstr("123 bytes are missing")));
}

TEST_F(Checkpoints, RefuseLyingOffsets) {
  EditHeader(directory_, kWeights, [](Json& header) { header[kGate]["data_offsets"] = {0, 1ULL << 62}; });
  ExpectError(ErrorCode::kDataLoss, AllOf(HasSubstr(kGate), HasSubstr("4611686018427387904")));
}

TEST_F(Checkpoints, RefuseOverlappingTensors) {
  EditHeader(directory_, kWeights, [](Json& header) {
    header[kGate]["data_offsets"] = header["model.layers.0.mlp.experts.0.gate_proj.weight"]["data_offsets"];
  });
  ExpectError(ErrorCode::kDataLoss, AllOf(HasSubstr(kGate), HasSubstr("overlap")));
}

TEST_F(Checkpoints, RefuseAnotherTypeOrShape) {
  EditHeader(directory_, kWeights, [](Json& header) { header[kGate]["dtype"] = "I16"; });
  ExpectError(ErrorCode::kUnimplemented,
              AllOf(HasSubstr(kWeights), HasSubstr(kGate), HasSubstr("dtype=\"I16\""),
                    HasSubstr("supported: BF16, F16, F32")));
  EditHeader(directory_, kWeights, [](Json& header) {
    header[kGate]["dtype"] = "BF16";
    header[kGate]["shape"] = {32, 16};
  });
  ExpectError(ErrorCode::kInvalidArgument,
              AllOf(HasSubstr(kWeights), HasSubstr(kGate), HasSubstr("shape=[32, 16]"),
                    HasSubstr("expected [16, 32]")));
}

TEST_F(Checkpoints, CountMissingTensorsAndNameTheFirst) {
  EditHeader(directory_, kWeights, [](Json& header) {
    header.erase("model.norm.weight");
    header.erase(kGate);
  });
  ExpectError(ErrorCode::kInvalidArgument,
              AllOf(HasSubstr("tensor model.norm.weight of shape [32]"),
                    HasSubstr("2 of 44 tensors are missing"), HasSubstr(kWeights)));
}

TEST_F(Checkpoints, ListTensorsThatAreNotNeeded) {
  EditHeader(directory_, kWeights, [](Json& header) {
    header["model.layers.0.self_attn.rotary_emb.inv_freq"] = {
        {"dtype", "F32"}, {"shape", {0}}, {"data_offsets", {0, 0}}};
    header["lm_head.weight"] = {{"dtype", "I64"}, {"shape", {0}}, {"data_offsets", {0, 0}}};
  });
  const auto checkpoint = Checkpoint::Open(directory_.Path());
  ASSERT_TRUE(checkpoint) << checkpoint.error().message;
  EXPECT_THAT(checkpoint->unused,
              ElementsAre("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"));
  EXPECT_THAT(DescribeModel(InspectModel(*checkpoint)), HasSubstr("not used"));
}

TEST_F(Checkpoints, RefuseATensorThatWouldChangeTheAnswers) {
  EditHeader(directory_, kWeights, [](Json& header) {
    header["model.layers.0.self_attn.o_proj.bias"] = {
        {"dtype", "BF16"}, {"shape", {0}}, {"data_offsets", {0, 0}}};
  });
  ExpectError(ErrorCode::kUnimplemented, HasSubstr("o_proj.bias"));
}

TEST_F(Checkpoints, TellAllThatKeepsThemFromBeingServed) {
  EXPECT_TRUE(CheckServable(directory_.Path()));
  EditJson(directory_, "config.json", [](Json& config) {
    config["hidden_act"] = "gelu";
    config["rope_scaling"] = {{"rope_type", "longrope"}, {"factor", 2}};
    config["quantization_config"] = {{"quant_method", "bitsandbytes"}};
  });
  directory_.Write("tokenizer.json", R"({"model": {"type": "Unigram"}})");
  const Status status = CheckServable(directory_.Path());
  ASSERT_FALSE(status);
  EXPECT_EQ(status.error().code, ErrorCode::kUnimplemented);
  for (const char* text : {"gelu", "longrope", "bitsandbytes", "tokenizer.json", "Unigram"})
    EXPECT_THAT(status.error().message, HasSubstr(text));
}

TEST_F(Checkpoints, TellEveryDtypeAndTensorThatIsNotRead) {
  EditHeader(directory_, kWeights, [](Json& header) {
    header["model.norm.weight"]["dtype"] = "U16";
    header[kGate]["dtype"] = "I16";
  });
  const auto opened = Checkpoint::Open(directory_.Path());
  ASSERT_FALSE(opened);
  EXPECT_THAT(opened.error().message, AllOf(HasSubstr("\"I16\""), HasSubstr("\"U16\""), HasSubstr(kGate),
                                            HasSubstr("model.norm.weight")));
}

TEST_F(Checkpoints, RefuseWrongGenerationDefaults) {
  const auto expect = [this](const char* key, const Json& value) {
    directory_.Write("generation_config.json", Json{{key, value}}.dump());
    ExpectError(ErrorCode::kInvalidArgument, AllOf(HasSubstr("generation_config.json"), HasSubstr(key)));
  };
  expect("temperature", -0.5);
  expect("temperature", "hot");
  expect("top_p", 0);
  expect("top_p", 1.5);
  expect("top_k", 1e30);
  expect("top_k", -2);
  expect("min_p", 2);
  expect("repetition_penalty", 0);
  expect("eos_token_id", {1, 64});
  directory_.Write("generation_config.json", "[]");
  ExpectError(ErrorCode::kInvalidArgument, HasSubstr("generation_config.json"));
  directory_.Write("generation_config.json",
                   R"({"top_k":-1,"eos_token_id":[5,6],"min_p":0.1,"temperature":null})");
  const auto checkpoint = Checkpoint::Open(directory_.Path());
  ASSERT_TRUE(checkpoint) << checkpoint.error().message;
  EXPECT_EQ(checkpoint->generation.top_k, 0);
  EXPECT_FLOAT_EQ(checkpoint->generation.min_p.value(), 0.1F);
  EXPECT_FALSE(checkpoint->generation.temperature.has_value());
  EXPECT_THAT(checkpoint->spec.eos_ids, ElementsAre(5, 6));
}

class ShardedCheckpoints : public Checkpoints {
 protected:
  void SetUp() override {
    MakeModelOptions options = TinyModel(directory_.Path());
    options.shard_bytes = 12'000;
    const auto made = MakeModel(options);
    ASSERT_TRUE(made) << made.error().message;
    ASSERT_EQ(made->files.size(), 4u);
  }
  static constexpr char kIndex[] = "model.safetensors.index.json";
  static constexpr char kShard[] = "model-00002-of-00004.safetensors";
};

TEST_F(ShardedCheckpoints, OpenInFileOrder) {
  const auto checkpoint = Checkpoint::Open(directory_.Path());
  ASSERT_TRUE(checkpoint) << checkpoint.error().message;
  ASSERT_EQ(checkpoint->files.size(), 4u);
  EXPECT_EQ(checkpoint->files[1].filename(), kShard);
  EXPECT_EQ(checkpoint->tensors.size(), 44u);
  EXPECT_TRUE(std::ranges::is_sorted(checkpoint->tensors, {}, [](const TensorSource& tensor) {
    return std::pair(tensor.file, tensor.offset);
  }));
}

TEST_F(ShardedCheckpoints, NameAMissingShard) {
  fs::remove(directory_ / kShard);
  ExpectError(ErrorCode::kNotFound, AllOf(HasSubstr(kShard), HasSubstr("no such file")));
}

TEST_F(ShardedCheckpoints, RefuseShardsOutsideOfTheDirectory) {
  EditJson(directory_, kIndex, [](Json& index) { index["weight_map"][kGate] = "../x.safetensors"; });
  ExpectError(ErrorCode::kInvalidArgument,
              AllOf(HasSubstr(kIndex), HasSubstr("../x.safetensors"), HasSubstr(kGate)));
}

TEST_F(ShardedCheckpoints, RefuseAnIndexThatPointsToTheWrongShard) {
  EditJson(directory_, kIndex, [](Json& index) { index["weight_map"][kGate] = kShard; });
  ExpectError(ErrorCode::kInvalidArgument, AllOf(HasSubstr(kGate), HasSubstr(kShard)));
}

TEST_F(ShardedCheckpoints, RefuseATensorInTwoShards) {
  EditHeader(directory_, kShard, [](Json& header) {
    header[kGate] = {{"dtype", "BF16"}, {"shape", {0}}, {"data_offsets", {0, 0}}};
  });
  ExpectError(ErrorCode::kInvalidArgument, AllOf(HasSubstr(kGate), HasSubstr("remove one")));
}

TEST_F(ShardedCheckpoints, NameTheShardThatShouldHoldAMissingTensor) {
  EditHeader(directory_, "model-00004-of-00004.safetensors", [](Json& header) { header.erase(kGate); });
  ExpectError(ErrorCode::kInvalidArgument,
              AllOf(HasSubstr(kGate), HasSubstr("model-00004-of-00004.safetensors"), HasSubstr("1 of 44")));
}

}  // namespace
}  // namespace elasticmoe::model
