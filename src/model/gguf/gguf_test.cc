#include "model/gguf/gguf.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>

#include "model/checkpoint.h"
#include "model/gguf/export.h"
#include "model/gguf/writer.h"
#include "model/inspect.h"
#include "model/test_models.h"

namespace elasticmoe::model {
namespace {

using testing::AllOf;
using testing::HasSubstr;

// A file with one metadata key and two tensors, and ways to spoil it.
struct SmallFile {
  GgufWriter writer;
  SmallFile() {
    writer.Add("general.name", std::string("small"));
    writer.AddTensor("a", {2, 64}, Encoding::kQ8_0);
    writer.AddTensor("b", {3}, Encoding::kF32);
  }
  std::string Bytes() const { return writer.Header() + std::string(writer.DataBytes(), '\1'); }
};

template <class T>
std::string Raw(T value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof(value));
}
std::string RawText(std::string_view text) {
  return Raw<std::uint64_t>(text.size()) + std::string(text);
}
std::string Start(std::uint64_t tensors, std::uint64_t pairs, std::uint32_t version = 3) {
  return "GGUF" + Raw(version) + Raw(tensors) + Raw(pairs);
}
std::string TensorEntry(std::string_view name, std::vector<std::uint64_t> sizes, std::uint32_t type,
                        std::uint64_t offset) {
  std::string out = RawText(name) + Raw<std::uint32_t>(sizes.size());
  for (const std::uint64_t size : sizes) out += Raw(size);
  return out + Raw(type) + Raw(offset);
}

Error ErrorOf(const std::string& bytes) {
  const auto parsed = ParseGguf(bytes, bytes.size());
  return parsed ? Error{ErrorCode::kInternal, "no error"} : parsed.error();
}

TEST(GgufHeaders, GiveBackWhatWasWritten) {
  SmallFile file;
  file.writer.Add("t.count", std::uint32_t{7});
  file.writer.Add("t.share", 0.5F);
  file.writer.Add("t.flag", true);
  file.writer.Add("t.texts", std::vector<std::string>{"x", "", "yz"});
  file.writer.Add("t.ids", std::vector<std::int32_t>{-1, 2});
  file.writer.Add("t.scores", std::vector<float>{0.25F});
  const std::string bytes = file.Bytes();
  const auto parsed = ParseGguf(bytes, bytes.size());
  ASSERT_TRUE(parsed) << parsed.error().message;
  EXPECT_EQ(parsed->Text("general.name").value(), "small");
  EXPECT_EQ(parsed->Int("t.count").value(), 7);
  EXPECT_EQ(parsed->Number("t.share").value(), 0.5);
  EXPECT_EQ(*parsed->Get<bool>("t.flag"), true);
  EXPECT_EQ(parsed->Texts("t.texts").value()[2], "yz");
  EXPECT_EQ(*parsed->Get<std::vector<std::int64_t>>("t.ids"), (std::vector<std::int64_t>{-1, 2}));
  EXPECT_EQ(*parsed->Get<std::vector<double>>("t.scores"), (std::vector<double>{0.25}));
  EXPECT_THAT(parsed->Int("t.share").error().message, HasSubstr("t.share"));
  ASSERT_EQ(parsed->tensors.size(), 2u);
  EXPECT_EQ(parsed->tensors[0].shape, (std::vector<std::int64_t>{2, 64}));
  EXPECT_EQ(parsed->tensors[0].encoding, Encoding::kQ8_0);
  EXPECT_EQ(parsed->tensors[0].bytes, 4u * 34);
  EXPECT_EQ(parsed->tensors[0].offset % 32, 0u);
  EXPECT_EQ(parsed->tensors[1].offset, parsed->tensors[0].offset + 160);
}

TEST(GgufHeaders, EveryCutIsAnError) {
  const std::string bytes = SmallFile().Bytes();
  const std::size_t needed = SmallFile().writer.Header().size() + 160 + 12;  // without the last padding
  for (std::size_t size = 0; size < needed; ++size)
    ASSERT_EQ(ErrorOf(bytes.substr(0, size)).code, ErrorCode::kDataLoss) << size;
  EXPECT_TRUE(ParseGguf(bytes.substr(0, needed), needed));
}

TEST(GgufHeaders, RefuseWhatLies) {
  EXPECT_THAT(ErrorOf("PK\3\4").message, HasSubstr("no GGUF file"));
  EXPECT_THAT(ErrorOf("version https://git-lfs").message, HasSubstr("git lfs pull"));
  EXPECT_THAT(ErrorOf(Start(0, 0, 1)).message, HasSubstr("version=1"));
  EXPECT_THAT(ErrorOf(Start(0, 0, 0x03000000)).message, HasSubstr("little-endian"));
  EXPECT_THAT(ErrorOf(Start(std::uint64_t{1} << 60, 0)).message,
              HasSubstr("number of tensors=1152921504606846976"));
  EXPECT_THAT(ErrorOf(Start(0, std::uint64_t{1} << 60)).message, HasSubstr("number of metadata keys"));
  EXPECT_THAT(ErrorOf(Start(0, 1) + Raw<std::uint64_t>(~0ULL) + std::string(9, 'x')).message,
              HasSubstr("metadata key"));
  EXPECT_THAT(ErrorOf(Start(0, 1) + RawText("k") + Raw<std::uint32_t>(13) + Raw<std::uint64_t>(0)).message,
              HasSubstr("unknown type 13"));
  EXPECT_THAT(ErrorOf(Start(0, 1) + RawText("k") + Raw<std::uint32_t>(9) + Raw<std::uint32_t>(9) +
                      Raw<std::uint64_t>(0))
                  .message,
              HasSubstr("list of values of type 9"));
  EXPECT_THAT(ErrorOf(Start(0, 1) + RawText("k") + Raw<std::uint32_t>(9) + Raw<std::uint32_t>(8) +
                      Raw<std::uint64_t>(1ULL << 50))
                  .message,
              HasSubstr("k=1125899906842624"));
  const std::string pair = RawText("key") + Raw<std::uint32_t>(7) + "\1";
  EXPECT_THAT(ErrorOf(Start(0, 2) + pair + pair).message, HasSubstr("\"key\" comes twice"));
  EXPECT_THAT(ErrorOf(Start(0, 1) + RawText("key") + Raw<std::uint32_t>(7) + "\2").message,
              HasSubstr("key=2"));
  EXPECT_THAT(
      ErrorOf(Start(0, 1) + RawText("general.alignment") + Raw<std::uint32_t>(4) + Raw<std::uint32_t>(0))
          .message,
      HasSubstr("general.alignment=0"));
}

TEST(GgufHeaders, RefuseTensorsThatCannotBe) {
  const std::string data(4096, '\0');
  const auto one = [&](std::vector<std::uint64_t> sizes, std::uint32_t type, std::uint64_t offset) {
    return ErrorOf(Start(1, 0) + TensorEntry("t", std::move(sizes), type, offset) + data).message;
  };
  EXPECT_EQ(one({32}, 8, 0), "no error");
  EXPECT_EQ(one({33}, 77, 0), "no error");  // a type that nobody knows is refused where it is needed
  EXPECT_THAT(one({33, 2}, 8, 0), AllOf(HasSubstr("\"t\""), HasSubstr("blocks of 32")));
  EXPECT_THAT(one({128}, 12, 0), HasSubstr("blocks of 256"));
  EXPECT_THAT(one({1ULL << 40, 1ULL << 40}, 0, 0), HasSubstr("impossible"));
  EXPECT_THAT(one({0}, 0, 0), HasSubstr("dimension of 0"));
  EXPECT_THAT(one({1, 1, 1, 1, 1}, 0, 0), HasSubstr("5 dimensions"));
  EXPECT_THAT(one({4}, 0, 7), HasSubstr("offset=7"));
  EXPECT_THAT(one({4096}, 0, 0), HasSubstr("cut off"));
  EXPECT_THAT(one({4}, 0, ~0ULL - 31), HasSubstr("cut off"));
  const auto two = [&](const char* name, std::uint64_t offset) {
    return ErrorOf(Start(2, 0) + TensorEntry("t", {16}, 0, 0) + TensorEntry(name, {16}, 0, offset) + data)
        .message;
  };
  EXPECT_EQ(two("u", 64), "no error");
  EXPECT_THAT(two("u", 32), HasSubstr("overlap"));
  EXPECT_THAT(two("t", 64), HasSubstr("listed twice"));
}

// Values of all tensors by name, as the loader would get them.
std::map<std::string, std::vector<float>> AllValues(const Checkpoint& checkpoint) {
  std::vector<std::ifstream> files;
  for (const auto& path : checkpoint.files) files.emplace_back(path, std::ios::binary);
  RowReader reader([&](int file, std::uint64_t offset, std::byte* out, std::uint64_t bytes) -> Status {
    files[file].seekg(static_cast<std::streamoff>(offset));
    files[file].read(reinterpret_cast<char*>(out), static_cast<std::streamsize>(bytes));
    EXPECT_TRUE(files[file]);
    return {};
  });
  std::map<std::string, std::vector<float>> all;
  for (const TensorSource& source : checkpoint.tensors) {
    const auto k = static_cast<std::uint64_t>(source.tensor.shape.back());
    const std::uint64_t rows = source.tensor.shape.size() == 2 ? source.tensor.shape[0] : 1;
    std::vector<float>& values = all[source.tensor.name];
    for (std::uint64_t row = 0; row < rows; row += 3) {  // slices that cut through heads
      const std::uint64_t count = std::min<std::uint64_t>(3, rows - row);
      const auto plain = reader.Read(source, k, row, count);
      EXPECT_TRUE(plain);
      values.resize(values.size() + count * k);
      const Encoding encoding = plain->type == DType::kBf16  ? Encoding::kBf16
                                : plain->type == DType::kF16 ? Encoding::kF16
                                                             : Encoding::kF32;
      Decode(encoding, plain->data, count * k, &values[values.size() - count * k]);
    }
  }
  return all;
}

class GgufModels : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    MakeModelOptions options = TinyModel(directory_ / "hf");
    options.shape = GetParam();
    ASSERT_TRUE(MakeModel(options));
  }

  Checkpoint Export(Encoding encoding) {
    const auto path = directory_ / "model.gguf";
    const auto written = ExportGguf({directory_ / "hf", path, encoding});
    EXPECT_TRUE(written) << written.error().message;
    EXPECT_EQ(written->bytes, std::filesystem::file_size(path));
    auto checkpoint = Checkpoint::Open(path);
    EXPECT_TRUE(checkpoint) << checkpoint.error().message;
    return *std::move(checkpoint);
  }

  Checkpoint Original() { return *Checkpoint::Open(directory_ / "hf"); }

  // What opening says of the file after `spoil`.
  std::string ErrorAfter(const std::function<void(std::string&)>& spoil) {
    std::string bytes = directory_.Read("model.gguf");
    spoil(bytes);
    directory_.Write("spoiled.gguf", bytes);
    const auto checkpoint = Checkpoint::Open(directory_ / "spoiled.gguf");
    if (checkpoint) return "no error";
    EXPECT_THAT(checkpoint.error().message, HasSubstr("spoiled.gguf"));
    return checkpoint.error().message;
  }

  ScratchDirectory directory_;
};
INSTANTIATE_TEST_SUITE_P(Shapes, GgufModels, testing::Values("qwen3-moe", "mixtral"),
                         [](const auto& info) { return info.param[0] == 'q' ? "Qwen3Moe" : "Mixtral"; });

TEST_P(GgufModels, AreTheDirectoryTheyWereMadeFrom) {
  const Checkpoint original = Original();
  for (const Encoding encoding : {Encoding::kBf16, Encoding::kF32}) {
    const Checkpoint read = Export(encoding);
    const core::ModelSpec &a = original.spec, &b = read.spec;
    EXPECT_EQ(a.family, b.family);
    EXPECT_EQ(std::tie(a.vocab, a.hidden, a.max_positions, a.rms_eps, a.tied_head, a.eos_ids),
              std::tie(b.vocab, b.hidden, b.max_positions, b.rms_eps, b.tied_head, b.eos_ids));
    EXPECT_EQ(std::tie(a.attention.heads, a.attention.kv_heads, a.attention.head_dim, a.attention.rope_theta,
                       a.attention.qk_norm, a.attention.qkv_bias),
              std::tie(b.attention.heads, b.attention.kv_heads, b.attention.head_dim, b.attention.rope_theta,
                       b.attention.qk_norm, b.attention.qkv_bias));
    EXPECT_EQ(std::tie(a.moe.experts, a.moe.top_k, a.moe.expert_width, a.moe.renormalize),
              std::tie(b.moe.experts, b.moe.top_k, b.moe.expert_width, b.moe.renormalize));
    EXPECT_EQ(a.LayerCount(), b.LayerCount());
    EXPECT_EQ(original.parameters, read.parameters);
    EXPECT_EQ(AllValues(original), AllValues(read));
  }
}

TEST(GgufEncode, LevelsStayInTheirRangeWhateverTheValues) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  const float tiny = std::numeric_limits<float>::denorm_min();
  for (const float odd : {nan, inf, -inf, 190 * tiny, -190 * tiny, 11 * tiny, -11 * tiny}) {
    std::vector<float> values(32, 0.0F);
    values[3] = odd, values[7] = -odd, values[30] = tiny;
    std::string bytes;
    Encode(Encoding::kQ8_0, values.data(), values.size(), bytes);
    ASSERT_EQ(bytes.size(), 34U);
    for (std::size_t i = 2; i < bytes.size(); ++i) EXPECT_NE(static_cast<std::int8_t>(bytes[i]), -128) << odd;
    if (odd > 0 && odd < 1) {
      EXPECT_EQ(static_cast<std::int8_t>(bytes[2 + 3]), odd > 100 * tiny ? 127 : 0);
    }
    bytes.clear();
    Encode(Encoding::kQ4_0, values.data(), values.size(), bytes);
    ASSERT_EQ(bytes.size(), 18U);
  }
}

TEST_P(GgufModels, QuantisedAreWithinHalfAStep) {
  const auto original = AllValues(Original());
  bool seen_blocks = false;
  for (const Encoding encoding : {Encoding::kF16, Encoding::kQ8_0, Encoding::kQ4_0}) {
    const Checkpoint checkpoint = Export(encoding);
    const auto read = AllValues(checkpoint);
    ASSERT_EQ(original.size(), read.size());
    for (const TensorSource& source : checkpoint.tensors) {
      const auto& want = original.at(source.tensor.name);
      const auto& got = read.at(source.tensor.name);
      if (source.encoding == Encoding::kF32) {
        EXPECT_EQ(want, got) << source.tensor.name;
        continue;
      }
      // Rows that are no whole blocks are written as f16.
      const bool blocks = source.tensor.shape.back() % BlockValues(encoding) == 0;
      ASSERT_EQ(source.encoding, blocks ? encoding : Encoding::kF16) << source.tensor.name;
      seen_blocks = seen_blocks || (blocks && encoding == Encoding::kQ4_0);
      for (std::size_t block = 0; block < want.size(); block += 32) {
        float largest = 0;
        for (int i = 0; i < 32; ++i) largest = std::max(largest, std::fabs(want[block + i]));
        // Half a step, the rounding of the step to f16, and, for q4_0, the end of the scale that has no +8.
        const float step = source.encoding == Encoding::kQ8_0   ? largest / 127
                           : source.encoding == Encoding::kQ4_0 ? largest / 8 * 2
                                                                : largest * 0x1p-10F;
        for (int i = 0; i < 32; ++i)
          ASSERT_NEAR(want[block + i], got[block + i], step * 0.51F + largest * 0x1p-10F)
              << source.tensor.name;
      }
    }
  }
  EXPECT_TRUE(seen_blocks);
}

TEST_P(GgufModels, RefuseASpoiledFileByKeyAndTensor) {
  Export(Encoding::kBf16);
  const auto rename = [&](std::string_view from, std::string_view to) {
    return ErrorAfter([&](std::string& bytes) {
      const auto at = bytes.find(from);
      ASSERT_NE(at, bytes.npos);
      bytes.replace(at, from.size(), to);
    });
  };
  const std::string arch = GetParam()[0] == 'q' ? "qwen3moe" : "llama";
  EXPECT_THAT(rename("blk.1.ffn_down_exps", "blk.1.ffn_dawn_exps"), HasSubstr("blk.1.ffn_down_exps.weight"));
  EXPECT_THAT(rename(arch + ".block_count", arch + ".black_count"),
              HasSubstr(arch + ".block_count: missing"));
  EXPECT_THAT(rename("general.architecture", "general.architecturx"), HasSubstr("general.architecture"));
  EXPECT_THAT(ErrorAfter([&](std::string& bytes) { bytes.resize(bytes.size() - 64); }), HasSubstr("cut off"));
  EXPECT_THAT(ErrorAfter([&](std::string& bytes) {
                const std::string key = arch + ".expert_count";
                bytes[bytes.find(key) + key.size() + 4] = 3;
              }),
              AllOf(HasSubstr("ffn_"), HasSubstr("expected 3 experts")));
  EXPECT_THAT(ErrorAfter([&](std::string& bytes) {
                const std::string key = "blk.0.attn_q.weight";
                bytes[bytes.find(key) + key.size() + 4 + 16] = 77;
              }),
              AllOf(HasSubstr("blk.0.attn_q.weight"), HasSubstr("type=77")));
}

TEST(GgufModelsOnDisk, OlderExpertsWithoutStacksAndLeftOversAreSeen) {
  ScratchDirectory directory;
  ASSERT_TRUE(MakeModel(TinyModel(directory / "hf")));
  const auto path = directory / "model.gguf";
  ASSERT_TRUE(ExportGguf({directory / "hf", path}));
  const auto open_with_extra = [&](const char* extra) {
    auto gguf = *OpenGguf(path);
    GgufWriter writer;
    for (const auto& [key, value] : gguf.metadata) {
      if (const auto* text = std::get_if<std::string>(&value)) writer.Add(key, *text);
      if (const auto* flag = std::get_if<bool>(&value)) writer.Add(key, *flag);
      if (const auto* number = std::get_if<double>(&value)) writer.Add(key, static_cast<float>(*number));
      if (const auto* integer = std::get_if<std::int64_t>(&value))
        writer.Add(key, static_cast<std::uint32_t>(*integer));
    }
    std::vector<std::string> data;
    const std::string bytes = directory.Read("model.gguf");
    for (const GgufTensor& tensor : gguf.tensors) {
      const std::string all = bytes.substr(tensor.offset, tensor.bytes);
      const auto stack = tensor.name.find("_exps");
      if (stack == std::string::npos) {
        writer.AddTensor(tensor.name, tensor.shape, *tensor.encoding);
        data.push_back(all);
        continue;
      }
      for (int expert = 0; expert < tensor.shape[0]; ++expert) {
        writer.AddTensor(fmt::format("{}.{}.weight", tensor.name.substr(0, stack), expert),
                         {tensor.shape[1], tensor.shape[2]}, *tensor.encoding);
        data.push_back(all.substr(expert * all.size() / tensor.shape[0], all.size() / tensor.shape[0]));
      }
    }
    writer.AddTensor(extra, {1}, Encoding::kF32);
    data.push_back(std::string(4, '\0'));
    EXPECT_TRUE(writer.Write(directory / "older.gguf", [&](std::size_t i, const GgufWriter::Append& append) {
      append(data[i]);
      return Status{};
    }));
    return Checkpoint::Open(directory / "older.gguf");
  };
  const auto older = open_with_extra("blk.9.something.weight");
  ASSERT_TRUE(older) << older.error().message;
  EXPECT_EQ(AllValues(*older), AllValues(*Checkpoint::Open(directory / "hf")));
  EXPECT_EQ(older->unused, std::vector<std::string>{"blk.9.something.weight"});
  EXPECT_THAT(open_with_extra("blk.0.attn_output.bias").error().message,
              AllOf(HasSubstr("older.gguf"), HasSubstr("blk.0.attn_output.bias")));
  EXPECT_THAT(open_with_extra("rope_freqs.weight").error().message, HasSubstr("rope_freqs.weight"));
}

TEST(GgufModelsOnDisk, PartsAreReadAsOneAndAMissingOneIsNamed) {
  ScratchDirectory directory;
  const auto part = [&](int i, int count, std::uint32_t total) {
    GgufWriter writer;
    writer.Add("split.count", static_cast<std::uint32_t>(count));
    writer.Add("split.tensors.count", total);
    writer.AddTensor(fmt::format("t{}", i), {8}, Encoding::kF32);
    directory.Write(fmt::format("m-{:05}-of-{:05}.gguf", i, count),
                    writer.Header() + std::string(writer.DataBytes(), '\0'));
  };
  for (int i = 1; i <= 3; ++i) part(i, 3, 3);
  const auto whole = OpenGguf(directory / "m-00001-of-00003.gguf");
  ASSERT_TRUE(whole) << whole.error().message;
  EXPECT_EQ(whole->files.size(), 3u);
  EXPECT_EQ(whole->Find("t3")->file, 2);
  EXPECT_THAT(OpenGguf(directory / "m-00002-of-00003.gguf").error().message,
              AllOf(HasSubstr("split.count=3"), HasSubstr("-00001-of-00003.gguf")));
  part(1, 3, 5);
  EXPECT_THAT(OpenGguf(directory / "m-00001-of-00003.gguf").error().message,
              HasSubstr("split.tensors.count=5"));
  part(1, 3, 3);
  std::filesystem::copy_file(directory / "m-00002-of-00003.gguf", directory / "m-00003-of-00003.gguf",
                             std::filesystem::copy_options::overwrite_existing);
  EXPECT_THAT(OpenGguf(directory / "m-00001-of-00003.gguf").error().message,
              AllOf(HasSubstr("m-00003-of-00003.gguf"), HasSubstr("\"t2\" is in two parts")));
  std::filesystem::remove(directory / "m-00002-of-00003.gguf");
  const auto missing = OpenGguf(directory / "m-00001-of-00003.gguf");
  EXPECT_EQ(missing.error().code, ErrorCode::kNotFound);
  EXPECT_THAT(missing.error().message, HasSubstr("m-00002-of-00003.gguf: no such file"));
}

TEST(GgufModelsOnDisk, TheBundledModelKeepsItsFigures) {
  ScratchDirectory directory;
  ASSERT_TRUE(ExportGguf({ELASTICMOE_MODELS "/demo", directory / "demo.gguf", Encoding::kQ8_0}));
  const auto checkpoint = Checkpoint::Open(directory / "demo.gguf");
  ASSERT_TRUE(checkpoint) << checkpoint.error().message;
  const auto original = Checkpoint::Open(ELASTICMOE_MODELS "/demo");
  Json report = InspectModel(*checkpoint), expected = InspectModel(*original);
  EXPECT_EQ(report["dtypes"], Json({"f32", "q8_0"}));
  for (const char* key : {"directory", "dtypes", "files", "bytes_on_disk"})
    report.erase(key), expected.erase(key);
  EXPECT_EQ(report, expected);
  EXPECT_EQ(checkpoint->generation.top_k, original->generation.top_k);
  EXPECT_EQ(checkpoint->generation.temperature, original->generation.temperature);
}

}  // namespace
}  // namespace elasticmoe::model
