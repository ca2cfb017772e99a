#include "model/gguf/tokenizer.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <unordered_map>
#include <utility>

#include "model/config_reader.h"
#include "model/tokenizer/unicode.h"

namespace elasticmoe::model {
namespace {

// tokenizer.ggml.token_type
enum TokenType : std::int64_t {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUserDefined = 4,
  kUnused = 5,
  kByte = 6
};

// How a byte-level tokenizer splits a text, by its name in GGUF. The patterns are those of the published
// tokenizer.json files.
struct PreRow {
  std::string_view name;
  std::array<std::string_view, 3> patterns;  // one after another; none: GPT-2's own
  bool nfc;
  bool ignore_merges;
};

constexpr std::string_view kQwen2 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kLlama3 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kO200k =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kDeepseekWords =
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| "
    "?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

constexpr std::string_view kBailing =
    R"('(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+)";

constexpr std::array<PreRow, 15> kPre = {
    {{"qwen2", {kQwen2}, true, false},
     {"deepseek-r1-qwen", {kQwen2}, false, false},
     {"llama-bpe", {kLlama3}, false, true},
     {"llama3", {kLlama3}, false, true},
     {"llama-v3", {kLlama3}, false, true},
     {"glm4", {kLlama3}, false, false},
     {"chatglm-bpe", {kLlama3}, false, false},
     {"bailingmoe", {kBailing}, false, false},
     {"bailingmoe2", {kBailing}, false, false},
     {"gpt-4o", {kO200k}, false, true},
     {"deepseek-v3", {R"(\p{N}{1,3})", "[一-龥぀-ゟ゠-ヿ]+", kDeepseekWords}, false, false},
     {"gpt-2", {}, false, false},
     {"olmo", {}, false, false},
     {"mpt", {}, false, false},
     {"phi-2", {}, false, false}}};

PlainJson ByteLevel(bool use_regex) {
  return {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", false}, {"use_regex", use_regex}};
}

PlainJson PreTokenizerJson(const PreRow& row) {
  PlainJson steps = PlainJson::array();
  for (const std::string_view pattern : row.patterns)
    if (!pattern.empty())
      steps.push_back({{"type", "Split"},
                       {"pattern", {{"Regex", pattern}}},
                       {"behavior", "Isolated"},
                       {"invert", false}});
  steps.push_back(ByteLevel(row.patterns[0].empty()));
  return {{"type", "Sequence"}, {"pretokenizers", std::move(steps)}};
}

struct Vocabulary {
  std::span<const std::string> tokens;
  std::vector<std::int64_t> types;  // one a token
};

Expected<Vocabulary> ReadVocabulary(const Gguf& gguf) {
  Vocabulary out;
  EM_ASSIGN_OR_RETURN(out.tokens, gguf.Texts("tokenizer.ggml.tokens"));
  if (out.tokens.size() > static_cast<std::size_t>(kMaxTokenId))
    return Fail(ErrorCode::kInvalidArgument, "tokenizer.ggml.tokens has {} entries (limit={})",
                out.tokens.size(), kMaxTokenId);
  const auto* types = gguf.Get<std::vector<std::int64_t>>("tokenizer.ggml.token_type");
  out.types = types != nullptr ? *types : std::vector<std::int64_t>(out.tokens.size(), kNormal);
  if (out.types.size() != out.tokens.size())
    return Fail(ErrorCode::kInvalidArgument,
                "tokenizer.ggml.token_type has {} entries (expected {}, one a token)", out.types.size(),
                out.tokens.size());
  return out;
}

// Added tokens of the vocabulary, and all others by id.
void AddTokens(const Vocabulary& vocabulary, bool all_in_model, TokenizerJson& out) {
  PlainJson added = PlainJson::array();
  for (std::size_t i = 0; i < vocabulary.tokens.size(); ++i) {
    const std::int64_t type = vocabulary.types[i];
    const bool special = type == kControl || type == kUnknown;
    if (special || type == kUserDefined)
      added.push_back({{"id", i},
                       {"content", RepairUtf8(vocabulary.tokens[i])},
                       {"single_word", false},
                       {"lstrip", false},
                       {"rstrip", false},
                       {"normalized", false},
                       {"special", special}});
    if (type == kUnused || (added.size() > 0 && added.back()["id"] == i && !all_in_model)) continue;
    out.vocab.emplace_back(vocabulary.tokens[i], static_cast<TokenId>(i));
  }
  out.rest["added_tokens"] = std::move(added);
  out.has_vocab = out.has_merges = true;
}

Status ReadByteLevel(const Gguf& gguf, const Vocabulary& vocabulary, TokenizerJson& out) {
  EM_ASSIGN_OR_RETURN(const std::string pre, gguf.Text("tokenizer.ggml.pre"));
  const auto row = std::ranges::find(kPre, pre, &PreRow::name);
  if (row == kPre.end()) {
    std::vector<std::string_view> names;
    for (const PreRow& known : kPre) names.push_back(known.name);
    return Fail(ErrorCode::kUnimplemented, "tokenizer.ggml.pre={} (supported: {})", Shown(pre),
                fmt::join(names, ", "));
  }
  AddTokens(vocabulary, false, out);
  EM_ASSIGN_OR_RETURN(const auto merges, gguf.Texts("tokenizer.ggml.merges"));
  out.merges.reserve(merges.size());
  for (const std::string& merge : merges) {
    const auto space = merge.find(' ', 1);  // a token itself may be a space in older files
    if (space == merge.npos)
      return Fail(ErrorCode::kInvalidArgument, "tokenizer.ggml.merges: entry {} is no pair",
                  out.merges.size());
    out.merges.emplace_back(merge.substr(0, space), merge.substr(space + 1));
  }
  out.rest["model"] = {{"type", "BPE"}, {"ignore_merges", row->ignore_merges}};
  out.rest["normalizer"] = row->nfc ? PlainJson{{"type", "NFC"}} : PlainJson(nullptr);
  out.rest["pre_tokenizer"] = PreTokenizerJson(*row);
  out.rest["decoder"] = ByteLevel(true);
  return {};
}

// Sentencepiece joins the pair whose result scores highest. As ranked merges: every way to put a token
// together from two others, by falling score.
void MergesByScore(const Vocabulary& vocabulary, const std::vector<double>& scores, TokenizerJson& out) {
  std::unordered_map<std::string_view, std::size_t> ids;
  for (std::size_t i = 0; i < vocabulary.tokens.size(); ++i)
    if (vocabulary.types[i] == kNormal) ids.emplace(vocabulary.tokens[i], i);
  std::vector<std::size_t> order(vocabulary.tokens.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(order, [&](std::size_t a, std::size_t b) { return scores[a] > scores[b]; });
  for (const std::size_t id : order) {
    if (vocabulary.types[id] != kNormal) continue;
    const std::string& token = vocabulary.tokens[id];
    std::vector<std::array<std::size_t, 3>> ways;  // ids of both sides, where it is cut
    for (std::size_t cut = 1; cut < token.size(); ++cut) {
      const auto left = ids.find(std::string_view(token).substr(0, cut));
      const auto right = ids.find(std::string_view(token).substr(cut));
      if (left != ids.end() && right != ids.end()) ways.push_back({left->second, right->second, cut});
    }
    std::ranges::sort(ways);
    for (const auto& [left, right, cut] : ways)
      out.merges.emplace_back(token.substr(0, cut), token.substr(cut));
  }
}

Status ReadSentencePiece(const Gguf& gguf, const Vocabulary& vocabulary, TokenizerJson& out) {
  const auto* scores = gguf.Get<std::vector<double>>("tokenizer.ggml.scores");
  if (scores == nullptr || scores->size() != vocabulary.tokens.size() ||
      std::ranges::any_of(*scores, [](double score) { return !(score == score); }))
    return Fail(ErrorCode::kInvalidArgument, "tokenizer.ggml.scores: missing or not one number a token");
  AddTokens(vocabulary, true, out);
  MergesByScore(vocabulary, *scores, out);
  out.rest["model"] = {{"type", "BPE"}, {"byte_fallback", true}, {"fuse_unk", true}};
  for (std::size_t i = 0; i < vocabulary.types.size(); ++i)
    if (vocabulary.types[i] == kUnknown) out.rest["model"]["unk_token"] = RepairUtf8(vocabulary.tokens[i]);
  const auto* prefix = gguf.Get<bool>("tokenizer.ggml.add_space_prefix");
  const bool prepend = prefix == nullptr || *prefix;
  PlainJson normalizers = PlainJson::array();
  if (prepend) normalizers.push_back({{"type", "Prepend"}, {"prepend", "▁"}});
  normalizers.push_back({{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "▁"}});
  out.rest["normalizer"] = {{"type", "Sequence"}, {"normalizers", std::move(normalizers)}};
  PlainJson decoders = {{{"type", "Replace"}, {"pattern", {{"String", "▁"}}}, {"content", " "}},
                        {{"type", "ByteFallback"}},
                        {{"type", "Fuse"}}};
  if (prepend) decoders.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1U}, {"stop", 0U}});
  out.rest["decoder"] = {{"type", "Sequence"}, {"decoders", std::move(decoders)}};
  return {};
}

Status ReadNames(const Gguf& gguf, const Vocabulary& vocabulary, bool bos_by_default, PlainJson& config) {
  for (const auto& [name, key] : {std::pair("bos_token", "tokenizer.ggml.bos_token_id"),
                                  std::pair("eos_token", "tokenizer.ggml.eos_token_id")}) {
    const auto* id = gguf.Get<std::int64_t>(key);
    if (id == nullptr) continue;
    if (*id < 0 || static_cast<std::size_t>(*id) >= vocabulary.tokens.size())
      return Fail(ErrorCode::kInvalidArgument, "{}={} (expected less than {})", key, *id,
                  vocabulary.tokens.size());
    config[name] = RepairUtf8(vocabulary.tokens[static_cast<std::size_t>(*id)]);
  }
  const auto flag = [&](const char* name, const char* key, bool otherwise) {
    const auto* value = gguf.Get<bool>(key);
    config[name] = value != nullptr ? *value : otherwise;
  };
  flag("add_bos_token", "tokenizer.ggml.add_bos_token", bos_by_default);
  flag("add_eos_token", "tokenizer.ggml.add_eos_token", false);
  if (const auto* source = gguf.Get<std::string>("tokenizer.chat_template"))
    config["chat_template"] = RepairUtf8(*source);
  return {};
}

// A pattern with its line ends escaped: some files have them as bytes.
std::string Escaped(std::string_view pattern) {
  std::string out;
  for (const char c : pattern) {
    if (c == '\n')
      out += "\\n";
    else if (c == '\r')
      out += "\\r";
    else
      out += c;
  }
  return out;
}

bool IsSentencePiece(const PlainJson& rest) {
  const PlainJson* model = Member(rest, "model");
  return model != nullptr && FlagMember(*model, "byte_fallback");
}

// What is written beside the tokens of a sentencepiece vocabulary. tokenizer.json has no scores: a token's is
// made of the rank of its first merge. kUnimplemented where merges made of these scores would not be the same
// ones.
Status AddScores(const TokenizerJson& json, const std::vector<std::string>& tokens,
                 std::vector<std::int32_t>& types, GgufWriter& writer) {
  const PlainJson* normalizer = Member(json.rest, "normalizer");
  const std::string text = normalizer != nullptr ? normalizer->dump() : "";
  const bool prefix = text.find("\"Prepend\"") != text.npos;
  if (text.find("\"Replace\"") == text.npos || text.find("▁") == text.npos)
    return Fail(ErrorCode::kUnimplemented,
                "tokenizer.json: normalizer={} of byte_fallback has no name in GGUF", Shown(text));
  const std::string unknown = TextMember(json.rest["model"], "unk_token");
  std::unordered_map<std::string, std::size_t> rank;  // of a token's first merge
  for (std::size_t i = 0; i < json.merges.size(); ++i)
    rank.emplace(json.merges[i].first + json.merges[i].second, i);
  Vocabulary vocabulary{tokens, {}};
  std::vector<float> scores(tokens.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const std::string& token = tokens[i];
    if (token.size() == 6 && token.starts_with("<0x") && token.ends_with(">")) types[i] = kByte;
    if (!unknown.empty() && token == unknown) types[i] = kUnknown;
    vocabulary.types.push_back(types[i]);
    const auto at = rank.find(token);
    scores[i] = -static_cast<float>(at != rank.end() ? at->second : json.merges.size() + i);
  }
  TokenizerJson made;
  MergesByScore(vocabulary, {scores.begin(), scores.end()}, made);
  if (made.merges != json.merges)
    return Fail(ErrorCode::kUnimplemented,
                "tokenizer.json: its merges are not those of a sentencepiece vocabulary; they cannot be "
                "written as GGUF");
  writer.Add("tokenizer.ggml.scores", std::move(scores));
  writer.Add("tokenizer.ggml.add_space_prefix", prefix);
  return {};
}

// The name of a tokenizer.json's pre-tokenizer.
Expected<std::string> PreName(const PlainJson& rest) {
  const PlainJson* pre = Member(rest, "pre_tokenizer");
  const PlainJson* normalizer = Member(rest, "normalizer");
  const bool nfc = normalizer != nullptr && TextMember(*normalizer, "type") == "NFC";
  std::vector<std::string> patterns;
  const PlainJson* list = pre != nullptr ? Member(*pre, "pretokenizers") : nullptr;
  bool byte_level = pre != nullptr && TextMember(*pre, "type") == "ByteLevel";
  if (list != nullptr && list->is_array()) {
    for (const PlainJson& step : *list) {
      byte_level = byte_level || TextMember(step, "type") == "ByteLevel";
      if (const PlainJson* pattern = Member(step, "pattern"))
        patterns.push_back(Escaped(TextMember(*pattern, "Regex")));
    }
  }
  patterns.resize(std::max<std::size_t>(patterns.size(), 3));
  for (const PreRow& row : kPre)
    if (byte_level && row.nfc == nfc && std::ranges::equal(patterns, row.patterns))
      return std::string(row.name);
  return Fail(ErrorCode::kUnimplemented,
              "tokenizer.json: pre_tokenizer={} with normalizer={} has no name in GGUF that is known here",
              pre != nullptr ? Shown(pre->dump()) : "null",
              normalizer != nullptr ? Shown(normalizer->dump()) : "null");
}

}  // namespace

Expected<std::optional<GgufTokenizer>> ReadGgufTokenizer(const Gguf& gguf) {
  if (!gguf.Has("tokenizer.ggml.tokens")) return std::nullopt;
  EM_ASSIGN_OR_RETURN(const std::string model, gguf.Text("tokenizer.ggml.model"));
  EM_ASSIGN_OR_RETURN(const Vocabulary vocabulary, ReadVocabulary(gguf));
  GgufTokenizer out;
  out.json.rest = PlainJson::object();
  out.config = PlainJson::object();
  const bool sentence_piece = model == "llama";
  if (!sentence_piece && model != "gpt2")
    return Fail(ErrorCode::kUnimplemented, "tokenizer.ggml.model={} (supported: \"gpt2\", \"llama\")",
                Shown(model));
  EM_RETURN_IF_ERROR(sentence_piece ? ReadSentencePiece(gguf, vocabulary, out.json)
                                    : ReadByteLevel(gguf, vocabulary, out.json));
  EM_RETURN_IF_ERROR(ReadNames(gguf, vocabulary, sentence_piece, out.config));
  return out;
}

Status WriteGgufTokenizer(TokenizerJson json, const PlainJson& config, int vocab, GgufWriter& writer) {
  const bool sentence_piece = IsSentencePiece(json.rest);
  std::string pre = "default";
  if (!sentence_piece) {
    EM_ASSIGN_OR_RETURN(pre, PreName(json.rest));
  }
  if (!json.malformed.empty() || !json.has_vocab || !json.has_merges)
    return Fail(ErrorCode::kInvalidArgument, "tokenizer.json: model: no vocabulary with merges");
  std::vector<std::string> tokens(static_cast<std::size_t>(vocab));
  std::vector<std::int32_t> types(tokens.size(), kUnused);
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = fmt::format("[PAD{}]", i);
  std::unordered_map<std::string, TokenId> ids;
  const auto put = [&](std::int64_t id, const std::string& token, TokenType type) -> Status {
    if (id < 0 || id >= vocab)
      return Fail(ErrorCode::kInvalidArgument, "tokenizer.json: id {} of {} (the model has {} tokens)", id,
                  Shown(token), vocab);
    tokens[static_cast<std::size_t>(id)] = token;
    types[static_cast<std::size_t>(id)] = static_cast<std::int32_t>(type);
    ids[token] = static_cast<TokenId>(id);
    return {};
  };
  for (const auto& [token, id] : json.vocab) EM_RETURN_IF_ERROR(put(id, token, kNormal));
  if (const PlainJson* added = Member(json.rest, "added_tokens"); added != nullptr && added->is_array())
    for (const PlainJson& token : *added) {
      const PlainJson* id = Member(token, "id");
      if (id == nullptr || !id->is_number_integer()) continue;
      EM_RETURN_IF_ERROR(put(id->get<std::int64_t>(), TextMember(token, "content"),
                             FlagMember(token, "special") ? kControl : kUserDefined));
    }
  if (sentence_piece) EM_RETURN_IF_ERROR(AddScores(json, tokens, types, writer));
  std::vector<std::string> merges;
  merges.reserve(json.merges.size());
  for (const auto& [left, right] : json.merges) merges.push_back(left + " " + right);
  writer.Add("tokenizer.ggml.model", std::string(sentence_piece ? "llama" : "gpt2"));
  writer.Add("tokenizer.ggml.pre", std::move(pre));
  writer.Add("tokenizer.ggml.tokens", std::move(tokens));
  writer.Add("tokenizer.ggml.token_type", std::move(types));
  if (!sentence_piece) writer.Add("tokenizer.ggml.merges", std::move(merges));
  const auto name = [&](const char* key) {
    const PlainJson* at = Member(config, key);
    return at == nullptr ? "" : at->is_string() ? at->get<std::string>() : TextMember(*at, "content");
  };
  for (const auto& [key, written] : {std::pair("bos_token", "tokenizer.ggml.bos_token_id"),
                                     std::pair("eos_token", "tokenizer.ggml.eos_token_id"),
                                     std::pair("pad_token", "tokenizer.ggml.padding_token_id")})
    if (const auto at = ids.find(name(key)); at != ids.end())
      writer.Add(written, static_cast<std::uint32_t>(at->second));
  const PlainJson* after = Member(json.rest, "post_processor");
  const bool has_template = after != nullptr && TextMember(*after, "type") == "TemplateProcessing";
  writer.Add("tokenizer.ggml.add_bos_token", Member(config, "add_bos_token") == nullptr && sentence_piece
                                                 ? has_template
                                                 : FlagMember(config, "add_bos_token"));
  if (const std::string source = TextMember(config, "chat_template"); !source.empty())
    writer.Add("tokenizer.chat_template", source);
  return {};
}

}  // namespace elasticmoe::model
