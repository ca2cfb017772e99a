// KV blocks of one domain: free, referenced by sequences, or cached (full blocks of finished or running
// prefixes that another request may share). Pure.
//
// A cached content is named by its own tokens and the identity of the content before it, compared exactly: no
// collision of hashes can give a sequence somebody else's past.
//
// Invariants (CheckIntegrity): a block is free, or referenced, or cached-unreferenced (evictable), or
// withheld, never two of them; each cached block is found under its key; what is given out lies below the
// limit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <vector>

#include "base/ids.h"

namespace elasticmoe::core {

// Identity of the tokens up to a block's end, never given twice; 0 = nothing.
using ContentId = std::uint64_t;

class BlockPool {
 public:
  explicit BlockPool(int block_tokens) : block_tokens_(block_tokens) {}

  std::uint32_t Size() const { return static_cast<std::uint32_t>(blocks_.size()); }
  // Blocks that Allocate could give: free ones and cached ones that nobody references.
  std::uint32_t Available() const { return static_cast<std::uint32_t>(free_.size() + evictable_.size()); }
  std::uint32_t Referenced() const {
    return Size() - Available() - static_cast<std::uint32_t>(withheld_.size());
  }

  // Adds ids at the top, or takes them from the top; no limit is left. Shrinking: REQUIRES no block at or
  // above `size` is referenced.
  void Resize(std::uint32_t size);
  // No block at or above `limit` is given out from now on, so that they come free: before a Resize to it.
  void Limit(std::uint32_t limit);
  std::uint32_t Usable() const { return std::min(limit_, Size()); }
  bool ReferencedAtOrAbove(std::uint32_t size) const;

  // The lowest free block, else the least recently used cached one (which is forgotten). One reference.
  std::optional<BlockId> Allocate();
  void AddReference(BlockId block);
  void Release(BlockId block);  // a cached block stays findable until it is needed for something else

  // Walks cached blocks that hold a prefix of `tokens`, whole blocks only, each with one reference taken.
  struct Prefix {
    std::vector<BlockId> blocks;
    ContentId content = 0;  // of the last one
  };
  Prefix TakePrefix(std::span<const TokenId> tokens);

  // Makes a full block findable: it holds `tokens` and follows `previous` (0: it is a first block). Where an
  // equal content is cached already, that one stays. The content's identity, for what follows it. REQUIRES:
  // the block is referenced, tokens.size() is the block size.
  ContentId Publish(BlockId block, ContentId previous, std::span<const TokenId> tokens);

  void ForgetCache();
  int References(BlockId block) const { return blocks_[block.value].references; }
  void CheckIntegrity() const;

 private:
  struct Key {
    ContentId previous;
    std::vector<TokenId> tokens;
    auto operator<=>(const Key&) const = default;
  };
  struct Block {
    int references = 0;
    ContentId content = 0;       // 0 = not cached
    std::uint64_t last_use = 0;  // when it was released, for eviction
  };
  void Forget(BlockId block);
  bool BelowLimit(std::int32_t block) const { return static_cast<std::uint32_t>(block) < limit_; }

  int block_tokens_;
  std::vector<Block> blocks_;
  std::set<std::int32_t> free_;
  std::set<std::int32_t> withheld_;  // unreferenced, at or above the limit
  std::uint32_t limit_ = UINT32_MAX;
  std::set<std::pair<std::uint64_t, std::int32_t>> evictable_;  // (last_use, block)
  std::map<Key, std::int32_t> cached_;
  std::map<std::int32_t, std::map<Key, std::int32_t>::iterator> key_of_;
  ContentId next_content_ = 1;
  std::uint64_t clock_ = 1;
};

}  // namespace elasticmoe::core
