#include "core/kv/block_pool.h"

#include <gtest/gtest.h>

#include "base/rng.h"

namespace elasticmoe::core {
namespace {

constexpr int kBlock = 2;

std::vector<std::int32_t> Ids(const std::vector<BlockId>& blocks) {
  std::vector<std::int32_t> ids;
  for (const BlockId block : blocks) ids.push_back(block.value);
  return ids;
}
using IdList = std::vector<std::int32_t>;

class BlockPoolTest : public ::testing::Test {
 protected:
  void SetUp() override { pool.Resize(4); }
  void TearDown() override { pool.CheckIntegrity(); }

  // A finished sequence of full blocks: written, published, released end first, as the scheduler does.
  std::vector<BlockId> Run(const std::vector<TokenId>& tokens) {
    BlockPool::Prefix prefix = pool.TakePrefix(tokens);
    while (prefix.blocks.size() * kBlock < tokens.size()) {
      const std::size_t begin = prefix.blocks.size() * kBlock;
      prefix.blocks.push_back(*pool.Allocate());
      prefix.content =
          pool.Publish(prefix.blocks.back(), prefix.content, std::span(tokens).subspan(begin, kBlock));
    }
    Release(prefix.blocks);
    return prefix.blocks;
  }
  void Release(const std::vector<BlockId>& blocks) {
    for (auto at = blocks.rbegin(); at != blocks.rend(); ++at) pool.Release(*at);
  }

  BlockPool pool{kBlock};
};

TEST_F(BlockPoolTest, GivesTheLowestFreeBlockFirst) {
  for (int id = 0; id < 4; ++id) EXPECT_EQ(pool.Allocate(), BlockId(id));
  EXPECT_EQ(pool.Allocate(), std::nullopt);
  pool.Release(BlockId(2));
  pool.Release(BlockId(1));
  EXPECT_EQ(pool.Allocate(), BlockId(1));
  EXPECT_EQ(pool.Referenced(), 3u);
}

TEST_F(BlockPoolTest, FindsTheLongestCachedPrefixOfWholeBlocks) {
  Run({1, 2, 3, 4});
  const BlockPool::Prefix longer = pool.TakePrefix(std::vector<TokenId>{1, 2, 3, 4, 5, 6});
  EXPECT_EQ(Ids(longer.blocks), (IdList{0, 1}));
  EXPECT_EQ(pool.References(BlockId(1)), 1);
  const BlockPool::Prefix cut = pool.TakePrefix(std::vector<TokenId>{1, 2, 3});
  EXPECT_EQ(Ids(cut.blocks), (IdList{0}));
  EXPECT_EQ(pool.References(BlockId(0)), 2);
  EXPECT_TRUE(pool.TakePrefix(std::vector<TokenId>{1, 3}).blocks.empty());
  Release(longer.blocks);
  Release(cut.blocks);
  EXPECT_EQ(pool.Available(), 4u);
}

TEST_F(BlockPoolTest, EqualTokensAfterAnotherPastAreAnotherContent) {
  Run({1, 2, 9, 9});
  EXPECT_TRUE(pool.TakePrefix(std::vector<TokenId>{9, 9}).blocks.empty());
  Run({3, 4, 9, 9});
  const BlockPool::Prefix first = pool.TakePrefix(std::vector<TokenId>{1, 2, 9, 9});
  const BlockPool::Prefix second = pool.TakePrefix(std::vector<TokenId>{3, 4, 9, 9});
  EXPECT_EQ(Ids(first.blocks), (IdList{0, 1}));
  EXPECT_EQ(Ids(second.blocks), (IdList{2, 3}));
  EXPECT_NE(first.content, second.content);
  Release(first.blocks);
  Release(second.blocks);
}

TEST_F(BlockPoolTest, ForgetsTheLeastRecentlyUsedAndTheEndOfASequenceBeforeItsStart) {
  Run({1, 2, 3, 4});
  Run({5, 6, 7, 8});
  Run({1, 2, 3, 4});  // used again: the other one is older now
  const BlockId taken = *pool.Allocate();
  EXPECT_EQ(taken, BlockId(3));
  const BlockPool::Prefix rest = pool.TakePrefix(std::vector<TokenId>{5, 6, 7, 8});
  EXPECT_EQ(Ids(rest.blocks), (IdList{2}));
  Release(rest.blocks);
  pool.Release(taken);
}

TEST_F(BlockPoolTest, ReferencedBlocksAreNeverForgotten) {
  Run({1, 2, 3, 4});
  const BlockPool::Prefix held = pool.TakePrefix(std::vector<TokenId>{1, 2, 3, 4});
  EXPECT_TRUE(pool.Allocate() && pool.Allocate());
  EXPECT_EQ(pool.Allocate(), std::nullopt);
  EXPECT_EQ(Ids(pool.TakePrefix(std::vector<TokenId>{1, 2, 3, 4}).blocks), (IdList{0, 1}));
}

TEST_F(BlockPoolTest, WhatFollowsAnEqualContentIsFoundBehindTheOneThatStayed) {
  const std::vector<TokenId> first{1, 2}, next{3, 4};
  const BlockId mine = *pool.Allocate(), other = *pool.Allocate(), mine_next = *pool.Allocate();
  const ContentId content = pool.Publish(other, 0, first);
  EXPECT_EQ(pool.Publish(mine, 0, first), content);  // computed twice at the same time
  pool.Publish(mine_next, content, next);
  EXPECT_EQ(pool.TakePrefix(std::vector<TokenId>{1, 2, 3, 4}).blocks,
            (std::vector<BlockId>{other, mine_next}));
}

TEST_F(BlockPoolTest, ShrinksFromTheTopAndForgetsWhatWasThere) {
  Run({1, 2, 3, 4, 5, 6, 7, 8});
  const BlockPool::Prefix held = pool.TakePrefix(std::vector<TokenId>{1, 2, 3, 4});
  EXPECT_TRUE(pool.ReferencedAtOrAbove(1));
  EXPECT_FALSE(pool.ReferencedAtOrAbove(2));
  pool.Resize(3);
  EXPECT_EQ(pool.Available(), 1u);
  EXPECT_EQ(pool.TakePrefix(std::vector<TokenId>{1, 2, 3, 4, 5, 6, 7, 8}).blocks.size(), 3u);
  pool.Resize(6);
  EXPECT_EQ(pool.Allocate(), BlockId(3));
}

TEST_F(BlockPoolTest, ForgetCacheLeavesReferencesAndFindsNothingMore) {
  Run({1, 2, 3, 4});
  const BlockPool::Prefix held = pool.TakePrefix(std::vector<TokenId>{1, 2});
  pool.ForgetCache();
  EXPECT_TRUE(pool.TakePrefix(std::vector<TokenId>{1, 2}).blocks.empty());
  EXPECT_EQ(pool.Referenced(), 1u);
  pool.Release(held.blocks[0]);
  EXPECT_EQ(pool.Available(), 4u);
}

TEST(BlockPoolProperty, APrefixThatIsFoundHoldsItsTokens) {
  for (std::uint64_t seed = 1; seed <= 100; ++seed) {
    Rng rng(seed);
    BlockPool pool(kBlock);
    pool.Resize(12);
    std::map<std::int32_t, std::vector<TokenId>> content;  // block -> all tokens up to its end
    std::vector<std::vector<BlockId>> held;
    for (int i = 0; i < 200; ++i) {
      if (rng.Below(3) == 0 && !held.empty()) {
        const std::size_t index = rng.Below(held.size());
        for (auto at = held[index].rbegin(); at != held[index].rend(); ++at) pool.Release(*at);
        held.erase(held.begin() + static_cast<long>(index));
      } else if (rng.Below(20) == 0) {
        const auto size = static_cast<std::uint32_t>(4 + rng.Below(12));
        if (!pool.ReferencedAtOrAbove(size)) pool.Resize(size);
      } else {
        std::vector<TokenId> tokens(kBlock * (1 + rng.Below(4)));
        for (TokenId& token : tokens) token = static_cast<TokenId>(rng.Below(2));
        BlockPool::Prefix prefix = pool.TakePrefix(tokens);
        for (std::size_t b = 0; b < prefix.blocks.size(); ++b)
          ASSERT_EQ(content[prefix.blocks[b].value],
                    std::vector<TokenId>(tokens.begin(), tokens.begin() + (b + 1) * kBlock))
              << "seed=" << seed;
        while (prefix.blocks.size() * kBlock < tokens.size()) {
          const auto block = pool.Allocate();
          if (!block) break;
          const std::size_t begin = prefix.blocks.size() * kBlock;
          content[block->value] = {tokens.begin(), tokens.begin() + begin + kBlock};
          prefix.content = pool.Publish(*block, prefix.content, std::span(tokens).subspan(begin, kBlock));
          prefix.blocks.push_back(*block);
        }
        held.push_back(prefix.blocks);
      }
      pool.CheckIntegrity();
    }
  }
}

TEST(BlockPool, ALimitWithholdsWhatComesFreeAboveIt) {
  BlockPool pool(kBlock);
  pool.Resize(4);
  std::vector<BlockId> blocks;
  for (int i = 0; i < 4; ++i) blocks.push_back(*pool.Allocate());
  pool.Release(blocks[3]);
  pool.Limit(2);
  EXPECT_EQ(pool.Available(), 0u);
  EXPECT_EQ(pool.Referenced(), 3u);
  EXPECT_EQ(pool.Usable(), 2u);
  pool.Release(blocks[2]);
  pool.Release(blocks[1]);
  pool.CheckIntegrity();
  EXPECT_EQ(pool.Available(), 1u);
  EXPECT_EQ(*pool.Allocate(), blocks[1]);
  EXPECT_FALSE(pool.Allocate());
  EXPECT_FALSE(pool.ReferencedAtOrAbove(2));
  pool.Resize(2);
  pool.Resize(4);  // the limit is gone with it
  EXPECT_EQ(pool.Available(), 2u);
  pool.CheckIntegrity();
}

}  // namespace
}  // namespace elasticmoe::core
