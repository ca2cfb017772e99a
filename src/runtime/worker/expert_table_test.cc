#include "runtime/worker/expert_table.h"

#include <gtest/gtest.h>

#include <cstring>

namespace elasticmoe::runtime {
namespace {

constexpr std::uint64_t kStride = 8192;
constexpr int kLayers = 2, kExperts = 6;

// Every page of the domain says its number.
class ExpertTableTest : public ::testing::TestWithParam<ExpertTableKind> {
 protected:
  ExpertTableTest() {
    for (std::uint64_t at = 0; at < kLayers * kExperts * kStride; at += 4096) {
      const std::uint64_t page = at / 4096;
      std::memcpy(domain.data() + at, &page, sizeof(page));
    }
  }
  static std::vector<OwnedExpert> Owned(std::initializer_list<std::pair<int, int>> experts) {
    std::vector<OwnedExpert> owned;
    for (const auto& [layer, expert] : experts)
      owned.push_back({layer, expert, static_cast<std::uint64_t>(layer * kExperts + expert) * kStride});
    return owned;
  }
  static void ExpectContent(const std::vector<std::byte*>& addresses, const std::vector<OwnedExpert>& owned) {
    ASSERT_EQ(addresses.size(), owned.size());
    for (std::size_t i = 0; i < owned.size(); ++i)
      for (std::uint64_t page = 0; page < kStride / 4096; ++page) {
        std::uint64_t found = 0;
        std::memcpy(&found, addresses[i] + page * 4096, sizeof(found));
        EXPECT_EQ(found, owned[i].offset / 4096 + page);
      }
  }

  Fd fd = *CreateMemory("test", kLayers* kExperts* kStride, PageKind::kSmall);
  Mapping domain = *Map(fd.get(), 0, kLayers* kExperts* kStride, true);
  ExpertTableShape shape{kLayers, kExperts, 6000, kStride, 3};
  std::unique_ptr<ExpertTable> table = MakeExpertTable(GetParam(), shape, domain, fd.get());
};

TEST_P(ExpertTableTest, FindsTheExpertsOfEachEpochBesideThoseBefore) {
  const auto first = Owned({{0, 0}, {0, 1}, {0, 2}, {1, 4}});
  const auto second = Owned({{0, 1}, {0, 5}, {1, 0}, {1, 4}});
  const auto third = Owned({{1, 3}});
  const auto a = table->Prepare(7, first);
  ASSERT_TRUE(a) << a.error().message;
  const auto b = table->Prepare(8, second);
  ASSERT_TRUE(b) << b.error().message;
  const auto c = table->Prepare(9, third);
  ASSERT_TRUE(c) << c.error().message;
  ExpectContent(*a, first);
  ExpectContent(*b, second);
  ExpectContent(*c, third);
  const auto d = table->Prepare(10, second);  // where the first was
  ASSERT_TRUE(d) << d.error().message;
  ExpectContent(*b, second);
  ExpectContent(*c, third);
  ExpectContent(*d, second);
}

INSTANTIATE_TEST_SUITE_P(Kinds, ExpertTableTest,
                         ::testing::Values(ExpertTableKind::kPointer, ExpertTableKind::kRemap),
                         [](const auto& info) { return std::string(ToString(info.param)); });

using RemapTableTest = ExpertTableTest;

TEST_P(RemapTableTest, PutsTheExpertsOfALayerSideBySideAndKeepsWhatStays) {
  const auto owned = Owned({{0, 4}, {0, 1}, {1, 2}});
  const auto a = table->Prepare(0, owned);
  ASSERT_TRUE(a) << a.error().message;
  EXPECT_EQ((*a)[1], (*a)[0] + kStride);
  EXPECT_EQ(table->Mappings(), 3u);
  const auto again = table->Prepare(3, Owned({{0, 4}, {1, 2}}));
  ASSERT_TRUE(again);
  EXPECT_EQ((*again)[0], (*a)[0]);
  EXPECT_EQ(table->Mappings(), 2u);
}

INSTANTIATE_TEST_SUITE_P(Kinds, RemapTableTest, ::testing::Values(ExpertTableKind::kRemap));

}  // namespace
}  // namespace elasticmoe::runtime
