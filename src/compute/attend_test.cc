// Attention of every table this machine can run: right within the rounding of its formats, and bit for bit
// the same whatever queries and units share a call.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "base/rng.h"
#include "compute/kernels.h"

namespace elasticmoe::compute {
namespace {

constexpr float kUntouched = -12345.0F;

// Values that bf16 holds exactly, in (-1, 1).
std::vector<float> ExactVector(Rng& rng, std::size_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = ToFloat(ToBf16(static_cast<float>(2 * rng.Uniform() - 1)));
  return values;
}

class EveryAttention : public ::testing::TestWithParam<const Kernels*> {
 protected:
  const Kernels& kernels_ = *GetParam();
};

struct Shape {
  int dim;
  int latent_values = 0;  // 0: K and V apart
  int OutDim() const { return latent_values > 0 ? latent_values : dim; }
};

std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  return out << "dim=" << shape.dim << " latent_values=" << shape.latent_values;
}

// A sequence in a cache whose every other byte is NaN.
class Attention {
 public:
  // REQUIRES: kv_heads is 1 over latents.
  Attention(const Kernels& kernels, Rng& rng, int kv_heads, const Shape& shape, int tokens)
      : kernels_(kernels),
        layout_{2, kv_heads, shape.dim, kernels.kv_element_bytes, shape.latent_values},
        dim_(shape.dim),
        out_dim_(shape.OutDim()) {
    const int blocks = tokens / kBlockTokens + 1;
    for (int i = 0; i < blocks; ++i)
      table_.push_back(static_cast<std::uint32_t>(2 * blocks - 1 - 2 * i));  // backwards, over both chunks
    chunk_bytes_.assign(2, std::vector<std::byte>(blocks * layout_.BlockBytes(), std::byte{0xff}));
    for (auto& chunk : chunk_bytes_) chunks_.push_back(chunk.data());
    cache_ = {layout_, chunks_.data(), static_cast<std::uint32_t>(blocks)};
    for (int t = 0; t < tokens; ++t) {
      keys_.push_back(ExactVector(rng, std::size_t(kv_heads) * dim_));
      values_.push_back(shape.latent_values > 0 ? keys_.back()
                                                : ExactVector(rng, std::size_t(kv_heads) * dim_));
    }
  }
  void Store(int token) {
    kernels_.store_kv(layout_, 1, token % kBlockTokens, keys_[token].data(),
                      layout_.latent_values > 0 ? nullptr : values_[token].data(),
                      cache_.Block(table_[token / kBlockTokens]));
  }
  void Attend(int kv_head, const std::vector<Query>& queries, float scale) {
    const int count = static_cast<int>(queries.size());
    std::vector<AttendUnit> units;
    for (int i = 0; i < count; i += kUnitQueries)
      units.push_back({table_.data(), kv_head, queries.data() + i, std::min(kUnitQueries, count - i)});
    kernels_.attend(cache_, 1, units.data(), static_cast<int>(units.size()), scale);
  }
  // Unit i over KV head i % kv_heads.
  void AttendUnits(const std::vector<std::vector<Query>>& queries, float scale) {
    std::vector<AttendUnit> units;
    for (std::size_t i = 0; i < queries.size(); ++i)
      units.push_back({table_.data(), static_cast<int>(i) % layout_.kv_heads, queries[i].data(),
                       static_cast<int>(queries[i].size())});
    kernels_.attend(cache_, 1, units.data(), static_cast<int>(units.size()), scale);
  }
  // The last query over a sequence that begins with this one's second block; the one before, if `both`, over
  // this one.
  void AttendShifted(const std::vector<Query>& queries, float scale, bool both) {
    std::vector<AttendUnit> units;
    if (both) units.push_back({table_.data(), 0, &queries.front(), 1});
    units.push_back({table_.data() + 1, 0, &queries.back(), 1});
    kernels_.attend(cache_, 1, units.data(), static_cast<int>(units.size()), scale);
  }
  // {the exact result, the error bound of every element} of a query that sees [first, tokens) and a sink.
  std::pair<std::vector<double>, double> Want(int kv_head, const std::vector<float>& q, int tokens,
                                              float scale, int first = 0, double sink = -INFINITY) const {
    std::vector<double> out(out_dim_);
    double sum = std::exp(sink), largest_size = 0;
    for (int t = first; t < tokens; ++t) {
      double score = 0, size = 0;
      for (int d = 0; d < dim_; ++d) {
        score += double{q[d]} * keys_[t][kv_head * dim_ + d] * scale;
        size += std::abs(double{q[d]} * keys_[t][kv_head * dim_ + d] * scale);
      }
      largest_size = std::max(largest_size, size);
      sum += std::exp(score);
      for (int d = 0; d < out_dim_; ++d) out[d] += std::exp(score) * values_[t][kv_head * dim_ + d];
    }
    for (double& value : out) value /= sum;
    // Scores err by `score`, so each weight by twice that; exp by 2 ulp; then a sum of `tokens` products with
    // |v| <= 1.
    const double score = (dim_ + 4) * 0x1p-23 * largest_size;
    // The AVX512 tables round weights to bf16, in the sum too; over latents so does the AMX table.
    const bool rounds = kernels_.name.starts_with("avx512") ||
                        (kernels_.name.starts_with("amx") && layout_.latent_values > 0);
    const double weight = rounds ? 0x1p-8 : 0;
    return {out, 2 * (2 * score + 4 * 0x1p-23) + (tokens + 8) * 0x1p-22 + weight};
  }
  int BestToken(int kv_head, const std::vector<float>& q) const {
    int best = 0;
    double best_score = -INFINITY;
    for (std::size_t t = 0; t < keys_.size(); ++t) {
      double score = 0;
      for (int d = 0; d < dim_; ++d) score += double{q[d]} * keys_[t][kv_head * dim_ + d];
      if (score > best_score) best = static_cast<int>(t);
      best_score = std::max(best_score, score);
    }
    return best;
  }
  float Value(int token, int d) const { return values_[token][d]; }

 private:
  const Kernels& kernels_;
  KvLayout layout_;
  int dim_, out_dim_;
  std::vector<std::uint32_t> table_;
  std::vector<std::vector<std::byte>> chunk_bytes_;
  std::vector<std::byte*> chunks_;
  KvCache cache_;
  std::vector<std::vector<float>> keys_, values_;
};

TEST_P(EveryAttention, AttendIsRightForEveryLengthAndSeesNoOtherSlot) {
  Rng rng(7);
  for (const Shape shape : {Shape{2},
                            {10},
                            {16},
                            {26},
                            {64},
                            {128},
                            {2, 2},
                            {10, 6},
                            {16, 16},
                            {40, 32},
                            {46, 41},
                            {62, 30},
                            {108, 100},
                            {576, 512}}) {
    constexpr int kTokens = 130;
    const int heads = shape.latent_values > 0 ? 1 : 2;
    Attention attention(kernels_, rng, heads, shape, kTokens);
    const float scale = 3.0F / std::sqrt(static_cast<float>(shape.dim));
    for (int tokens = 1; tokens <= kTokens; ++tokens) {
      attention.Store(tokens - 1);  // later slots are NaN still
      const std::vector<float> q = ExactVector(rng, shape.dim);
      std::vector<float> out(shape.OutDim() + 1, kUntouched);
      attention.Attend(heads - 1, {{q.data(), out.data(), tokens}}, scale);
      const auto [want, bound] = attention.Want(heads - 1, q, tokens, scale);
      for (int d = 0; d < shape.OutDim(); ++d)
        ASSERT_NEAR(want[d], out[d], bound) << shape << " tokens=" << tokens;
      ASSERT_EQ(kUntouched, out.back());
    }
  }
}

TEST_P(EveryAttention, AttendSeesItsWindowAndItsSink) {
  Rng rng(17);
  for (const int dim : {10, 64}) {
    constexpr int kTokens = 50;
    Attention attention(kernels_, rng, 2, Shape{dim}, kTokens);
    for (int t = 0; t < kTokens; ++t) attention.Store(t);
    for (int first = 0; first < kTokens; ++first) {
      const std::vector<float> q = ExactVector(rng, dim), other = ExactVector(rng, dim);
      std::vector<float> out(dim), beside(dim);
      const int tokens = std::min(kTokens, first + 1 + first % 19);
      const float sink = first % 3 == 0 ? -INFINITY : static_cast<float>(rng.Uniform());
      const Query query{q.data(), out.data(), tokens, first, sink};
      attention.Attend(1, {query}, 0.5F);
      const auto [want, bound] = attention.Want(1, q, tokens, 0.5F, first, sink);
      for (int d = 0; d < dim; ++d)
        ASSERT_NEAR(want[d], out[d], bound) << "dim=" << dim << " first=" << first << " sink=" << sink;
      const std::vector<float> alone = out;
      attention.Attend(1, {{other.data(), beside.data(), kTokens}, query}, 0.5F);
      ASSERT_EQ(alone, out) << "dim=" << dim << " first=" << first;
    }
  }
}

TEST_P(EveryAttention, AttendGivesTheSameBitsWhateverSharesTheCallAndTheBlock) {
  Rng rng(8);
  for (const Shape shape : {Shape{10}, {64}, {14, 9}, {40, 32}, {108, 100}, {576, 512}}) {
    constexpr int kTokens = 140;
    const int dim = shape.dim;
    Attention attention(kernels_, rng, 1, shape, kTokens);
    std::vector<std::vector<float>> q;
    std::vector<std::vector<float>> alone;
    for (int tokens = 1; tokens <= kTokens; ++tokens) {
      attention.Store(tokens - 1);
      q.push_back(ExactVector(rng, dim));
      alone.emplace_back(shape.OutDim());
      attention.Attend(0, {{q.back().data(), alone.back().data(), tokens}}, 0.5F);
    }
    // Now with all tokens in place: rows of a chunk, rows of a decode group, rows far apart.
    for (int count = 1; count <= 20; ++count) {
      for (const int step : {0, 1, 3}) {
        std::vector<std::vector<float>> out(count, std::vector<float>(shape.OutDim()));
        std::vector<Query> queries;
        std::vector<int> which;
        const int first = static_cast<int>(rng.Below(kTokens));
        for (int i = 0; i < count; ++i) {
          which.push_back((first + i * step) % kTokens);
          queries.push_back({q[which[i]].data(), out[i].data(), which[i] + 1});
        }
        attention.Attend(0, queries, 0.5F);
        for (int i = 0; i < count; ++i)
          ASSERT_EQ(alone[which[i]], out[i]) << shape << " count=" << count << " tokens=" << which[i] + 1;
      }
    }
  }
}

// Heads of one row, as many as no tile is made for, cut into units in every way.
TEST_P(EveryAttention, AttendOverLatentsGivesTheSameBitsHoweverHeadsAreCut) {
  Rng rng(19);
  for (const Shape shape : {Shape{40, 32}, {576, 512}}) {
    for (const int tokens : {7, 64, 65, 127, 200}) {
      constexpr int kHeads = 70;
      Attention attention(kernels_, rng, 1, shape, tokens);
      for (int t = 0; t < tokens; ++t) attention.Store(t);
      std::vector<std::vector<float>> q, alone, out(kHeads, std::vector<float>(shape.OutDim()));
      for (int i = 0; i < kHeads; ++i) {
        q.push_back(ExactVector(rng, shape.dim));
        alone.emplace_back(shape.OutDim());
        attention.Attend(0, {{q[i].data(), alone[i].data(), tokens}}, 0.25F);
      }
      for (const int most : {1, 3, 8, 15, kUnitQueries}) {
        for (std::vector<float>& row : out) std::ranges::fill(row, kUntouched);
        std::vector<std::vector<Query>> units;
        for (int i = 0; i < kHeads; ++i) {
          if (i % most == 0) units.emplace_back();
          units.back().push_back({q[i].data(), out[i].data(), tokens});
        }
        attention.AttendUnits(units, 0.25F);
        for (int i = 0; i < kHeads; ++i)
          ASSERT_EQ(alone[i], out[i]) << shape << " tokens=" << tokens << " most=" << most << " head=" << i;
      }
    }
  }
}

// Long sequences and short ones, one after the other in a call, with sliding windows (which latents do not
// have) and rows of several lengths.
TEST_P(EveryAttention, AttendGivesTheSameBitsWhateverUnitsShareTheCall) {
  Rng rng(18);
  constexpr int kTokens = 300;
  const std::vector<std::vector<int>> lengths = {
      {300, 300, 300, 300}, {1, 2, 3}, {64}, {65, 65, 66, 66, 67, 67, 68, 68}, {16, 17}, {290},
      {129, 128, 128}};
  for (const auto& [shape, window] :
       {std::pair{Shape{64}, 0}, {Shape{64}, 20}, {Shape{64}, 100}, {Shape{40, 32}, 0}, {Shape{46, 41}, 0}}) {
    const int heads = shape.latent_values > 0 ? 1 : 2;
    Attention attention(kernels_, rng, heads, shape, kTokens);
    for (int t = 0; t < kTokens; ++t) attention.Store(t);
    std::vector<std::vector<float>> q, out, alone;
    std::vector<std::vector<Query>> queries;
    for (const auto& unit : lengths)
      for (std::size_t i = 0; i < unit.size(); ++i) {
        q.push_back(ExactVector(rng, shape.dim));
        out.emplace_back(shape.OutDim(), kUntouched);
        alone.emplace_back(shape.OutDim());
      }
    std::size_t at = 0;
    for (std::size_t u = 0; u < lengths.size(); ++u) {
      const int head = static_cast<int>(u) % heads;
      queries.emplace_back();
      for (const int tokens : lengths[u]) {
        const int first = window > 0 ? std::max(0, tokens - window) : 0;
        attention.Attend(head, {{q[at].data(), alone[at].data(), tokens, first}}, 0.5F);
        const auto [want, bound] = attention.Want(head, q[at], tokens, 0.5F, first);
        for (int d = 0; d < shape.OutDim(); ++d) ASSERT_NEAR(want[d], alone[at][d], bound) << tokens;
        queries.back().push_back({q[at].data(), out[at].data(), tokens, first});
        ++at;
      }
    }
    attention.AttendUnits(queries, 0.5F);
    for (std::size_t i = 0; i < out.size(); ++i)
      ASSERT_EQ(alone[i], out[i]) << i << " " << shape << " window=" << window;
  }
}

TEST_P(EveryAttention, AttendTellsSequencesOfOneLengthApart) {
  Rng rng(20);
  constexpr int kTokens = 96;
  for (const Shape shape : {Shape{64}, Shape{40, 32}}) {
    Attention attention(kernels_, rng, 1, shape, kTokens);
    for (int t = 0; t < kTokens; ++t) attention.Store(t);
    const std::vector<float> q = ExactVector(rng, shape.dim);
    std::vector<std::vector<float>> out(4, std::vector<float>(shape.OutDim()));
    const auto query = [&](int i) { return Query{q.data(), out[i].data(), kTokens - 16}; };
    attention.Attend(0, {query(0)}, 0.5F);
    attention.AttendShifted({query(1)}, 0.5F, false);
    attention.AttendShifted({query(2), query(3)}, 0.5F, true);
    EXPECT_NE(out[0], out[1]) << shape;
    EXPECT_EQ(out[0], out[2]) << shape;
    EXPECT_EQ(out[1], out[3]) << shape;
  }
}

// The softmax leaves one token of many whose scores lie thousands apart: its value comes out, and no NaN.
TEST_P(EveryAttention, AttendSurvivesScoresFarApart) {
  Rng rng(9);
  for (const Shape shape : {Shape{2}, Shape{2, 2}}) {
    Attention attention(kernels_, rng, 1, shape, 140);
    for (int t = 0; t < 140; ++t) attention.Store(t);
    const std::vector<float> q = {512, -512};
    const float scale = 64;
    std::vector<float> out(2);
    attention.Attend(0, {{q.data(), out.data(), 140}}, scale);
    const int winner = attention.BestToken(0, q);
    for (int d = 0; d < 2; ++d) EXPECT_NEAR(attention.Value(winner, d), out[d], 1e-6) << shape;
  }
}

INSTANTIATE_TEST_SUITE_P(Tables, EveryAttention, ::testing::ValuesIn(AvailableKernels()),
                         [](const auto& info) { return std::string(info.param->name); });

}  // namespace
}  // namespace elasticmoe::compute
