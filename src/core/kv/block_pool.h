// KV blocks of one domain: free, referenced by sequences, or cached (full blocks of finished or running
// prefixes that another request may share). Pure.
//
// A cached block is named by the hash of all tokens up to its end, and checked against its own tokens and its
// predecessor's identity, so that a collision of hashes cannot give a sequence somebody else's past.
//
// Invariants (CheckIntegrity): a block is free, or referenced, or cached-unreferenced (evictable), never two
// of them; each cached block is found under its key.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <vector>

#include "base/ids.h"

namespace elasticmoe::core {

class BlockPool {
 public:
  explicit BlockPool(int block_tokens) : block_tokens_(block_tokens) {}

  std::uint32_t Size() const { return static_cast<std::uint32_t>(blocks_.size()); }
  // Blocks that Allocate could give: free ones and cached ones that nobody references.
  std::uint32_t Available() const { return static_cast<std::uint32_t>(free_.size() + evictable_.size()); }
  std::uint32_t Referenced() const { return Size() - Available(); }

  // Adds ids at the top, or takes them from the top. Shrinking: REQUIRES no block at or above `size` is
  // referenced.
  void Resize(std::uint32_t size);
  bool ReferencedAtOrAbove(std::uint32_t size) const;

  // The lowest free block, else the least recently used cached one (which is forgotten). One reference.
  std::optional<BlockId> Allocate();
  void AddReference(BlockId block);
  void Release(BlockId block);  // a cached block stays findable until it is needed for something else

  // Walks cached blocks that hold a prefix of `tokens`, whole blocks only, each with one reference taken.
  std::vector<BlockId> TakePrefix(std::span<const TokenId> tokens);

  // Makes a full block findable: it holds `tokens` and follows `previous` (nullopt: it is a first block).
  // Where an equal block is cached already, nothing happens.
  void Publish(BlockId block, std::optional<BlockId> previous, std::span<const TokenId> tokens);

  void ForgetCache();
  void CheckIntegrity() const;

 private:
  // Identity of a cached content: `generation` changes whenever a block's content is given up.
  struct Key {
    std::uint64_t previous;  // serial of the block before, 0 for none
    std::vector<TokenId> tokens;
    auto operator<=>(const Key&) const = default;
  };
  struct Block {
    int references = 0;
    std::uint64_t serial = 0;    // of the cached content, 0 = not cached
    std::uint64_t last_use = 0;  // when it was released, for eviction
  };
  void Forget(BlockId block);

  int block_tokens_;
  std::vector<Block> blocks_;
  std::set<std::int32_t> free_;
  std::set<std::pair<std::uint64_t, std::int32_t>> evictable_;  // (last_use, block)
  std::map<Key, std::int32_t> cached_;
  std::map<std::int32_t, std::map<Key, std::int32_t>::iterator> key_of_;
  std::uint64_t next_serial_ = 1;
  std::uint64_t clock_ = 1;
};

}  // namespace elasticmoe::core
