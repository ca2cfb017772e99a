// tokenizer.json as data: the vocabulary and the merges in flat arrays (there are hundreds of thousands of
// them), all the rest as a JSON value. Read by events, without a tree for the large parts. Pure.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/ids.h"

namespace elasticmoe::model {

using PlainJson = nlohmann::json;  // sorted keys: lookups do not slow down with their number

// Ids index tables. The largest vocabularies have 262,144 entries; the factor 16 is room to grow.
inline constexpr std::int64_t kMaxTokenId = (1 << 22) - 1;

struct TokenizerJson {
  PlainJson rest;  // without model.vocab and model.merges
  bool has_vocab = false;
  bool has_merges = false;
  std::vector<std::pair<std::string, TokenId>> vocab;
  std::vector<std::pair<std::string, std::string>> merges;  // by rank
  std::string malformed;  // what is wrong with vocab or merges, "" if nothing; matters only for BPE
};

// kInvalidArgument where `text` is not JSON or no object.
Expected<TokenizerJson> ReadTokenizerJson(std::string_view text);

// Any JSON object, e.g. tokenizer_config.json; an empty object for "".
Expected<PlainJson> ReadPlainJson(std::string_view text, std::string_view name);

// The value of `key`; nullptr where `json` is no object or has no such key.
const PlainJson* Member(const PlainJson& json, const std::string& key);
// The same if it has the right type, else `otherwise`.
std::string TextMember(const PlainJson& json, const std::string& key, std::string otherwise = "");
bool FlagMember(const PlainJson& json, const std::string& key, bool otherwise = false);

}  // namespace elasticmoe::model
