// Byte-pair encoding of one piece of text by ranked merges, as the BPE model of Hugging Face's tokenizers
// does it: over the byte alphabet, or over characters with single bytes as fallback. Immutable after
// building.
//
// Invariants: every id is below Size(); every merge's two sides and its result are in the vocabulary.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/error.h"
#include "base/ids.h"
#include "model/tokenizer/tokenizer_json.h"

namespace elasticmoe::model {

class Bpe {
 public:
  Bpe(Bpe&&) = default;
  Bpe& operator=(Bpe&&) = default;

  // Takes the vocabulary and merges of `json`; its rest.model holds the options. `byte_level`: pieces are
  // bytes, and the vocabulary is written in the byte alphabet. kInvalidArgument or kUnimplemented name the
  // key.
  static Expected<Bpe> FromJson(TokenizerJson& json, bool byte_level);

  // Memory that calls of one thread share.
  struct Scratch {
    struct Symbol {
      TokenId id;
      std::int32_t before, after;  // neighbours, -1 = none; after == kGone: merged away
    };
    struct Candidate {
      std::uint32_t rank;
      std::int32_t at;  // index of the left symbol
      TokenId result;
    };
    std::vector<TokenId> characters;  // of the whole piece
    std::vector<TokenId> ids;         // of the part that is merged
    std::vector<std::uint32_t> ranks;
    std::vector<TokenId> results;
    std::vector<Symbol> symbols;
    std::vector<Candidate> heap;
  };

  // Appends the ids of `piece` to `out`. Cost: n log n in its bytes.
  // REQUIRES: `piece` is UTF-8, unless byte_level.
  void Encode(std::string_view piece, Scratch& scratch, std::vector<TokenId>& out) const;

  std::optional<TokenId> Find(std::string_view token) const;
  std::string_view Token(TokenId id) const;  // "" for an id without entry
  bool Has(TokenId id) const;
  TokenId Size() const { return static_cast<TokenId>(tokens_.size()); }  // highest id + 1

 private:
  Bpe() = default;
  struct Merge {
    std::uint64_t pair = kNoPair;
    std::uint32_t rank = 0;
    TokenId result = 0;
  };
  static constexpr std::uint64_t kNoPair = ~std::uint64_t{0};
  static constexpr std::uint32_t kNoRank = ~std::uint32_t{0};

  Status AddMerges(std::vector<std::pair<std::string, std::string>> merges);
  Status ReadOptions(const PlainJson& model);
  const Merge* FindMerge(TokenId left, TokenId right) const;
  std::size_t SlotOf(std::uint64_t pair) const;

  void AddJoint(TokenId left, TokenId right);
  bool MayJoin(TokenId left, TokenId right) const;

  void Split(std::string_view piece, std::vector<TokenId>& ids) const;
  void MergeShort(Scratch& scratch) const;  // by scanning: quick for words, n² in general
  void MergeLong(Scratch& scratch) const;   // by a heap

  std::vector<std::string> tokens_;
  std::vector<bool> has_;
  std::unordered_map<std::string_view, TokenId> ids_;  // keys point into tokens_
  std::unordered_map<std::string, TokenId> pieces_;    // whole pieces that need no merging (ignore_merges)
  std::vector<Merge> merges_;                          // open addressing, a power of two, at most half full
  int merges_shift_ = 64;
  // Which symbols stand side by side inside of any merge, by hash: no bit, no merge over that place. So a
  // text without pre-tokenizer falls into parts of the size of words. Empty (all may) where pieces are short
  // anyway.
  std::vector<bool> joints_;

  bool byte_level_ = false;
  bool ignore_merges_ = false;
  bool fuse_unknown_ = false;
  std::optional<TokenId> unknown_;
  std::array<TokenId, 256> byte_ids_{};  // of the characters of the byte alphabet, or < 128 of ASCII
  std::optional<std::array<TokenId, 256>> fallback_;  // <0x00> ... <0xFF>, -1 = not there
};

}  // namespace elasticmoe::model
