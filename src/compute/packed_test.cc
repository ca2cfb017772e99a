#include "compute/packed.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "base/rng.h"
#include "compute/layout.h"

namespace elasticmoe::compute {
namespace {

TEST(Bf16, RoundsToNearestEvenAndKeepsNaN) {
  EXPECT_EQ(0x3f80, ToBf16(1.0F));
  EXPECT_EQ(0x3f80, ToBf16(1.0F + 0x1p-8F));  // half way, 1.0 is even
  EXPECT_EQ(0x3f82, ToBf16(1.0F + 0x3p-8F));  // half way, the upper one is even
  EXPECT_EQ(0x3f81, ToBf16(1.0F + 0x1.1p-8F));
  EXPECT_EQ(0x7f80, ToBf16(3.4e38F));  // past the largest: infinity
  EXPECT_EQ(0xff80, ToBf16(-std::numeric_limits<float>::infinity()));
  EXPECT_TRUE(std::isnan(ToFloat(ToBf16(std::bit_cast<float>(0x7f800001u)))));  // payload in the lost half
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = ToFloat(static_cast<Bf16>(bits));
    if (std::isnan(value)) continue;
    ASSERT_EQ(bits, ToBf16(value));
  }
}

TEST(Convert, ReadsHalvesExactly) {
  const std::uint16_t halves[] = {0x3c00, 0xc000, 0x0001, 0x03ff, 0x7bff, 0x7c00, 0x8000};
  float out[7];
  ConvertToFloat(halves, DType::kF16, 7, out);
  const float want[] = {1.0F, -2.0F, 0x1p-24F, 0x3ffp-24F, 65504.0F, std::numeric_limits<float>::infinity(),
                        -0.0F};
  for (int i = 0; i < 7; ++i)
    EXPECT_EQ(std::bit_cast<std::uint32_t>(want[i]), std::bit_cast<std::uint32_t>(out[i])) << i;
}

TEST(PackRows, UnpacksToWhatWentInFromEveryTypeAndAlignment) {
  Rng rng(1);
  for (const int k : {1, 2, 7, 38, 64, 65, 101}) {
    for (const DType type : {DType::kBf16, DType::kF16, DType::kF32}) {
      constexpr int kRows = 77;  // a whole panel, among others, in a part that begins before it
      std::vector<float> values(kRows * k);
      std::vector<char> bytes(1 + values.size() * BytesOf(type));  // + 1: sources in files lie anywhere
      for (std::size_t i = 0; i < values.size(); ++i) {
        values[i] = static_cast<float>(rng.Below(16)) - 8;  // exact in all three
        const auto f32 = std::bit_cast<std::uint32_t>(values[i]);
        const std::uint16_t f16 =
            values[i] == 0
                ? 0
                : static_cast<std::uint16_t>((f32 >> 16 & 0x8000) | (((f32 >> 23 & 0xff) - 112) << 10) |
                                             (f32 >> 13 & 0x3ff));
        const Bf16 bf16 = ToBf16(values[i]);
        const void* from = type == DType::kF32   ? static_cast<const void*>(&f32)
                           : type == DType::kF16 ? static_cast<const void*>(&f16)
                                                 : &bf16;
        std::copy_n(static_cast<const char*>(from), BytesOf(type), bytes.data() + 1 + i * BytesOf(type));
      }
      std::vector<Bf16> packed(PackedBytes(kRows, k) / 2, 0);
      // In two parts, the second first, as a loader with several threads may.
      PackRows(bytes.data() + 1 + std::size_t(20) * k * BytesOf(type), type, 20, kRows - 20, k,
               packed.data());
      PackRows(bytes.data() + 1, type, 0, 20, k, packed.data());
      std::vector<float> row(k);
      for (int i = 0; i < kRows; ++i) {
        UnpackRow({packed.data(), kRows, k}, i, row.data());
        for (int j = 0; j < k; ++j) ASSERT_EQ(values[i * k + j], row[j]) << "row " << i << " k=" << k;
      }
      std::size_t not_zero = 0;
      for (const Bf16 value : packed) not_zero += value != 0;
      std::size_t wanted = 0;
      for (const float value : values) wanted += value != 0;
      EXPECT_EQ(wanted, not_zero) << "the padding is zero";
    }
  }
}

TEST(WeightLayout, PlacesLieApartAlignedAndInsideTheirBlob) {
  core::ModelSpec spec;
  spec.vocab = 75;
  spec.hidden = 46;
  spec.attention = {.heads = 6, .kv_heads = 2, .head_dim = 10, .qk_norm = true, .qkv_bias = true};
  spec.moe = {.experts = 5, .top_k = 3, .expert_width = 21};
  spec.layers = {{false, 53}, {true, 0}};
  const WeightLayout layout(spec);
  std::vector<std::pair<std::size_t, std::size_t>> shared, expert;
  const auto add = [&](std::vector<std::pair<std::size_t, std::size_t>>& places, Role role, int layer) {
    const TensorPlace& place = layout.Place(role, layer);
    EXPECT_EQ(0u, place.offset % kAlign);
    places.emplace_back(place.offset, place.packed ? PackedBytes(place.n_fused, place.k)
                                                   : std::size_t(place.n_fused) * place.k * sizeof(float));
  };
  for (const Role role : {Role::kEmbedding, Role::kLmHead, Role::kFinalNorm}) add(shared, role, -1);
  for (int layer = 0; layer < 2; ++layer)
    for (const Role role :
         {Role::kAttentionNorm, Role::kQ, Role::kQBias, Role::kQNorm, Role::kKNorm, Role::kO, Role::kMlpNorm})
      add(shared, role, layer);
  for (const Role role : {Role::kDenseGate, Role::kDenseUp, Role::kDenseDown}) add(shared, role, 0);
  add(shared, Role::kRouter, 1);
  for (const Role role : {Role::kExpertGate, Role::kExpertUp, Role::kExpertDown}) add(expert, role, 1);
  for (auto* places : {&shared, &expert}) {
    std::sort(places->begin(), places->end());
    for (std::size_t i = 0; i + 1 < places->size(); ++i)
      EXPECT_LE((*places)[i].first + (*places)[i].second, (*places)[i + 1].first);
    EXPECT_LE(places->back().first + places->back().second,
              places == &shared ? layout.SharedBytes() : layout.ExpertBytes());
  }
  // Q, K and V are one matrix.
  EXPECT_EQ(layout.Place(Role::kQ, 0).offset, layout.Place(Role::kV, 0).offset);
  EXPECT_EQ(60, layout.Place(Role::kK, 0).row_begin);
  EXPECT_EQ(80, layout.Place(Role::kV, 0).row_begin);
  EXPECT_EQ(100, layout.Place(Role::kV, 0).n_fused);
}

TEST(WeightLayoutDeathTest, TensorThatTheModelLacksIsOurBug) {
  core::ModelSpec spec;
  spec.vocab = 8;
  spec.hidden = 4;
  spec.tied_head = true;
  spec.attention = {.heads = 1, .kv_heads = 1, .head_dim = 4};
  spec.layers = {{false, 4}};
  const WeightLayout layout(spec);
  EXPECT_DEATH(layout.Place(Role::kLmHead), "role=");
  EXPECT_DEATH(layout.Place(Role::kRouter, 0), "role=");
  EXPECT_EQ(0u, layout.ExpertBytes());
}

}  // namespace
}  // namespace elasticmoe::compute
