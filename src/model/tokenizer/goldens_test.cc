// Held against the Rust library `tokenizers`: ids and texts of 40 tricky strings per tokenizer. The bundled
// tokenizer always; the large ones where ELASTICMOE_TOKENIZERS names the folder that
// tools/fetch_tokenizers.sh fills.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "base/file.h"
#include "base/json.h"
#include "model/gguf/tokenizer.h"
#include "model/tokenizer.h"
#include "model/tokenizer/tokenizer_config.h"

namespace elasticmoe::model {
namespace {

std::string Streamed(const Tokenizer& tokenizer, const std::vector<TokenId>& ids, bool skip_special) {
  StreamDecoder stream(tokenizer, skip_special);
  std::string text;
  for (const TokenId id : ids) text += stream.Add(id);
  return text + stream.Finish();
}

void ExpectGoldens(const Expected<std::unique_ptr<Tokenizer>>& tokenizer, const std::string& name) {
  ASSERT_TRUE(tokenizer) << tokenizer.error().message;
  ASSERT_NE(*tokenizer, nullptr);
  const Tokenizer& t = **tokenizer;
  const auto text = ReadFile(std::string(ELASTICMOE_TESTDATA "/tokenizers/goldens/") + name + ".json");
  ASSERT_TRUE(text) << text.error().message;
  const Json goldens = ParseJson(*text).value();
  ASSERT_EQ(goldens["cases"].size(), 40u);
  for (const Json& golden : goldens["cases"]) {
    SCOPED_TRACE(name + ": " + golden["id"].get<std::string>());
    const auto input = golden["text"].get<std::string>();
    const auto ids = golden["ids"].get<std::vector<TokenId>>();
    EXPECT_EQ(t.Encode(input, false), ids);
    if (golden.contains("ids_special")) {
      EXPECT_EQ(t.Encode(input, true), golden["ids_special"].get<std::vector<TokenId>>());
    }
    EXPECT_EQ(t.Decode(ids, false), golden["decoded"].get<std::string>());
    EXPECT_EQ(t.Decode(ids, true), golden["decoded_skip_special"].get<std::string>());
    EXPECT_EQ(Streamed(t, ids, false), golden["decoded"].get<std::string>());
    EXPECT_EQ(Streamed(t, ids, true), golden["decoded_skip_special"].get<std::string>());
    // Token texts are written in the vocabulary's own form.
    for (std::size_t i = 0; i < ids.size(); ++i)
      EXPECT_EQ(t.Find(golden["tokens"][i].get<std::string>()), ids[i]);
  }
}

TEST(BundledTokenizer, EqualsTheRustLibraryOnAllGoldens) {
  ExpectGoldens(Tokenizer::FromDirectory(ELASTICMOE_MODELS "/demo"), "demo");
}

// Small tokenizers made for one path each (tools/make_tokenizer_fixtures.mjs).
TEST(MadeTokenizers, EqualTheRustLibraryOnEveryPath) {
  const auto text = ReadFile(ELASTICMOE_TESTDATA "/tokenizers/made.json");
  ASSERT_TRUE(text) << text.error().message;
  const Json made = ParseJson(*text).value();
  ASSERT_EQ(made.size(), 31u);
  for (const Json& one : made) {
    const auto tokenizer = Tokenizer::FromJson(one["tokenizer"].dump(), "");
    ASSERT_TRUE(tokenizer) << one["name"] << ": " << tokenizer.error().message;
    const Tokenizer& t = **tokenizer;
    ASSERT_GE(one["cases"].size(), 20u);
    for (const Json& golden : one["cases"]) {
      SCOPED_TRACE(one["name"].dump() + " on " + golden["text"].dump());
      const auto input = golden["text"].get<std::string>();
      const auto ids = golden["ids"].get<std::vector<TokenId>>();
      EXPECT_EQ(t.Encode(input, false), ids);
      EXPECT_EQ(t.Encode(input, true), golden.value("ids_special", ids));
      const auto decoded = golden["decoded"].get<std::string>();
      const auto skipped = golden.value("decoded_skip_special", decoded);
      EXPECT_EQ(t.Decode(ids, false), decoded);
      EXPECT_EQ(t.Decode(ids, true), skipped);
      EXPECT_EQ(Streamed(t, ids, false), decoded);
      EXPECT_EQ(Streamed(t, ids, true), skipped);
    }
  }
}

class RealTokenizers : public testing::TestWithParam<const char*> {};

TEST_P(RealTokenizers, EqualTheRustLibraryOnAllGoldens) {
  const char* folder = std::getenv("ELASTICMOE_TOKENIZERS");
  if (folder == nullptr)
    GTEST_SKIP() << "set ELASTICMOE_TOKENIZERS to the folder of tools/fetch_tokenizers.sh";
  const auto directory = std::filesystem::path(folder) / GetParam();
  if (!std::filesystem::exists(directory)) GTEST_SKIP() << "no " << directory;
  ExpectGoldens(Tokenizer::FromDirectory(directory), GetParam());
}

// Written as GGUF metadata and read back.
TEST_P(RealTokenizers, KeepTheirGoldensInGguf) {
  const char* folder = std::getenv("ELASTICMOE_TOKENIZERS");
  if (folder == nullptr)
    GTEST_SKIP() << "set ELASTICMOE_TOKENIZERS to the folder of tools/fetch_tokenizers.sh";
  const auto directory = std::filesystem::path(folder) / GetParam();
  if (!std::filesystem::exists(directory)) GTEST_SKIP() << "no " << directory;
  auto json = ReadTokenizerJson(ReadFile(directory / "tokenizer.json").value());
  ASSERT_TRUE(json) << json.error().message;
  const auto config = ReadTokenizerConfigFiles(directory);
  ASSERT_TRUE(config) << config.error().message;
  GgufWriter writer;
  constexpr int kVocab = 260'000;
  const auto written = WriteGgufTokenizer(*std::move(json), *config, kVocab, writer);
  if (std::string_view(GetParam()) == "llama2") {  // sentencepiece's scores are not in tokenizer.json
    EXPECT_EQ(written.error().code, ErrorCode::kUnimplemented);
    return;
  }
  ASSERT_TRUE(written) << written.error().message;
  const std::string bytes = writer.Header();
  const auto path = std::filesystem::path(testing::TempDir()) / fmt::format("elasticmoe-{}.gguf", GetParam());
  std::ofstream(path, std::ios::binary) << bytes;
  ExpectGoldens(Tokenizer::FromGguf(path), GetParam());
  std::filesystem::remove(path);
}

INSTANTIATE_TEST_SUITE_P(All, RealTokenizers,
                         testing::Values("qwen3", "llama3", "llama2", "deepseek_v3", "gpt_oss"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace elasticmoe::model
