#include "model/gguf/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/file.h"
#include "model/test_models.h"
#include "model/tokenizer.h"

namespace elasticmoe::model {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

std::unique_ptr<Tokenizer> OpenWith(const ScratchDirectory& directory, const GgufWriter& writer) {
  directory.Write("t.gguf", writer.Header());
  auto tokenizer = Tokenizer::Open(directory / "t.gguf");
  EXPECT_TRUE(tokenizer) << tokenizer.error().message;
  return tokenizer ? *std::move(tokenizer) : nullptr;
}

std::string ErrorWith(const ScratchDirectory& directory, const GgufWriter& writer) {
  directory.Write("t.gguf", writer.Header());
  const auto tokenizer = Tokenizer::Open(directory / "t.gguf");
  if (tokenizer) return "no error";
  EXPECT_THAT(tokenizer.error().message, HasSubstr("t.gguf"));
  return tokenizer.error().message;
}

TEST(GgufTokenizers, TheBundledOneComesBackAsItWas) {
  const auto original = *Tokenizer::FromDirectory(ELASTICMOE_MODELS "/demo");
  auto json = ReadTokenizerJson(*ReadFile(ELASTICMOE_MODELS "/demo/tokenizer.json"));
  auto config = ReadPlainJson(*ReadFile(ELASTICMOE_MODELS "/demo/tokenizer_config.json"), "");
  GgufWriter writer;
  ASSERT_TRUE(WriteGgufTokenizer(*std::move(json), *config, 4100, writer));
  ScratchDirectory directory;
  const auto read = OpenWith(directory, writer);
  for (const char* text : {"It is a truth universally acknowledged", "a  b\n\n 12345 \t x",
                           "<|im_start|>user\nÄpfel 日本語 🙂<|im_end|>",
                           "e\xcc\x81 <think>no</think> don't <tool_call>", "\xff\xfe", "", "   "}) {
    const auto ids = original->Encode(text, true);
    EXPECT_EQ(read->Encode(text, true), ids) << text;
    EXPECT_EQ(read->Decode(ids, false), original->Decode(ids, false));
    EXPECT_EQ(read->Decode(ids, true), original->Decode(ids, true));
  }
  EXPECT_EQ(read->EosToken(), original->EosToken());
  EXPECT_EQ(read->BosToken(), original->BosToken());
  EXPECT_EQ(read->ChatTemplateSource(), original->ChatTemplateSource());
  EXPECT_TRUE(read->IsSpecial(4091));
  EXPECT_FALSE(read->IsSpecial(4092));
  EXPECT_EQ(read->Size(), original->Size());  // what fills up the vocabulary is nothing
}

TEST(GgufTokenizers, AFileWithoutVocabularyHasNone) {
  ScratchDirectory directory;
  EXPECT_EQ(OpenWith(directory, GgufWriter()), nullptr);
}

// Pieces "ab" and "bc" compete for "abc": the higher score wins, though it comes second.
GgufWriter SentencePiece() {
  GgufWriter writer;
  std::vector<std::string> tokens = {"<unk>", "<s>", "</s>"};
  std::vector<std::int32_t> types = {2, 3, 3};
  std::vector<float> scores(3, 0.0F);
  for (int byte = 0; byte < 256; ++byte) {
    tokens.push_back(fmt::format("<0x{:02X}>", byte));
    types.push_back(6);
    scores.push_back(0);
  }
  for (const auto& [token, score] :
       {std::pair("▁", -10.0F), std::pair("a", -11.0F), std::pair("b", -12.0F), std::pair("c", -13.0F),
        std::pair("ab", -2.0F), std::pair("bc", -1.0F), std::pair("▁a", -3.0F)}) {
    tokens.push_back(token);
    types.push_back(1);
    scores.push_back(score);
  }
  writer.Add("tokenizer.ggml.model", std::string("llama"));
  writer.Add("tokenizer.ggml.tokens", std::move(tokens));
  writer.Add("tokenizer.ggml.token_type", std::move(types));
  writer.Add("tokenizer.ggml.scores", std::move(scores));
  writer.Add("tokenizer.ggml.bos_token_id", std::uint32_t{1});
  writer.Add("tokenizer.ggml.eos_token_id", std::uint32_t{2});
  return writer;
}

TEST(GgufTokenizers, SentencePieceJoinsByScore) {
  ScratchDirectory directory;
  const auto tokenizer = OpenWith(directory, SentencePiece());
  const auto id = [&](const char* token) { return *tokenizer->Find(token); };
  EXPECT_THAT(tokenizer->Encode("abc", true), ElementsAre(1, id("▁a"), id("bc")));
  EXPECT_THAT(tokenizer->Encode("ab a", false), ElementsAre(id("▁"), id("ab"), id("▁a")));
  EXPECT_THAT(tokenizer->Encode("é", false), ElementsAre(id("▁"), id("<0xC3>"), id("<0xA9>")));
  EXPECT_EQ(tokenizer->Decode(tokenizer->Encode("ab é a</s>", false), true), "ab é a");
  EXPECT_EQ(tokenizer->EosToken(), "</s>");
}

TEST(GgufTokenizers, SettingsDecideOverTheFirstSpaceAndTheBeginning) {
  ScratchDirectory directory;
  GgufWriter writer = SentencePiece();
  writer.Add("tokenizer.ggml.add_space_prefix", false);
  writer.Add("tokenizer.ggml.add_bos_token", false);
  const auto tokenizer = OpenWith(directory, writer);
  EXPECT_THAT(tokenizer->Encode("bc", true), ElementsAre(*tokenizer->Find("bc")));
  EXPECT_EQ(tokenizer->Decode(tokenizer->Encode(" bc", true), true), " bc");
}

TEST(GgufTokenizers, SentencePieceIsWrittenAsItWasRead) {
  ScratchDirectory directory;
  const GgufWriter first = SentencePiece();
  const auto original = OpenWith(directory, first);
  auto read = ReadGgufTokenizer(*ParseGguf(first.Header(), first.Header().size()));
  ASSERT_TRUE(read && *read);
  GgufWriter second;
  const auto written = WriteGgufTokenizer((*read)->json, (*read)->config, original->Size(), second);
  ASSERT_TRUE(written) << written.error().message;
  const auto again = OpenWith(directory, second);
  for (const char* text : {"abc", "ab é a</s>", "a  b", "", "\xf0\x9f\x99\x82 cab"}) {
    const auto ids = original->Encode(text, true);
    EXPECT_EQ(again->Encode(text, true), ids) << text;
    EXPECT_EQ(again->Decode(ids, true), original->Decode(ids, true)) << text;
  }
  // Merges of which no scores are the reason.
  TokenizerJson other = (*read)->json;
  ASSERT_GT(other.merges.size(), 1u);
  other.merges.pop_back();
  GgufWriter third;
  const auto refused = WriteGgufTokenizer(std::move(other), (*read)->config, original->Size(), third);
  ASSERT_FALSE(refused);
  EXPECT_THAT(refused.error().message, HasSubstr("merges"));
}

TEST(GgufTokenizers, RefuseWhatTheyDoNotKnowByKey) {
  ScratchDirectory directory;
  const auto bpe = [](const char* model, const char* pre, std::vector<std::string> merges) {
    GgufWriter writer;
    writer.Add("tokenizer.ggml.model", std::string(model));
    writer.Add("tokenizer.ggml.pre", std::string(pre));
    writer.Add("tokenizer.ggml.tokens", std::vector<std::string>{"a", "b", "ab"});
    writer.Add("tokenizer.ggml.merges", std::move(merges));
    return writer;
  };
  EXPECT_EQ(ErrorWith(directory, bpe("gpt2", "qwen2", {"a b"})), "no error");
  EXPECT_THAT(ErrorWith(directory, bpe("bert", "qwen2", {})), HasSubstr("tokenizer.ggml.model=\"bert\""));
  EXPECT_THAT(ErrorWith(directory, bpe("gpt2", "nobody", {})),
              AllOf(HasSubstr("tokenizer.ggml.pre=\"nobody\""), HasSubstr("llama-bpe")));
  EXPECT_THAT(ErrorWith(directory, bpe("gpt2", "qwen2", {"ab"})), HasSubstr("merges: entry 0"));
  EXPECT_THAT(ErrorWith(directory, bpe("gpt2", "qwen2", {"a c"})), HasSubstr("merges"));
  GgufWriter wrong = bpe("gpt2", "qwen2", {});
  wrong.Add("tokenizer.ggml.token_type", std::vector<std::int32_t>{1});
  EXPECT_THAT(ErrorWith(directory, wrong), HasSubstr("token_type has 1 entries"));
  GgufWriter beyond = bpe("gpt2", "qwen2", {});
  beyond.Add("tokenizer.ggml.eos_token_id", std::uint32_t{3});
  EXPECT_THAT(ErrorWith(directory, beyond), HasSubstr("eos_token_id=3"));
  GgufWriter unscored;
  unscored.Add("tokenizer.ggml.model", std::string("llama"));
  unscored.Add("tokenizer.ggml.tokens", std::vector<std::string>{"a"});
  EXPECT_THAT(ErrorWith(directory, unscored), HasSubstr("tokenizer.ggml.scores"));
}

TEST(GgufTokenizers, APatternWithoutANameIsNotWritten) {
  auto json = ReadTokenizerJson(*ReadFile(ELASTICMOE_MODELS "/demo/tokenizer.json"));
  json->rest["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "x";
  GgufWriter writer;
  const auto status = WriteGgufTokenizer(*std::move(json), PlainJson::object(), 4096, writer);
  ASSERT_FALSE(status);
  EXPECT_EQ(status.error().code, ErrorCode::kUnimplemented);
  EXPECT_THAT(status.error().message, HasSubstr("pre_tokenizer"));
}

}  // namespace
}  // namespace elasticmoe::model
