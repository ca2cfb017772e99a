// GPTQ, AWQ and compressed-tensors: matrices packed here, number by number as their formats say, and read
// back.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "base/rng.h"
#include "model/checkpoint.h"
#include "model/numbers.h"
#include "model/quantization.h"
#include "model/test_models.h"

namespace elasticmoe::model {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using Method = Quantization::Method;

constexpr int kN = 24, kK = 64;

// Numbers q [n, k] with a zero and a factor for each row and group; `group_of` each column.
struct Numbers {
  int bits, groups;
  std::vector<int> q, zero, group_of;
  std::vector<float> factor;

  Numbers(int bits, int groups, std::uint64_t seed) : bits(bits), groups(groups) {
    Rng rng(seed);
    for (int i = 0; i < kN * kK; ++i) q.push_back(static_cast<int>(rng.Below(1U << bits)));
    for (int i = 0; i < kN * groups; ++i) {
      zero.push_back(1 + static_cast<int>(rng.Below((1U << bits) - 1)));
      factor.push_back((1.0F + static_cast<float>(rng.Below(128)) / 128) / 64);  // a number of every type
    }
    for (int i = 0; i < kK; ++i) group_of.push_back(i / (kK / groups));
  }
  float Value(int row, int column) const {
    const int at = row * groups + group_of[column];
    return static_cast<float>(q[row * kK + column] - zero[at]) * factor[at];
  }
};

// Tensors of one file, whose bytes are kept.
struct File {
  TensorIndex index;
  std::string bytes;

  File() { index.files = {"w.safetensors"}; }
  void Add(const std::string& name, const char* dtype, std::vector<std::int64_t> shape,
           const std::string& data) {
    StoredTensor tensor;
    tensor.name = name;
    tensor.dtype = dtype;
    tensor.shape = std::move(shape);
    tensor.known = dtype == std::string("F16") || dtype == std::string("BF16") || dtype == std::string("F32");
    const Encoding encoding = dtype == std::string("F16")   ? Encoding::kF16
                              : dtype == std::string("F32") ? Encoding::kF32
                                                            : Encoding::kBf16;
    tensor.data = {encoding, 0, bytes.size(), data.size()};
    bytes += data;
    index.tensors.push_back(tensor);
  }
  StoredTensor& Of(const std::string& name) {
    const auto at = std::ranges::find(index.tensors, name, &StoredTensor::name);
    EXPECT_NE(at, index.tensors.end()) << name;
    return *at;
  }
};

template <class Number>
std::string Bytes(const std::vector<Number>& numbers) {
  return {reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(Number)};
}

std::string Halves(const std::vector<float>& values) {
  std::vector<std::uint16_t> halves;
  for (const float value : values) halves.push_back(FloatToHalf(value));
  return Bytes(halves);
}

// [rows, columns] -> [columns, rows]
template <class Value>
std::vector<Value> Turned(const std::vector<Value>& values, int columns) {
  std::vector<Value> out;
  for (int column = 0; column < columns; ++column)
    for (std::size_t row = 0; row < values.size() / columns; ++row)
      out.push_back(values[row * columns + column]);
  return out;
}

// Numbers beside each other in a row of `columns` share words; `place` says which of them is where.
std::string Across(const std::vector<int>& numbers, int columns, int bits,
                   const std::vector<int>& place = {}) {
  const int per = 32 / bits;
  std::vector<std::uint32_t> words;
  for (std::size_t row = 0; row < numbers.size() / columns; ++row)
    for (int word = 0; word < (columns + per - 1) / per; ++word) {
      std::uint32_t& out = words.emplace_back(0);
      for (int i = 0; i < per && word * per + i < columns; ++i) {
        const int from = word * per + (place.empty() ? i : place[i]);
        out |= static_cast<std::uint32_t>(numbers[row * columns + from]) << (bits * i);
      }
    }
  return Bytes(words);
}

// The same of numbers below each other: rows [words, columns].
std::string Down(const std::vector<int>& numbers, int columns, int bits) {
  const std::string turned =
      Across(Turned(numbers, columns), static_cast<int>(numbers.size()) / columns, bits);
  std::vector<std::uint32_t> words(turned.size() / 4);
  std::memcpy(words.data(), turned.data(), turned.size());
  return Bytes(Turned(words, static_cast<int>(words.size()) / columns));
}

std::vector<int> Plus(std::vector<int> numbers, int add) {
  for (int& number : numbers) number += add;
  return numbers;
}

File Gptq(const Numbers& numbers, bool less_one, bool order = true) {
  const int per = 32 / numbers.bits;
  File file;
  file.Add("m.qweight", "I32", {kK / per, kN}, Down(Turned(numbers.q, kK), kN, numbers.bits));
  file.Add("m.qzeros", "I32", {numbers.groups, kN / per},
           Across(Plus(Turned(numbers.zero, numbers.groups), less_one ? -1 : 0), kN, numbers.bits));
  file.Add("m.scales", "F16", {numbers.groups, kN}, Halves(Turned(numbers.factor, numbers.groups)));
  if (order) file.Add("m.g_idx", "I32", {kK}, Bytes(numbers.group_of));
  return file;
}

File Awq(const Numbers& numbers) {
  const std::vector<int> place = {0, 2, 4, 6, 1, 3, 5, 7};
  File file;
  file.Add("m.qweight", "I32", {kK, kN / 8}, Across(Turned(numbers.q, kK), kN, 4, place));
  file.Add("m.qzeros", "I32", {numbers.groups, kN / 8},
           Across(Turned(numbers.zero, numbers.groups), kN, 4, place));
  file.Add("m.scales", "F16", {numbers.groups, kN}, Halves(Turned(numbers.factor, numbers.groups)));
  return file;
}

std::vector<float> RowsOf(const File& file, const TensorData& tensor, int begin, int count, bool ahead) {
  const auto read = [&](int, std::uint64_t offset, std::byte* out, std::uint64_t size) -> Status {
    EXPECT_LE(offset + size, file.bytes.size());
    std::memcpy(out, file.bytes.data() + offset, size);
    return {};
  };
  RowReader reader(read);
  std::vector<std::byte> stored;
  const auto rows = [&]() -> Expected<PlainRows> {
    if (!ahead) return reader.Read(tensor, kK, begin, count);
    const auto range = RowReader::RangeOf(tensor, kK, begin, count);
    stored.resize(range.bytes);
    EXPECT_TRUE(read(0, range.offset, stored.data(), range.bytes));
    return reader.From(stored.data(), tensor, kK, begin, count);
  }();
  EXPECT_TRUE(rows) << rows.error().message;
  if (!rows) return {};
  EXPECT_EQ(rows->type, DType::kF32);
  std::vector<float> values(static_cast<std::size_t>(kK) * count);
  std::memcpy(values.data(), rows->data, values.size() * sizeof(float));
  return values;
}

// Any rows of the joined matrix, read at once or a few at a time, are the numbers' values to the last bit.
void ExpectValues(File file, const Quantization& quantization, const Numbers& numbers) {
  const auto status = ResolveQuantized(quantization, file.index);
  ASSERT_TRUE(status) << status.error().message;
  ASSERT_EQ(file.index.tensors.size(), 1u);
  const StoredTensor& tensor = file.Of("m.weight");
  EXPECT_EQ(tensor.shape, (std::vector<std::int64_t>{kN, kK}));
  EXPECT_TRUE(tensor.known);
  EXPECT_EQ(EncodedBytes(tensor.data.encoding, kN * kK), tensor.data.bytes);
  for (const auto& [begin, count] : {std::pair(0, kN), {0, 3}, {5, 2}, {7, 17}, {23, 1}})
    for (const bool ahead : {false, true}) {
      const auto values = RowsOf(file, tensor.data, begin, count, ahead);
      ASSERT_EQ(values.size(), static_cast<std::size_t>(kK * count));
      for (int i = 0; i < kK * count; ++i)
        ASSERT_EQ(values[i], numbers.Value(begin + i / kK, i % kK)) << begin << " " << count << " " << i;
    }
  // Rows of a fused matrix: those from another one on.
  TensorData part = tensor.data;
  part.order.first = 4;
  const auto values = RowsOf(file, part, 1, 6, false);
  for (int i = 0; i < kK * 6; ++i) ASSERT_EQ(values[i], numbers.Value(5 + i / kK, i % kK)) << i;
}

TEST(Gptq, NumbersShareWordsDownAndGroupsAreColumnsOfTheirOwn) {
  for (const int bits : {4, 8})
    for (const int groups : {1, 4}) {
      Numbers numbers(bits, groups, 3);
      Quantization form{.method = Method::kGptq, .bits = bits, .group = groups == 1 ? 0 : kK / groups};
      ExpectValues(Gptq(numbers, true), form, numbers);
      ExpectValues(Gptq(numbers, true, false), form, numbers);
      form.stored_less_one = false;
      ExpectValues(Gptq(numbers, false), form, numbers);
      for (int i = 0; i < kK; ++i) numbers.group_of[i] = i * 7 % groups;  // as desc_act leaves it
      ExpectValues(Gptq(numbers, false), form, numbers);
    }
}

TEST(Awq, NumbersShareWordsAcrossInAnOrderOfTheirOwn) {
  for (const int groups : {1, 4}) {
    const Numbers numbers(4, groups, 5);
    ExpectValues(Awq(numbers), {.method = Method::kAwq, .bits = 4, .group = groups == 1 ? 0 : kK / groups},
                 numbers);
  }
}

TEST(CompressedTensors, NumbersShareWordsAlongTheirRow) {
  for (const int bits : {4, 8})
    for (const int groups : {1, 4}) {
      Numbers numbers(bits, groups, 7);
      const int per = 32 / bits;
      const auto file = [&](bool zeros, bool bytes, bool order) {
        File out;
        out.Add("m.weight_packed", "I32", {kN, kK / per}, Across(numbers.q, kK, bits));
        out.Add("m.weight_scale", "BF16", {kN, groups}, [&] {
          std::string text;
          for (const float factor : numbers.factor)
            text.append(reinterpret_cast<const char*>(&factor) + 2, 2);
          return text;
        }());
        out.Add("m.weight_shape", "I64", {2}, Bytes(std::vector<std::int64_t>{kN, kK}));
        if (zeros && bytes) {
          std::vector<std::int8_t> signed_zeros;
          for (const int zero : numbers.zero)
            signed_zeros.push_back(static_cast<std::int8_t>(zero - (1 << (bits - 1))));
          out.Add("m.weight_zero_point", "I8", {kN, groups}, Bytes(signed_zeros));
        } else if (zeros) {
          out.Add("m.weight_zero_point", "I32", {kN / per, groups}, Down(numbers.zero, groups, bits));
        }
        if (order) out.Add("m.weight_g_idx", "I32", {kK}, Bytes(numbers.group_of));
        return out;
      };
      const Quantization form{.method = Method::kCompressed, .block_rows = 0, .bits = bits};
      ExpectValues(file(true, false, false), form, numbers);
      ExpectValues(file(true, true, false), form, numbers);
      for (int i = 0; i < kK; ++i) numbers.group_of[i] = (i * 5 + 1) % groups;
      ExpectValues(file(true, false, true), form, numbers);
      for (int i = 0; i < kK; ++i) numbers.group_of[i] = i / (kK / groups);
      std::ranges::fill(numbers.zero, 1 << (bits - 1));
      ExpectValues(file(false, false, false), form, numbers);
    }
}

TEST(CompressedTensors, WholeBytesHaveTheSameScales) {
  Numbers numbers(8, 1, 9);
  std::vector<std::int8_t> bytes;
  for (int& q : numbers.q) bytes.push_back(static_cast<std::int8_t>(q -= 128));
  const Quantization form{.method = Method::kCompressed, .block_rows = 0};
  for (const bool zeros : {true, false}) {
    if (!zeros) std::ranges::fill(numbers.zero, 0);
    File file;
    file.Add("m.weight", "I8", {kN, kK}, Bytes(bytes));
    file.Add("m.weight_scale", "F32", {kN, 1}, Bytes(numbers.factor));
    if (zeros) {
      std::vector<std::int8_t> points(numbers.zero.begin(), numbers.zero.end());
      for (std::size_t i = 0; i < points.size(); ++i) numbers.zero[i] = points[i];
      file.Add("m.weight_zero_point", "I8", {kN, 1}, Bytes(points));
    }
    ExpectValues(file, form, numbers);
  }
  std::ranges::fill(numbers.factor, 0.75F);
  File file;
  file.Add("m.weight", "I8", {kN, kK}, Bytes(bytes));
  file.Add("m.weight_scale", "F32", {}, Bytes(std::vector<float>{0.75F}));
  file.Add("m.input_scale", "F32", {}, Bytes(std::vector<float>{1.0F}));  // of what stays in bf16 here
  ExpectValues(file, form, numbers);
}

TEST(IntegerQuantization, NamesPartsThatAreMissingOrOfAnotherShape) {
  const Numbers numbers(4, 4, 11);
  const auto error = [&](File file, const Quantization& form) {
    const auto status = ResolveQuantized(form, file.index);
    return status ? std::string("no error") : status.error().message;
  };
  const Quantization gptq{.method = Method::kGptq, .bits = 4, .group = 16};
  File file = Gptq(numbers, true);
  EXPECT_EQ(error(file, gptq), "no error");
  for (const char* part : {"m.qzeros", "m.scales"}) {
    File without = file;
    std::erase_if(without.index.tensors, [&](const auto& tensor) { return tensor.name == part; });
    EXPECT_THAT(error(without, gptq),
                AllOf(HasSubstr("w.safetensors"), HasSubstr("m.qweight"), HasSubstr(part)));
  }
  const auto spoil = [&](const char* name, const char* dtype, std::vector<std::int64_t> shape) {
    File spoilt = file;
    spoilt.Of(name).dtype = dtype;
    spoilt.Of(name).shape = std::move(shape);
    return error(spoilt, gptq);
  };
  EXPECT_THAT(spoil("m.qzeros", "I32", {4, 24}), AllOf(HasSubstr("m.qzeros"), HasSubstr("[4, 24]")));
  EXPECT_THAT(spoil("m.qzeros", "F16", {4, 3}), AllOf(HasSubstr("m.qzeros"), HasSubstr("F16")));
  EXPECT_THAT(spoil("m.scales", "F16", {2, 24}), AllOf(HasSubstr("m.scales"), HasSubstr("group_size=16")));
  EXPECT_THAT(spoil("m.g_idx", "I32", {8}), AllOf(HasSubstr("m.g_idx"), HasSubstr("[64]")));
  EXPECT_THAT(spoil("m.qweight", "I32", {8}), AllOf(HasSubstr("m.qweight"), HasSubstr("two dimensions")));
  EXPECT_THAT(spoil("m.qweight", "I64", {8, 24}), HasSubstr("I64"));
  Quantization other = gptq;
  other.group = 1000;  // more than there are inputs: one group
  EXPECT_THAT(error(file, other), AllOf(HasSubstr("m.qzeros"), HasSubstr("group_size=1000")));
  File packed;
  packed.Add("m.weight_packed", "I32", {kN, 8}, Across(numbers.q, kK, 4));
  const Quantization compressed{.method = Method::kCompressed, .block_rows = 0, .bits = 4};
  EXPECT_THAT(error(packed, compressed), HasSubstr("there is no \"m.weight_scale\""));
  packed.Add("m.weight_scale", "F16", {kN, 5}, std::string(2 * kN * 5, '\0'));
  EXPECT_THAT(error(packed, compressed), AllOf(HasSubstr("m.weight_scale"), HasSubstr("[24, 5]")));
  Quantization none = compressed;
  none.bits = 0;
  EXPECT_THAT(error(packed, none), HasSubstr("m.weight_packed"));
}

TEST(Gptq, RefusesAGroupThatThereIsNot) {
  Numbers numbers(4, 4, 13);
  numbers.group_of[9] = 4;
  File file = Gptq(numbers, true);
  ASSERT_TRUE(ResolveQuantized({.method = Method::kGptq, .bits = 4, .group = 16}, file.index));
  RowReader reader([&](int, std::uint64_t offset, std::byte* out, std::uint64_t size) -> Status {
    std::memcpy(out, file.bytes.data() + offset, size);
    return {};
  });
  const auto rows = reader.Read(file.Of("m.weight").data, kK, 0, 2);
  ASSERT_FALSE(rows);
  EXPECT_THAT(rows.error().message, AllOf(HasSubstr("g_idx holds 4"), HasSubstr("0 to 3")));
}

TEST(QuantizationConfig, ReadsWhatToolsWrite) {
  const auto read = [](const char* text) {
    const auto form = ReadQuantization({{"quantization_config", *ParseJson(text)}});
    EXPECT_TRUE(form) << form.error().message;
    return form.value_or(Quantization{});
  };
  Quantization form = read(R"({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": true,
      "sym": true, "damp_percent": 0.01, "dynamic": {"-:.*gate$": {}}})");
  EXPECT_EQ(form.method, Method::kGptq);
  EXPECT_EQ(form.bits, 4);
  EXPECT_EQ(form.group, 128);
  EXPECT_TRUE(form.stored_less_one);
  form = read(R"({"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"})");
  EXPECT_EQ(form.bits, 8);
  EXPECT_EQ(form.group, 0);
  EXPECT_FALSE(form.stored_less_one);
  form = read(R"({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": true,
      "modules_to_not_convert": ["gate"]})");
  EXPECT_EQ(form.method, Method::kAwq);
  EXPECT_EQ(form.group, 64);
  form = read(R"({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups":
      {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group",
       "group_size": 128, "symmetric": false, "actorder": "static"}}}, "ignore": ["lm_head"],
       "kv_cache_scheme": null, "sparsity_config": {}, "transform_config": {}})");
  EXPECT_EQ(form.method, Method::kCompressed);
  EXPECT_EQ(form.bits, 4);
  form = read(R"({"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups":
      {"group_0": {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
       "input_activations": {"num_bits": 8, "dynamic": true}}}})");
  EXPECT_EQ(form.bits, 0);
  form = read(R"({"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups":
      {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "block",
       "block_structure": [128, 64]}}}})");
  EXPECT_EQ(form.block_rows, 128);
  EXPECT_EQ(form.block_columns, 64);
}

TEST(QuantizationConfig, RefusesTheRestByKeyAllAtOnce) {
  const auto refuse = [](const char* text) {
    const auto form = ReadQuantization({{"quantization_config", *ParseJson(text)}});
    return form ? Error{ErrorCode::kInternal, "no error"} : form.error();
  };
  const Error gptq = refuse(R"({"quant_method": "gptq", "bits": 3, "checkpoint_format": "marlin",
      "group_size": 128, "pack_dtype": "int64", "dynamic": {"+:.*up": {"bits": 8}}})");
  EXPECT_EQ(gptq.code, ErrorCode::kUnimplemented);
  EXPECT_THAT(gptq.message, AllOf(HasSubstr("quantization_config: bits=3"), HasSubstr("marlin"),
                                  HasSubstr("pack_dtype=\"int64\""), HasSubstr("+:.*up")));
  EXPECT_THAT(refuse(R"({"quant_method": "awq", "bits": 8, "version": "gemv", "zero_point": false,
      "group_size": 64})")
                  .message,
              AllOf(HasSubstr("bits=8"), HasSubstr("version=\"gemv\""), HasSubstr("zero_point=false")));
  for (const char* size : {"0", "-2", "1e30", "123456789012345", "\"128\"", "null"}) {
    const Error error =
        refuse(fmt::format(R"({{"quant_method": "gptq", "bits": 4, "group_size": {}}})", size).c_str());
    EXPECT_EQ(error.code, ErrorCode::kInvalidArgument) << size;
    EXPECT_THAT(error.message, HasSubstr("group_size")) << size;
  }
  EXPECT_THAT(refuse(R"({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
      "config_groups": {"a": {"weights": {"num_bits": 4, "type": "float", "strategy": "group"}}},
      "sparsity_config": {"format": "sparse-24-bitmask"}})")
                  .message,
              AllOf(HasSubstr("nvfp4"), HasSubstr("config_groups.a.weights: num_bits=4, type=\"float\""),
                    HasSubstr("sparsity_config: format")));
  EXPECT_THAT(refuse(R"({"quant_method": "compressed-tensors", "config_groups":
      {"a": {"weights": {"num_bits": 4, "type": "int", "strategy": "channel"}},
       "b": {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}}})")
                  .message,
              HasSubstr("config_groups.b.weights: num_bits=8"));
  EXPECT_THAT(refuse(R"({"quant_method": "bitsandbytes"})").message, HasSubstr("\"gptq\", \"awq\""));
}

}  // namespace
}  // namespace elasticmoe::model
