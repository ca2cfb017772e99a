#include "model/tokenizer/tokenizer_config.h"

#include <algorithm>
#include <charconv>
#include <unordered_set>
#include <utility>

#include "base/file.h"
#include "model/tokenizer/unicode.h"

namespace elasticmoe::model {
namespace {

constexpr std::size_t kMaxAddedTokenBytes = 4096;  // bounds the search for them; the longest known has 40

// A text, or the "content" of an added token written as an object.
std::string TokenName(const PlainJson& config, const char* key) {
  const PlainJson* at = Member(config, key);
  if (at == nullptr) return "";
  return at->is_string() ? at->get<std::string>() : TextMember(*at, "content");
}

Expected<AddedToken> ReadAddedToken(const PlainJson& json, std::int64_t id) {
  if (id < 0 || id > kMaxTokenId)
    return Fail(ErrorCode::kInvalidArgument, "added_tokens: id {} (limit={})", id, kMaxTokenId);
  const PlainJson* content = Member(json, "content");
  if (content == nullptr || !content->is_string())
    return Fail(ErrorCode::kInvalidArgument, "added_tokens: id {} has no content", id);
  AddedToken token{.id = static_cast<TokenId>(id),
                   .content = content->get<std::string>(),
                   .single_word = FlagMember(json, "single_word"),
                   .lstrip = FlagMember(json, "lstrip"),
                   .rstrip = FlagMember(json, "rstrip"),
                   .normalized = FlagMember(json, "normalized"),
                   .special = FlagMember(json, "special")};
  if (token.content.size() > kMaxAddedTokenBytes)
    return Fail(ErrorCode::kInvalidArgument, "added_tokens: id {} has {} bytes (limit={})", id,
                token.content.size(), kMaxAddedTokenBytes);
  return token;
}

Status ReadAddedTokens(const PlainJson& tokenizer, const PlainJson& config, const Bpe& bpe,
                       TokenizerConfig& out) {
  std::unordered_set<TokenId> known;
  const auto add = [&](const PlainJson& json, std::int64_t id) -> Status {
    if (!json.is_object()) return Fail(ErrorCode::kInvalidArgument, "added_tokens: an entry is no object");
    EM_ASSIGN_OR_RETURN(AddedToken token, ReadAddedToken(json, id));
    if (token.content.empty()) return {};
    // A text that the vocabulary has keeps the id it has there, as in tokenizers.
    token.id = bpe.Find(token.content).value_or(token.id);
    if (known.insert(token.id).second) out.added_tokens.push_back(std::move(token));
    return {};
  };
  if (const PlainJson* list = Member(tokenizer, "added_tokens"); list != nullptr && !list->is_null()) {
    if (!list->is_array()) return Fail(ErrorCode::kInvalidArgument, "added_tokens: no list");
    for (const PlainJson& one : *list) {
      const PlainJson* id = Member(one, "id");
      if (id == nullptr || !id->is_number_integer())
        return Fail(ErrorCode::kInvalidArgument, "added_tokens: an entry has no id");
      EM_RETURN_IF_ERROR(add(one, id->get<std::int64_t>()));
    }
  }
  // tokenizer_config.json may know more of them.
  if (const PlainJson* more = Member(config, "added_tokens_decoder"); more != nullptr && more->is_object()) {
    for (const auto& [key, one] : more->items()) {
      std::int64_t id = -1;
      std::from_chars(key.data(), key.data() + key.size(), id);
      EM_RETURN_IF_ERROR(add(one, id));
    }
  }
  return {};
}

// The ids that the post-processor puts around one text.
Status ReadPostProcessor(const PlainJson& json, int depth, TokenizerConfig& out) {
  if (json.is_null()) return {};
  if (!json.is_object() || depth > 8)
    return Fail(ErrorCode::kInvalidArgument, "post_processor: no object or nested too deep");
  const std::string type = TextMember(json, "type", "(missing)");
  if (type == "ByteLevel") return {};  // changes offsets only
  if (type == "Sequence") {
    const PlainJson* list = Member(json, "processors");
    if (list == nullptr || !list->is_array())
      return Fail(ErrorCode::kInvalidArgument, "post_processor.processors: missing or no list");
    for (const PlainJson& one : *list) EM_RETURN_IF_ERROR(ReadPostProcessor(one, depth + 1, out));
    return {};
  }
  if (type != "TemplateProcessing")
    return Fail(
        ErrorCode::kUnimplemented,
        "post_processor.type={} is not supported (supported: ByteLevel, TemplateProcessing, Sequence)", type);
  const PlainJson* single = Member(json, "single");
  const PlainJson* special = Member(json, "special_tokens");
  if (single == nullptr || !single->is_array())
    return Fail(ErrorCode::kInvalidArgument, "post_processor.single: missing or no list");
  std::vector<TokenId> before, after;
  bool seen = false;
  for (const PlainJson& part : *single) {
    if (Member(part, "Sequence") != nullptr) {
      if (std::exchange(seen, true))
        return Fail(ErrorCode::kUnimplemented, "post_processor.single: the text comes twice");
      continue;
    }
    const PlainJson* token = Member(part, "SpecialToken");
    if (token == nullptr)
      return Fail(ErrorCode::kInvalidArgument, "post_processor.single: neither text nor token");
    const std::string name = TextMember(*token, "id");
    const PlainJson* entry = special != nullptr ? Member(*special, name) : nullptr;
    const PlainJson* ids = entry != nullptr ? Member(*entry, "ids") : nullptr;
    if (ids == nullptr || !ids->is_array())
      return Fail(ErrorCode::kInvalidArgument, "post_processor.special_tokens: no ids for {}", name);
    for (const PlainJson& id : *ids) {
      if (!id.is_number_unsigned() || id.get<std::uint64_t>() > static_cast<std::uint64_t>(kMaxTokenId))
        return Fail(ErrorCode::kInvalidArgument, "post_processor.special_tokens: id {} of {}", id.dump(),
                    name);
      (seen ? after : before).push_back(id.get<TokenId>());
    }
  }
  out.prefix.insert(out.prefix.begin(), before.begin(), before.end());
  out.suffix.insert(out.suffix.end(), after.begin(), after.end());
  return {};
}

// Obeys add_bos_token or add_eos_token (`key`) where the config has it: `ids`, at `at_front` or its back, has
// the token `name` or has it not.
Status ApplyFlag(const PlainJson& config, const char* key, const std::string& name,
                 const TokenizerConfig& parts, const Bpe& bpe, bool at_front, std::vector<TokenId>& ids) {
  const PlainJson* flag = Member(config, key);
  if (flag == nullptr || !flag->is_boolean() || name.empty()) return {};
  auto id = bpe.Find(name);
  for (const AddedToken& token : parts.added_tokens)
    if (token.content == name) id = token.id;
  if (!id) {
    if (!flag->get<bool>()) return {};
    return Fail(ErrorCode::kInvalidArgument,
                "tokenizer_config.json: {}=true, but {} is not in the vocabulary", key, name);
  }
  const bool has = !ids.empty() && (at_front ? ids.front() : ids.back()) == *id;
  if (flag->get<bool>() == has) return {};
  const auto place = at_front ? ids.begin() : ids.end() - (has ? 1 : 0);
  if (has)
    ids.erase(place);
  else
    ids.insert(place, *id);
  return {};
}

std::string ReadChatTemplate(const PlainJson& config) {
  const PlainJson* at = Member(config, "chat_template");
  if (at == nullptr) return "";
  if (at->is_string()) return at->get<std::string>();
  if (!at->is_array()) return "";
  // Several by name: the one called "default", else the first.
  std::string found;
  for (const PlainJson& one : *at) {
    const std::string source = TextMember(one, "template");
    if (TextMember(one, "name") == "default") return source;
    if (found.empty()) found = source;
  }
  return found;
}

}  // namespace

Expected<TokenizerConfig> ReadTokenizerConfig(const PlainJson& tokenizer, const PlainJson& config,
                                              const Bpe& bpe) {
  TokenizerConfig out;
  EM_RETURN_IF_ERROR(ReadAddedTokens(tokenizer, config, bpe, out));
  if (const PlainJson* post = Member(tokenizer, "post_processor"))
    EM_RETURN_IF_ERROR(ReadPostProcessor(*post, 0, out));
  out.bos_token = TokenName(config, "bos_token");
  out.eos_token = TokenName(config, "eos_token");
  out.chat_template = ReadChatTemplate(config);
  EM_RETURN_IF_ERROR(ApplyFlag(config, "add_bos_token", out.bos_token, out, bpe, true, out.prefix));
  EM_RETURN_IF_ERROR(ApplyFlag(config, "add_eos_token", out.eos_token, out, bpe, false, out.suffix));
  return out;
}

Expected<PlainJson> ReadTokenizerConfigFiles(const std::filesystem::path& directory) {
  std::error_code code;
  std::string text;
  if (std::filesystem::exists(directory / "tokenizer_config.json", code)) {
    EM_ASSIGN_OR_RETURN(text, ReadFile(directory / "tokenizer_config.json"));
  }
  EM_ASSIGN_OR_RETURN(PlainJson config, ReadPlainJson(text, "tokenizer_config.json"));
  if (std::filesystem::exists(directory / "chat_template.jinja", code)) {
    EM_ASSIGN_OR_RETURN(const std::string source, ReadFile(directory / "chat_template.jinja"));
    config["chat_template"] = RepairUtf8(source);
  }
  return config;
}

}  // namespace elasticmoe::model
