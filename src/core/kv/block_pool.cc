#include "core/kv/block_pool.h"

#include "base/check.h"

namespace elasticmoe::core {

void BlockPool::Resize(std::uint32_t size) {
  EM_CHECK(!ReferencedAtOrAbove(size));
  limit_ = UINT32_MAX;
  free_.insert(withheld_.begin(), withheld_.end());
  withheld_.clear();
  for (std::uint32_t id = Size(); id < size; ++id) {
    blocks_.emplace_back();
    free_.insert(static_cast<std::int32_t>(id));
  }
  for (std::uint32_t id = size; id < Size(); ++id) {
    Forget(BlockId(static_cast<std::int32_t>(id)));
    free_.erase(static_cast<std::int32_t>(id));
  }
  blocks_.resize(size);
}

void BlockPool::Limit(std::uint32_t limit) {
  free_.insert(withheld_.begin(), withheld_.end());
  withheld_.clear();
  limit_ = limit;
  for (std::uint32_t id = limit; id < Size(); ++id) {
    const auto block = static_cast<std::int32_t>(id);
    Forget(BlockId(block));
    if (free_.erase(block) > 0) withheld_.insert(block);
  }
}

bool BlockPool::ReferencedAtOrAbove(std::uint32_t size) const {
  for (std::uint32_t id = size; id < Size(); ++id)
    if (blocks_[id].references > 0) return true;
  return false;
}

// Ends the cached content of a block; an unreferenced block becomes free.
void BlockPool::Forget(BlockId block) {
  Block& entry = blocks_[block.value];
  if (entry.content == 0) return;
  const auto key = key_of_.find(block.value);
  cached_.erase(key->second);
  key_of_.erase(key);
  entry.content = 0;
  if (entry.references == 0) {
    evictable_.erase({entry.last_use, block.value});
    free_.insert(block.value);
  }
}

std::optional<BlockId> BlockPool::Allocate() {
  if (free_.empty() && !evictable_.empty()) Forget(BlockId(evictable_.begin()->second));
  if (free_.empty()) return std::nullopt;
  const BlockId block(*free_.begin());
  free_.erase(free_.begin());
  blocks_[block.value].references = 1;
  return block;
}

void BlockPool::AddReference(BlockId block) {
  Block& entry = blocks_[block.value];
  if (entry.references++ == 0) {
    EM_CHECK(entry.content != 0);
    evictable_.erase({entry.last_use, block.value});
  }
}

void BlockPool::Release(BlockId block) {
  Block& entry = blocks_[block.value];
  EM_CHECK(entry.references > 0, "block={}", block);
  if (--entry.references > 0) return;
  if (!BelowLimit(block.value)) {
    EM_CHECK(entry.content == 0);
    withheld_.insert(block.value);
  } else if (entry.content == 0) {
    free_.insert(block.value);
  } else {
    entry.last_use = clock_++;
    evictable_.insert({entry.last_use, block.value});
  }
}

BlockPool::Prefix BlockPool::TakePrefix(std::span<const TokenId> tokens) {
  Prefix prefix;
  Key key{0, {}};
  for (std::size_t begin = 0; begin + block_tokens_ <= tokens.size(); begin += block_tokens_) {
    key.tokens.assign(tokens.begin() + begin, tokens.begin() + begin + block_tokens_);
    const auto at = cached_.find(key);
    if (at == cached_.end()) break;
    AddReference(BlockId(at->second));
    prefix.blocks.push_back(BlockId(at->second));
    prefix.content = key.previous = blocks_[at->second].content;
  }
  return prefix;
}

ContentId BlockPool::Publish(BlockId block, ContentId previous, std::span<const TokenId> tokens) {
  Block& entry = blocks_[block.value];
  EM_CHECK(static_cast<int>(tokens.size()) == block_tokens_ && entry.references > 0);
  if (entry.content != 0) return entry.content;
  if (!BelowLimit(block.value)) return next_content_++;  // nobody may find it: it goes
  const auto [at, inserted] = cached_.try_emplace(Key{previous, {tokens.begin(), tokens.end()}}, block.value);
  if (!inserted) return blocks_[at->second].content;
  key_of_.emplace(block.value, at);
  return entry.content = next_content_++;
}

void BlockPool::ForgetCache() {
  for (std::uint32_t id = 0; id < Size(); ++id) Forget(BlockId(static_cast<std::int32_t>(id)));
}

void BlockPool::CheckIntegrity() const {
  for (std::uint32_t id = 0; id < Size(); ++id) {
    const Block& block = blocks_[id];
    const auto value = static_cast<std::int32_t>(id);
    const bool is_free = free_.count(value) > 0;
    const bool is_evictable = block.content != 0 && evictable_.count({block.last_use, value}) > 0;
    const bool is_withheld = withheld_.count(value) > 0;
    EM_CHECK(int(is_free) + int(is_evictable) + int(is_withheld) + int(block.references > 0) == 1,
             "block={} references={}", id, block.references);
    EM_CHECK(BelowLimit(value) ? !is_withheld : !is_free && !is_evictable && block.content == 0, "block={}",
             id);
    EM_CHECK((block.content != 0) == (key_of_.count(value) > 0));
    if (block.content != 0) EM_CHECK(key_of_.at(value)->second == value);
  }
  EM_CHECK(cached_.size() == key_of_.size() && free_.size() + evictable_.size() == Available());
}

}  // namespace elasticmoe::core
