#include "model/quantization.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "model/checkpoint.h"
#include "model/numbers.h"
#include "model/test_models.h"

namespace elasticmoe::model {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr char kWeights[] = "model.safetensors";
constexpr char kUp[] = "model.layers.0.mlp.experts.1.up_proj.weight";

// The header of a safetensors file and its data, to be taken apart and put together again.
struct File {
  Json header = Json::object();
  std::string data;

  explicit File(const std::string& bytes) {
    std::uint64_t size = 0;
    std::memcpy(&size, bytes.data(), sizeof(size));
    header = *ParseJson(std::string_view(bytes).substr(8, size));
    data = bytes.substr(8 + size);
  }
  void Set(const std::string& name, const char* dtype, std::vector<std::int64_t> shape, std::string bytes) {
    header[name] = {{"dtype", dtype},
                    {"shape", std::move(shape)},
                    {"data_offsets", {data.size(), data.size() + bytes.size()}}};
    data += bytes;
  }
  std::string Bytes() const { return SafetensorsBytes(header.dump(), data); }
};

std::vector<float> RowsOf(const std::string& bytes, const TensorData& tensor, std::uint64_t k,
                          std::uint64_t begin, std::uint64_t count) {
  RowReader reader([&](int, std::uint64_t offset, std::byte* out, std::uint64_t size) -> Status {
    EXPECT_LE(offset + size, bytes.size());
    std::memcpy(out, bytes.data() + offset, size);
    return {};
  });
  const auto rows = reader.Read(tensor, k, begin, count);
  EXPECT_TRUE(rows);
  EXPECT_EQ(rows->type, DType::kF32);
  std::vector<float> values(k * count);
  std::memcpy(values.data(), rows->data, values.size() * sizeof(float));
  return values;
}

// A tiny model of which one matrix [16, 32] is FP8 in blocks of 8 x 12: the last block of a row is narrower.
class Fp8Checkpoints : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(MakeModel(TinyModel(directory_.Path())));
    EditJson(directory_, "config.json", [](Json& config) {
      config["quantization_config"] = {
          {"quant_method", "fp8"}, {"fmt", "e4m3"}, {"weight_block_size", {8, 12}}};
      rows_ = config["moe_intermediate_size"];
    });
    Write([](File&) {});
  }

  void Write(const std::function<void(File&)>& spoil) {
    File file(directory_.Read(kWeights));
    std::string values, scales;
    for (int i = 0; i < rows_ * 32; ++i) values += static_cast<char>(i * 37 % 127 + (i % 3 == 0 ? 128 : 0));
    const int blocks = (rows_ + 7) / 8 * 3;
    for (int i = 0; i < blocks; ++i) {
      const float scale = 0.25F + 0.01F * static_cast<float>(i);
      scales.append(reinterpret_cast<const char*>(&scale), sizeof(scale));
    }
    file.Set(kUp, "F8_E4M3", {rows_, 32}, values);
    file.Set(std::string(kUp) + "_scale_inv", "F32", {(rows_ + 7) / 8, 3}, scales);
    spoil(file);
    directory_.Write(kWeights, file.Bytes());
  }

  Error ErrorOfOpening() {
    const auto checkpoint = Checkpoint::Open(directory_.Path());
    return checkpoint ? Error{ErrorCode::kInternal, "no error"} : checkpoint.error();
  }

  static inline int rows_ = 0;
  ScratchDirectory directory_;
};

TEST_F(Fp8Checkpoints, ValuesAreScaledByTheirBlock) {
  const auto checkpoint = Checkpoint::Open(directory_.Path());
  ASSERT_TRUE(checkpoint) << checkpoint.error().message;
  EXPECT_TRUE(checkpoint->unused.empty());
  const auto at =
      std::ranges::find(checkpoint->tensors, kUp, [](auto& source) { return source.tensor.name; });
  ASSERT_NE(at, checkpoint->tensors.end());
  EXPECT_EQ(at->encoding, Encoding::kF8E4M3);
  const std::string bytes = directory_.Read(kWeights);
  for (const int begin : {0, 5}) {
    const int count = rows_ - begin;
    const auto values = RowsOf(bytes, *at, 32, begin, count);
    for (int row = begin; row < rows_; ++row) {
      for (int column = 0; column < 32; ++column) {
        const int i = row * 32 + column;
        const auto bits = static_cast<std::uint8_t>(i * 37 % 127 + (i % 3 == 0 ? 128 : 0));
        const float scale = 0.25F + 0.01F * static_cast<float>(row / 8 * 3 + column / 12);
        ASSERT_EQ(values[(row - begin) * 32 + column], F8E4M3ToFloat(bits) * scale) << row << " " << column;
      }
    }
  }
}

TEST_F(Fp8Checkpoints, TakeOneScaleForAMatrixOrForEachRow) {
  const Json vllm = {{"quant_method", "fp8"}, {"activation_scheme", "static"}};
  const Json compressed = {
      {"quant_method", "compressed-tensors"},
      {"config_groups",
       {{"group_0", {{"weights", {{"num_bits", 8}, {"type", "float"}, {"strategy", "channel"}}}}}}}};
  const auto scales = [](int count) {
    std::string bytes;
    for (int i = 0; i < count; ++i) {
      const float scale = 0.5F + static_cast<float>(i);
      bytes.append(reinterpret_cast<const char*>(&scale), sizeof(scale));
    }
    return bytes;
  };
  const std::string scale = std::string(kUp) + "_scale";
  const auto check = [&](const Json& config, const std::vector<std::int64_t>& shape, int count) {
    EditJson(directory_, "config.json", [&](Json& json) { json["quantization_config"] = config; });
    Write([&](File& file) {
      file.header.erase(scale + "_inv");
      file.Set(scale, "F32", shape, scales(count));
      file.Set(std::string(kUp).substr(0, std::string(kUp).rfind('.')) + ".input_scale", "F32", {},
               scales(1));
    });
    const auto checkpoint = Checkpoint::Open(directory_.Path());
    ASSERT_TRUE(checkpoint) << checkpoint.error().message;
    EXPECT_TRUE(checkpoint->unused.empty());
    const auto at =
        std::ranges::find(checkpoint->tensors, kUp, [](auto& source) { return source.tensor.name; });
    const auto values = RowsOf(directory_.Read(kWeights), *at, 32, 1, rows_ - 1);
    for (int row = 1; row < rows_; ++row) {
      const int i = row * 32 + 7;
      const auto bits = static_cast<std::uint8_t>(i * 37 % 127 + (i % 3 == 0 ? 128 : 0));
      const float factor = 0.5F + static_cast<float>(count > 1 ? row : 0);
      ASSERT_EQ(values[(row - 1) * 32 + 7], F8E4M3ToFloat(bits) * factor) << row;
    }
  };
  check(vllm, {}, 1);
  check(vllm, {1}, 1);
  check(compressed, {rows_, 1}, rows_);
  check(compressed, {rows_}, rows_);
  Write([&](File& file) {
    file.header.erase(scale + "_inv");
    file.Set(scale, "F32", {1, 32}, scales(32));
  });
  EXPECT_THAT(ErrorOfOpening().message, AllOf(HasSubstr(scale), HasSubstr("[1, 32]"), HasSubstr("each row")));
  Write([&](File& file) {
    file.header.erase(scale + "_inv");
    file.header.erase(scale);
  });
  EXPECT_THAT(ErrorOfOpening().message, AllOf(HasSubstr("without"), HasSubstr("_scale;")));
}

TEST_F(Fp8Checkpoints, RefuseScalesThatDoNotFit) {
  const std::string scale = std::string(kUp) + "_scale_inv";
  Write([&](File& file) { file.header.erase(scale); });
  EXPECT_THAT(ErrorOfOpening().message, AllOf(HasSubstr(kWeights), HasSubstr(kUp), HasSubstr("without")));
  Write([&](File& file) { file.Set(scale, "F32", {1, 1}, std::string(4, '\0')); });
  EXPECT_THAT(ErrorOfOpening().message,
              AllOf(HasSubstr(scale), HasSubstr("shape=[1, 1]"), HasSubstr("8 x 12")));
  Write([&](File& file) {
    file.Set(scale, "I64", {(rows_ + 7) / 8, 3}, std::string((rows_ + 7) / 8 * 24, '\0'));
  });
  EXPECT_THAT(ErrorOfOpening().message, AllOf(HasSubstr(scale), HasSubstr("I64")));
  Write([&](File& file) {
    file.Set("lm_head.weight_scale_inv", "F32", {1, 1}, std::string(4, '\0'));
    file.header.erase("lm_head.weight");
  });
  EXPECT_THAT(ErrorOfOpening().message, HasSubstr("there is no \"lm_head.weight\""));
}

TEST_F(Fp8Checkpoints, RefuseOtherSettingsByKey) {
  const auto refused = [&](const Json& value) {
    EditJson(directory_, "config.json", [&](Json& config) { config["quantization_config"] = value; });
    const Error error = ErrorOfOpening();
    EXPECT_THAT(error.message, AllOf(HasSubstr("config.json"), HasSubstr("quantization_config")));
    return error;
  };
  EXPECT_THAT(refused({{"quant_method", "bitsandbytes"}}).message,
              HasSubstr("quant_method=\"bitsandbytes\""));
  EXPECT_THAT(refused({{"quant_method", "fp8"}, {"fmt", "e5m2"}, {"weight_block_size", {8, 8}}}).message,
              HasSubstr("fmt=\"e5m2\""));
  for (const char* weights : {R"({"num_bits": 3, "type": "int", "strategy": "group"})",
                              R"({"num_bits": 8, "type": "float", "strategy": "block"})", "7"})
    EXPECT_THAT(refused({{"quant_method", "compressed-tensors"},
                         {"config_groups", {{"group_0", {{"weights", *ParseJson(weights)}}}}}})
                    .message,
                HasSubstr("config_groups.group_0"));
  EXPECT_THAT(refused({{"quant_method", "compressed-tensors"}}).message, HasSubstr("config_groups=null"));
  EXPECT_EQ(refused({{"quant_method", "fp8"}, {"weight_block_size", {0, 8}}}).code,
            ErrorCode::kInvalidArgument);
  EXPECT_EQ(refused(7).code, ErrorCode::kInvalidArgument);
  EditJson(directory_, "config.json", [](Json& config) { config.erase("quantization_config"); });
  EXPECT_THAT(ErrorOfOpening().message, AllOf(HasSubstr("F8_E4M3"), HasSubstr("no quantization_config")));
}

// Two experts; k = 64 is two blocks of scales a row.
class Mxfp4 : public testing::Test {
 protected:
  static constexpr int kExperts = 2, kRows = 6, kBlocks = 2;

  Mxfp4() {
    for (int i = 0; i < kExperts * kRows * kBlocks * 16; ++i) blocks_ += static_cast<char>(i * 91 + 17);
    for (int i = 0; i < kExperts * kRows * kBlocks; ++i) scales_ += static_cast<char>(120 + i % 11);
    index_.files = {"w.safetensors"};
    Add("m.experts.gate_up_proj_blocks", {kExperts, kRows, kBlocks, 16}, 0, blocks_.size());
    Add("m.experts.gate_up_proj_scales", {kExperts, kRows, kBlocks}, blocks_.size(), scales_.size());
  }

  void Add(const std::string& name, std::vector<std::int64_t> shape, std::uint64_t offset,
           std::uint64_t bytes) {
    StoredTensor tensor;
    tensor.name = name;
    tensor.dtype = "U8";
    tensor.shape = std::move(shape);
    tensor.data = {Encoding::kBf16, 0, offset, bytes};
    index_.tensors.push_back(tensor);
  }

  std::string blocks_, scales_;
  TensorIndex index_;
};

TEST_F(Mxfp4, GateAndUpAreTheEvenAndTheOddRowsOfEachExpert) {
  ASSERT_TRUE(ResolveQuantized({.method = Quantization::Method::kMxfp4}, index_));
  ASSERT_EQ(index_.tensors.size(), 4u);
  const double levels[] = {0, .5, 1, 1.5, 2, 3, 4, 6, 0, -.5, -1, -1.5, -2, -3, -4, -6};
  for (int i = 0; i < 4; ++i) {
    const StoredTensor& tensor = index_.tensors[i];
    const int expert = i / 2, odd = i % 2;
    EXPECT_EQ(tensor.name, fmt::format("m.experts.{}.{}.weight", expert, odd ? "up_proj" : "gate_proj"));
    EXPECT_EQ(tensor.shape, (std::vector<std::int64_t>{kRows / 2, kBlocks * 32}));
    const auto values = RowsOf(blocks_ + scales_, tensor.data, kBlocks * 32, 1, 2);
    for (int row = 1; row < 3; ++row) {
      for (int column = 0; column < kBlocks * 32; ++column) {
        const int block = ((expert * kRows) + 2 * row + odd) * kBlocks + column / 32;
        const auto byte = static_cast<unsigned char>(blocks_[block * 16 + column % 32 / 2]);
        const unsigned bits = column % 2 == 0 ? byte & 15 : byte >> 4;
        const double want = std::ldexp(levels[bits], static_cast<unsigned char>(scales_[block]) - 127);
        ASSERT_EQ(values[(row - 1) * kBlocks * 32 + column], want) << tensor.name << row << " " << column;
      }
    }
  }
}

TEST_F(Mxfp4, RefusesHalvesThatDoNotFit) {
  const auto message = [&] {
    TensorIndex index = index_;
    const auto status = ResolveQuantized({.method = Quantization::Method::kMxfp4}, index);
    return status ? std::string() : status.error().message;
  };
  index_.tensors[1].shape = {kExperts, kRows, kBlocks + 1};
  EXPECT_THAT(message(), AllOf(HasSubstr("gate_up_proj_scales"), HasSubstr("[2, 6, 3]")));
  index_.tensors.pop_back();
  EXPECT_THAT(message(), HasSubstr("there is no \"m.experts.gate_up_proj_scales\""));
  Add("m.experts.gate_up_proj_scales", {kExperts, kRows, kBlocks}, 0, 0);
  index_.tensors[0].shape = {std::int64_t{1} << 40, 0, kBlocks, 16};
  EXPECT_THAT(message(), HasSubstr("expected some values"));
  index_.tensors[0].name = index_.tensors[1].name = "m.experts.odd_proj";
  index_.tensors[0].name += "_blocks", index_.tensors[1].name += "_scales";
  index_.tensors[0].shape = {kExperts, kRows, kBlocks, 16};
  EXPECT_THAT(message(), AllOf(HasSubstr("odd_proj"), HasSubstr("supported in MXFP4")));
}

TEST(RowOrders, RotaryPairsAreNeighboursInTheFile) {
  // Heads of 4 rows: the file has 0, 2, 1, 3 of each.
  const RowOrder order{.pairs_head_dim = 4};
  const std::uint64_t stored[] = {0, 2, 1, 3, 4, 6, 5, 7};
  for (std::uint64_t row = 0; row < 8; ++row) EXPECT_EQ(order.StoredRow(row), stored[row]);
  std::string bytes;
  for (char row = 0; row < 8; ++row) bytes += std::string{0, static_cast<char>(0x40 + row)};  // bf16, k = 1
  RowReader reader([&](int, std::uint64_t offset, std::byte* out, std::uint64_t size) -> Status {
    std::memcpy(out, bytes.data() + offset, size);
    return {};
  });
  const TensorData tensor{Encoding::kBf16, 0, 0, 16, order};
  const auto rows = reader.Read(tensor, 1, 1, 5);
  ASSERT_TRUE(rows);
  EXPECT_EQ(rows->type, DType::kBf16);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(static_cast<int>(rows->data[2 * i + 1]), 0x40 + stored[i + 1]);
}

}  // namespace
}  // namespace elasticmoe::model
