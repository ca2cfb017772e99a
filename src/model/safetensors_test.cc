#include "model/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/test_models.h"

namespace elasticmoe::model {
namespace {

using testing::HasSubstr;

std::string ErrorOf(const std::string& header, std::uint64_t data_bytes = 1000) {
  const auto tensors = ParseSafetensorsHeader(header, data_bytes);
  if (tensors) return "no error";
  EXPECT_EQ(tensors.error().code, ErrorCode::kDataLoss);
  return tensors.error().message;
}

// One tensor "a" of that body.
std::string ErrorOfTensor(const std::string& body) {
  return ErrorOf("{\"a\":" + body + "}");
}

TEST(Safetensors, ReadsNamesTypesShapesAndOffsets) {
  const auto tensors = ParseSafetensorsHeader(
      R"({"__metadata__":{"format":"pt","deep":{"a":[1,{"b":2}]}},
          "w":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},
          "scalar":{"data_offsets":[0,4],"note":[{}],"shape":[],"dtype":"F32"},
          "empty":{"dtype":"F32","shape":[0,7],"data_offsets":[8,8]}}   )",
      20);
  ASSERT_TRUE(tensors) << tensors.error().message;
  ASSERT_EQ(tensors->size(), 3u);
  EXPECT_EQ((*tensors)[0].name, "w");
  EXPECT_EQ((*tensors)[0].dtype, "BF16");
  EXPECT_EQ((*tensors)[0].shape, (std::vector<std::int64_t>{2, 3}));
  EXPECT_EQ((*tensors)[0].begin, 4u);
  EXPECT_EQ((*tensors)[0].end, 16u);
  EXPECT_TRUE((*tensors)[1].shape.empty());
}

TEST(Safetensors, LeavesSizesOfUnknownTypesAlone) {
  EXPECT_EQ(ErrorOfTensor(R"({"dtype":"F6_NEW","shape":[3],"data_offsets":[0,5]})"), "no error");
}

TEST(Safetensors, SaysHowManyBytesAreMissing) {
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"U8","shape":[100],"data_offsets":[0,100]}})", 60),
              HasSubstr("tensor \"a\" ends at byte 100 of 60 bytes of data: 40 bytes are missing"));
}

TEST(Safetensors, RefusesOffsetsThatLie) {
  EXPECT_THAT(ErrorOfTensor(R"({"dtype":"U8","shape":[2],"data_offsets":[9,7]})"), HasSubstr("[9, 7]"));
  EXPECT_THAT(ErrorOfTensor(R"({"dtype":"F32","shape":[2,2],"data_offsets":[0,8]})"),
              HasSubstr("hold 8 bytes, dtype F32 and shape [2, 2] say 16"));
  EXPECT_THAT(ErrorOfTensor(
                  R"({"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,18446744073709551615]})"),
              HasSubstr("shape holds 18446744073709551615"));
  EXPECT_THAT(ErrorOfTensor(R"({"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]})"),
              HasSubstr("more than 2^61"));
  EXPECT_THAT(ErrorOfTensor(R"({"dtype":"U8","shape":[1],"data_offsets":[-1,0]})"), HasSubstr("negative"));
  EXPECT_THAT(ErrorOfTensor(R"({"dtype":"U8","shape":[1],"data_offsets":[0,1.5]})"),
              HasSubstr("no 64-bit integer"));
  EXPECT_THAT(ErrorOfTensor(R"({"dtype":"U8","shape":[1],"data_offsets":[0]})"), HasSubstr("less than 2"));
  EXPECT_THAT(ErrorOfTensor(R"({"dtype":"U8","shape":[1],"data_offsets":[0,1,2]})"),
              HasSubstr("more than 2"));
}

TEST(Safetensors, RefusesOverlappingTensorsByName) {
  const std::string message = ErrorOf(R"({"a":{"dtype":"U8","shape":[10],"data_offsets":[5,15]},
                                          "b":{"dtype":"U8","shape":[6],"data_offsets":[0,6]}})");
  EXPECT_THAT(message, HasSubstr("\"b\" and \"a\" overlap"));
  EXPECT_THAT(message, HasSubstr("[0, 6] and [5, 15]"));
}

TEST(Safetensors, RefusesATensorThatIsListedTwice) {
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
                          "a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})"),
              HasSubstr("\"a\" is listed twice"));
  EXPECT_THAT(ErrorOfTensor(R"({"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]})"),
              HasSubstr("dtype comes twice"));
}

TEST(Safetensors, RefusesHeadersOfAnotherForm) {
  EXPECT_THAT(ErrorOf("not json"), HasSubstr("no JSON at byte"));
  EXPECT_THAT(ErrorOf(""), HasSubstr("no JSON"));
  EXPECT_THAT(ErrorOf("[]"), HasSubstr("header: found"));
  EXPECT_THAT(ErrorOf(R"({"a":3})"), HasSubstr("tensor \"a\""));
  EXPECT_THAT(ErrorOf(R"({"a":[3]})"), HasSubstr("tensor \"a\""));
  EXPECT_THAT(ErrorOf("{} {}"), HasSubstr("no JSON"));
  EXPECT_THAT(ErrorOfTensor(R"({"dtype":"U8","shape":[1]})"), HasSubstr("a field is missing"));
  EXPECT_THAT(ErrorOfTensor(R"({"dtype":["U8"],"shape":[1],"data_offsets":[0,1]})"),
              HasSubstr("wrong place"));
  EXPECT_THAT(ErrorOfTensor(R"({"dtype":"U8","shape":{},"data_offsets":[0,1]})"), HasSubstr("wrong place"));
  EXPECT_THAT(ErrorOfTensor(R"({"dtype":"U8","shape":[[1]],"data_offsets":[0,1]})"),
              HasSubstr("wrong place"));
  EXPECT_THAT(ErrorOfTensor(R"({"dtype":null,"shape":[1],"data_offsets":[0,1]})"), HasSubstr("null"));
  EXPECT_THAT(ErrorOf("{\"a\xff\":1}"), HasSubstr("no JSON"));
  EXPECT_THAT(ErrorOf(std::string(1'000'000, '[')), HasSubstr("header: found"));
}

// Twenty thousand names would take many seconds if each cost a search through all before it.
TEST(Safetensors, ReadsALargeHeaderWithoutQuadraticCost) {
  std::string header = "{\"z\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}";
  constexpr int kTensors = 200'000;
  for (int i = 1; i < kTensors; ++i)
    header += fmt::format(
        R"(,"model.layers.{}.mlp.experts.{}.w":{{"dtype":"U8","shape":[1],"data_offsets":[{},{}]}})", i % 64,
        i, i, i + 1);
  const auto tensors = ParseSafetensorsHeader(header + "}", kTensors);
  ASSERT_TRUE(tensors) << tensors.error().message;
  EXPECT_EQ(tensors->size(), static_cast<std::size_t>(kTensors));
}

TEST(WeightMap, ReadsTensorsAndShards) {
  const auto entries = ParseWeightMap(
      R"({"metadata":{"total_size":3},"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors"},"x":[1,{"a":"b"}]})");
  ASSERT_TRUE(entries) << entries.error().message;
  ASSERT_EQ(entries->size(), 2u);
  EXPECT_EQ((*entries)[1], (std::pair<std::string, std::string>("b", "m-2.safetensors")));
}

TEST(WeightMap, RefusesShardsOutsideOfTheDirectory) {
  for (const char* shard : {"../m.safetensors", "/etc/m.safetensors", "..", "", "a/b.safetensors",
                            "a\\\\b.safetensors", ".safetensors", "weights.bin", "a\\u0000.safetensors"}) {
    const auto entries = ParseWeightMap(fmt::format(R"({{"weight_map":{{"a":"{}"}}}})", shard));
    ASSERT_FALSE(entries) << shard;
    EXPECT_EQ(entries.error().code, ErrorCode::kInvalidArgument);
    EXPECT_THAT(entries.error().message, HasSubstr("tensor \"a\""));
  }
}

TEST(WeightMap, RefusesOtherForms) {
  for (const char* text :
       {"", "[]", "{}", R"({"weight_map":{}})", R"({"weight_map":[1]})", R"({"weight_map":"a"})",
        R"({"weight_map":{"a":1}})", R"({"weight_map":{"a":null}})", R"({"weight_map":{"a":{}}})",
        R"({"weight_map":{"a":"b.safetensors"},"weight_map":{}})"}) {
    const auto entries = ParseWeightMap(text);
    ASSERT_FALSE(entries) << text;
    EXPECT_EQ(entries.error().code, ErrorCode::kInvalidArgument) << text;
  }
}

class SafetensorsFiles : public testing::Test {
 protected:
  std::string ErrorOfBytes(const std::string& bytes) {
    directory_.Write("x.safetensors", bytes);
    const auto file = ReadSafetensors(directory_ / "x.safetensors");
    if (file) return "no error";
    EXPECT_THAT(file.error().message, HasSubstr("x.safetensors"));
    return file.error().message;
  }
  ScratchDirectory directory_;
};

TEST_F(SafetensorsFiles, GivesThePlaceOfTheData) {
  const std::string header = R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})";
  directory_.Write("x.safetensors", SafetensorsBytes(header, "abcde"));
  const auto file = ReadSafetensors(directory_ / "x.safetensors");
  ASSERT_TRUE(file) << file.error().message;
  EXPECT_EQ(file->data_offset, 8 + header.size());
  EXPECT_EQ(file->file_bytes, 8 + header.size() + 5);
}

TEST_F(SafetensorsFiles, RefusesFilesCutOffAnywhere) {
  const std::string header = R"({"a":{"dtype":"U8","shape":[5],"data_offsets":[0,5]}})";
  const std::string whole = SafetensorsBytes(header, "abcde");
  for (std::size_t size = 0; size < whole.size(); ++size)
    EXPECT_NE(ErrorOfBytes(whole.substr(0, size)), "no error") << size;
  EXPECT_EQ(ErrorOfBytes(whole), "no error");
  EXPECT_THAT(ErrorOfBytes(whole.substr(0, whole.size() - 3)), HasSubstr("3 bytes are missing"));
  EXPECT_THAT(ErrorOfBytes(whole.substr(0, 20)), HasSubstr("bytes are missing"));
  EXPECT_THAT(ErrorOfBytes(""), HasSubstr("0 bytes are no safetensors file"));
}

TEST_F(SafetensorsFiles, RefusesOtherKindsOfFile) {
  EXPECT_THAT(ErrorOfBytes("version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
              HasSubstr("git lfs pull"));
  EXPECT_THAT(ErrorOfBytes("PK\x03\x04 a zip file of pickles"), HasSubstr("header length="));
}

TEST_F(SafetensorsFiles, NamesAMissingFileAndADirectory) {
  EXPECT_EQ(ReadSafetensors(directory_ / "gone.safetensors").error().code, ErrorCode::kNotFound);
  EXPECT_EQ(ReadSafetensors(directory_.Path()).error().code, ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace elasticmoe::model
