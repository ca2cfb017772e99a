#include "model/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/json.h"
#include "base/rng.h"
#include "model/tokenizer/unicode.h"

namespace elasticmoe::model {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

// A tokenizer over single characters, some merges and <0x00> ... <0xFF>, to be changed by each test.
Json SmallJson() {
  Json vocab = Json::object();
  const auto add = [&](const std::string& token) { vocab[token] = vocab.size(); };
  for (const char* token : {"<unk>", "<s>", "</s>", "a", "b", "ab", "abab", "▁"}) add(token);
  for (int byte = 0; byte < 256; ++byte) add(fmt::format("<0x{:02X}>", byte));
  return {{"added_tokens",
           {{{"id", 1}, {"content", "<s>"}, {"special", true}},
            {{"id", 2}, {"content", "</s>"}, {"special", true}},
            {{"id", 300}, {"content", "<call>"}, {"special", false}}}},
          {"normalizer", nullptr},
          {"pre_tokenizer", nullptr},
          {"post_processor", nullptr},
          {"decoder",
           {{"type", "Sequence"},
            {"decoders",
             {{{"type", "Replace"}, {"pattern", {{"String", "▁"}}}, {"content", " "}},
              {{"type", "ByteFallback"}},
              {{"type", "Fuse"}}}}}},
          {"model",
           {{"type", "BPE"},
            {"unk_token", "<unk>"},
            {"byte_fallback", true},
            {"vocab", vocab},
            {"merges", {"a b", "ab ab"}}}}};
}

std::unique_ptr<Tokenizer> Small(const Json& config = Json::object()) {
  auto tokenizer = Tokenizer::FromJson(SmallJson().dump(), config.dump());
  EXPECT_TRUE(tokenizer) << tokenizer.error().message;
  return *std::move(tokenizer);
}

std::unique_ptr<Tokenizer> Demo() {
  auto tokenizer = Tokenizer::FromDirectory(ELASTICMOE_MODELS "/demo");
  EXPECT_TRUE(tokenizer) << tokenizer.error().message;
  return *std::move(tokenizer);
}

Error LoadError(const Json& json, const std::string& config = "") {
  const auto tokenizer = Tokenizer::FromJson(json.dump(), config);
  EXPECT_FALSE(tokenizer);
  return tokenizer ? Error{} : tokenizer.error();
}

TEST(Tokenizer, AddsBosAndEosWhereTheConfigSaysSo) {
  const Json names = {{"bos_token", {{"content", "<s>"}}}, {"eos_token", "</s>"}};
  EXPECT_THAT(Small(names)->Encode("ab", true), ElementsAre(5));
  Json config = names;
  config["add_bos_token"] = true;
  EXPECT_THAT(Small(config)->Encode("ab", true), ElementsAre(1, 5));
  EXPECT_THAT(Small(config)->Encode("ab", false), ElementsAre(5));
  config["add_eos_token"] = true;
  EXPECT_THAT(Small(config)->Encode("ab", true), ElementsAre(1, 5, 2));
  EXPECT_EQ(Small(config)->BosToken(), "<s>");
  EXPECT_EQ(Small(config)->EosToken(), "</s>");
}

TEST(Tokenizer, AnExplicitFlagDecidesOverThePostProcessor) {
  Json json = SmallJson();
  json["post_processor"] = {{"type", "TemplateProcessing"},
                            {"single", {{{"SpecialToken", {{"id", "<s>"}}}}, {{"Sequence", {{"id", "A"}}}}}},
                            {"special_tokens", {{"<s>", {{"ids", {1}}}}}}};
  const auto encode = [&](const char* config) {
    return Tokenizer::FromJson(json.dump(), config).value()->Encode("b", true);
  };
  EXPECT_THAT(encode(""), ElementsAre(1, 4));
  EXPECT_THAT(encode(R"({"bos_token": "<s>", "add_bos_token": true})"), ElementsAre(1, 4));  // not twice
  EXPECT_THAT(encode(R"({"bos_token": "<s>", "add_bos_token": false})"), ElementsAre(4));
}

TEST(Tokenizer, KnowsTokensByTextAndId) {
  const auto t = Small();
  EXPECT_EQ(t->Find("ab"), 5);
  EXPECT_EQ(t->Find("<call>"), 300);
  EXPECT_EQ(t->Find("nothing"), std::nullopt);
  EXPECT_TRUE(t->IsSpecial(1));
  EXPECT_FALSE(t->IsSpecial(300));
  EXPECT_FALSE(t->IsSpecial(3));
  EXPECT_FALSE(t->IsSpecial(-1));
  EXPECT_EQ(t->Size(), 301);
  EXPECT_EQ(t->TokenText(7), " ");
  EXPECT_EQ(t->TokenBytes(8 + 0xE4), "\xE4");
  EXPECT_EQ(t->TokenText(8 + 0xE4), kReplacementCharacter);
  EXPECT_EQ(t->TokenText(300), "<call>");
  EXPECT_EQ(t->TokenBytes(299), "");
}

TEST(Tokenizer, DecodeSkipsUnknownIds) {
  const auto t = Small();
  const std::vector<TokenId> ids = {3, 299, -7, 1 << 30, 4, 2};
  EXPECT_EQ(t->Decode(ids, false), "ab</s>");
  EXPECT_EQ(t->Decode(ids, true), "ab");
}

TEST(Tokenizer, ReadsBadUtf8AsReplacementCharacters) {
  const auto t = Demo();
  EXPECT_EQ(t->Encode("a\xFF\xE4\xBD z", false), t->Encode("a\uFFFD\uFFFD z", false));
  EXPECT_EQ(t->Encode(std::string("\xED\xA0\x80", 3), false), t->Encode("\uFFFD\uFFFD\uFFFD", false));
}

TEST(Tokenizer, DecodeReplacesBytesThatAreNoUtf8) {
  const auto t = Small();
  const auto byte = [](int b) { return static_cast<TokenId>(8 + b); };
  EXPECT_EQ(t->Decode(std::vector<TokenId>{byte(0xE4), byte(0xBD), byte(0xA0), 3}, false), "你a");
  EXPECT_EQ(t->Decode(std::vector<TokenId>{byte(0xE4), byte(0xBD), 3}, false), "\uFFFD\uFFFDa");
  EXPECT_EQ(t->Decode(std::vector<TokenId>{byte('\n'), byte(0xE4)}, false), "\uFFFD\uFFFD");
}

TEST(Tokenizer, EmptyTextGivesOnlyWhatIsAddedAround) {
  EXPECT_TRUE(Demo()->Encode("", true).empty());
  EXPECT_THAT(Small({{"bos_token", "<s>"}, {"add_bos_token", true}})->Encode("", true), ElementsAre(1));
}

// The time of a naive merge or of a backtracking split would be hours here.
TEST(Tokenizer, LongRunsTakeTimeInProportion) {
  const auto demo = Demo();
  const auto small = Small();
  for (const char* unit : {"a", "A", " ", "\n", "<", "你", "e\u0301", "1", "<|im_"}) {
    std::string text;
    while (text.size() < 1'000'000) text += unit;
    EXPECT_EQ(demo->Decode(demo->Encode(text, false), false), Normalize(text, NormalForm::kNfc)) << unit;
    EXPECT_EQ(small->Decode(small->Encode(text, false), false), text) << unit;
  }
}

TEST(StreamDecoder, NeverGivesHalfACharacter) {
  const auto t = Demo();
  const std::string text = "naïve 你好 👩‍👧 <think>…";
  for (const TokenId id : t->Encode(text, false)) ASSERT_LT(id, t->Size());
  StreamDecoder stream(*t, false);
  std::string all;
  for (const TokenId id : t->Encode(text, false)) {
    const std::string piece = stream.Add(id);
    EXPECT_TRUE(IsUtf8(piece));
    EXPECT_EQ(piece.find(kReplacementCharacter), std::string::npos);
    all += piece;
  }
  EXPECT_EQ(all + stream.Finish(), text);
}

TEST(StreamDecoder, FinishShowsWhatWasCutOff) {
  const auto t = Demo();
  std::vector<TokenId> ids = t->Encode("\U0001F469", false);
  ASSERT_GT(ids.size(), 1u);
  ids.pop_back();
  StreamDecoder stream(*t, false);
  std::string all;
  for (const TokenId id : ids) all += stream.Add(id);
  EXPECT_EQ(all, "");
  EXPECT_EQ(stream.Finish(), kReplacementCharacter);
}

TEST(StreamDecoder, EqualsDecodeOnRandomIds) {
  const auto demo = Demo();
  const auto small = Small();
  for (const Tokenizer* t : {demo.get(), small.get()}) {
    for (std::uint64_t seed = 0; seed < 300; ++seed) {
      Rng rng(seed);
      std::vector<TokenId> ids;
      for (auto n = rng.Below(30); n > 0; --n) ids.push_back(static_cast<TokenId>(rng.Below(300)));
      StreamDecoder stream(*t, true);
      std::string all;
      for (const TokenId id : ids) all += stream.Add(id);
      EXPECT_EQ(all + stream.Finish(), t->Decode(ids, true)) << "seed " << seed;
    }
  }
}

TEST(TokenizerFiles, ADirectoryWithoutTokenizerHasNone) {
  const auto tokenizer = Tokenizer::FromDirectory(ELASTICMOE_TESTDATA);
  ASSERT_TRUE(tokenizer);
  EXPECT_EQ(*tokenizer, nullptr);
}

TEST(TokenizerFiles, TheChatTemplateIsTheDefaultOfSeveral) {
  EXPECT_EQ(Small({{"chat_template", "{{ x }}"}})->ChatTemplateSource(), "{{ x }}");
  EXPECT_EQ(Small({{"chat_template",
                    {{{"name", "tool_use"}, {"template", "t"}}, {{"name", "default"}, {"template", "d"}}}}})
                ->ChatTemplateSource(),
            "d");
  EXPECT_EQ(Small()->ChatTemplateSource(), "");
  EXPECT_THAT(Demo()->ChatTemplateSource(), HasSubstr("<|im_start|>"));
}

struct BadFile {
  const char* name;
  const char* pointer;  // what is replaced (JSON pointer)
  const char* value;
  ErrorCode code;
  const char* message;
};

class BadTokenizers : public testing::TestWithParam<BadFile> {};

TEST_P(BadTokenizers, AreRefusedWithTheKeyAndWhatWasFound) {
  const BadFile& bad = GetParam();
  Json json = SmallJson();
  json[Json::json_pointer(bad.pointer)] = Json::parse(bad.value);
  const Error error = LoadError(json);
  EXPECT_EQ(error.code, bad.code);
  EXPECT_THAT(error.message, HasSubstr(bad.message));
}

constexpr auto kBad = ErrorCode::kInvalidArgument;
constexpr auto kNot = ErrorCode::kUnimplemented;
INSTANTIATE_TEST_SUITE_P(
    All, BadTokenizers,
    testing::Values(
        BadFile{"ModelType", "/model/type", R"("Unigram")", kNot,
                "model.type=\"Unigram\" is not supported (supported: BPE)"},
        BadFile{"NoModel", "/model", "null", kBad, "model: missing"},
        BadFile{"VocabIsAList", "/model/vocab", R"([["a", -1.5]])", kBad, "model.vocab: a list"},
        BadFile{"VocabIsNull", "/model/vocab", "null", kBad, "model.vocab: missing"},
        BadFile{"IdIsText", "/model/vocab/a", R"("3")", kBad, "model.vocab: a value that is no id"},
        BadFile{"IdIsNegative", "/model/vocab/a", "-3", kBad, "model.vocab: id -3"},
        BadFile{"IdIsHuge", "/model/vocab/a", "18446744073709551615", kBad, "model.vocab: id"},
        BadFile{"IdComesTwice", "/model/vocab/a", "4", kBad, "model.vocab: id 4 belongs to"},
        BadFile{"NoMerges", "/model/merges", "null", kBad, "model.merges: missing"},
        BadFile{"MergeOfUnknown", "/model/merges/0", R"("a q")", kBad, "model.merges: entry 0 needs q"},
        BadFile{"MergeOfThree", "/model/merges/1", R"(["a", "b", "c"])", kBad,
                "model.merges: entry 1 has not two strings"},
        BadFile{"MergeIsNumber", "/model/merges/0", "7", kBad, "model.merges: a value that is no pair"},
        BadFile{"UnknownTokenMissing", "/model/unk_token", R"("<none>")", kBad, "model.unk_token=\"<none>\""},
        BadFile{"Suffix", "/model/end_of_word_suffix", R"("</w>")", kNot,
                "model.end_of_word_suffix=\"</w>\""},
        BadFile{"Dropout", "/model/dropout", "0.1", kNot, "model.dropout=0.1"},
        BadFile{"Normalizer", "/normalizer", R"({"type": "BertNormalizer"})", kNot,
                "normalizer.type=BertNormalizer is not supported (supported: NFC"},
        BadFile{"PreTokenizer", "/pre_tokenizer", R"({"type": "Whitespace"})", kNot,
                "pre_tokenizer.type=Whitespace is not supported (supported: Split"},
        BadFile{"PreTokenizerOrder", "/pre_tokenizer",
                R"({"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}, {"type": "Digits"}]})", kNot,
                "ByteLevel must come last"},
        BadFile{"Pattern", "/pre_tokenizer",
                R"({"type": "Split", "behavior": "Isolated", "pattern": {"Regex": "(a"}})", kBad,
                "pre_tokenizer.pattern: compiling a regex: missing closing parenthesis"},
        BadFile{"PatternOfOtherKind", "/pre_tokenizer",
                R"({"type": "Split", "behavior": "Isolated", "pattern": {"Regex": "[a&&b]"}})", kNot,
                "intersection"},
        BadFile{"Behavior", "/pre_tokenizer",
                R"({"type": "Split", "behavior": "Cut", "pattern": {"String": "a"}})", kBad,
                "pre_tokenizer.behavior=Cut"},
        BadFile{"PostProcessor", "/post_processor", R"({"type": "BertProcessing"})", kNot,
                "post_processor.type=BertProcessing is not supported"},
        BadFile{"TemplateToken", "/post_processor",
                R"({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<x>"}}]})", kBad,
                "no ids for <x>"},
        BadFile{"Decoder", "/decoder", R"({"type": "WordPiece"})", kNot,
                "decoder.type=WordPiece is not supported (supported: ByteLevel"},
        BadFile{"DecoderOrder", "/decoder",
                R"({"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]})", kNot,
                "decoder: ByteFallback after Fuse"},
        BadFile{"AddedTokens", "/added_tokens", "{}", kBad, "added_tokens: no list"},
        BadFile{"AddedTokenWithoutId", "/added_tokens/0", R"({"content": "x"})", kBad,
                "added_tokens: an entry has no id"},
        BadFile{"AddedTokenId", "/added_tokens/0/id", "99999999", kBad, "added_tokens: id 99999999"}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(BadTokenizers, TextThatIsNoJsonIsRefusedWithThePlace) {
  const auto cut = Tokenizer::FromJson(SmallJson().dump().substr(0, 500), "");
  ASSERT_FALSE(cut);
  EXPECT_THAT(cut.error().message, HasSubstr("reading tokenizer.json: byte 501"));
  EXPECT_FALSE(Tokenizer::FromJson("", ""));
  EXPECT_FALSE(Tokenizer::FromJson("[]", ""));
  EXPECT_THAT(LoadError(SmallJson(), "{").message, HasSubstr("reading tokenizer_config.json"));
  std::string deep = SmallJson().dump();
  deep.insert(deep.size() - 1, ",\"x\":" + std::string(100'000, '[') + std::string(100'000, ']'));
  const auto nested = Tokenizer::FromJson(deep, "");
  ASSERT_FALSE(nested);
  EXPECT_THAT(nested.error().message, HasSubstr("nested deeper than 64"));
}

TEST(BadTokenizers, ABosTokenThatDoesNotExistIsRefused) {
  const Error error = LoadError(SmallJson(), R"({"bos_token": "<x>", "add_bos_token": true})");
  EXPECT_THAT(error.message, HasSubstr("add_bos_token=true, but <x> is not in the vocabulary"));
}

TEST(Utf8, RepairReplacesEachMaximalSubpart) {
  EXPECT_EQ(RepairUtf8("plain ü 你 😀"), "plain ü 你 😀");
  EXPECT_EQ(RepairUtf8("\x80\xBF"), "\uFFFD\uFFFD");
  EXPECT_EQ(RepairUtf8("\xF0\x9F\x98"), "\uFFFD");
  EXPECT_EQ(RepairUtf8("\xF0\x9F\x98x"), "\uFFFDx");
  EXPECT_EQ(RepairUtf8("\xC0\xAF\xF5\x80"), "\uFFFD\uFFFD\uFFFD\uFFFD");
  EXPECT_EQ(RepairUtf8("\xE0\x80\x80"), "\uFFFD\uFFFD\uFFFD");
}

TEST(Utf8, AStreamCutAnywhereEqualsTheWhole) {
  const std::string text = "a\xFFü\xE4\xBD你\xF0\x9F\x98😀\xED\xA0\x80\xC3";
  for (std::size_t cut = 0; cut <= text.size(); ++cut) {
    Utf8Stream stream;
    std::string out = stream.Add(text.substr(0, cut));
    out += stream.Add(text.substr(cut));
    EXPECT_EQ(out + stream.Finish(), RepairUtf8(text)) << "cut at " << cut;
  }
  Utf8Stream bytewise;
  std::string out;
  for (const char c : text) out += bytewise.Add(std::string(1, c));
  EXPECT_EQ(out + bytewise.Finish(), RepairUtf8(text));
}

}  // namespace
}  // namespace elasticmoe::model
