// Attention over latents (forward_latent.cc) of the AVX2 table: a block's rows are taken to float32 once for
// all queries of a unit that see the same tokens, and scores and outputs are made in tiles of three of them.
//
// A block: [16 tokens][head_dim] bf16. A softmax is brought up to date once a block, and
// sums run in the order of dims and tokens: the same bits whatever shares the call.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "compute/kernels.h"
#include "compute/simd_avx2.h"
#include "compute/softmax_avx2.h"

namespace elasticmoe::compute {
namespace {

void StoreLatent(const KvLayout& kv, int layer, int slot, const float* latent, std::byte* block) {
  auto* out = reinterpret_cast<Bf16*>(block + layer * kv.LayerBytes()) + slot * kv.head_dim;
  for (int d = 0; d < kv.head_dim; ++d) out[d] = ToBf16(latent[d]);
}

constexpr int kLanes = 8;
constexpr int kScoreTokens = 4;   // a tile is 3 queries x 4 tokens
constexpr int kValueVectors = 4;  // or 3 queries x 32 values: 12 sums of 16 registers

using LatentRow = float[kMaxLatentDim + 16];  // no power of two, or rows would lie in the same lines of L1

struct alignas(32) LatentScratch {  // rows end in zeros
  LatentRow q[kUnitQueries];
  LatentRow rows[kBlockTokens];  // of tokens that are seen
  Softmax softmax[kUnitQueries];
};

// body(first, constant count) for tiles of at most three queries; none of one where two of two will do.
template <class Body>
[[gnu::always_inline]] inline void ForQueries(int count, const Body& body) {
  for (int i = 0; i < count;) {
    const int left = count - i;
    if (left == 3 || left > 4) {
      body(i, std::integral_constant<int, 3>());
      i += 3;
    } else if (left >= 2) {
      body(i, std::integral_constant<int, 2>());
      i += 2;
    } else {
      body(i, std::integral_constant<int, 1>());
      i += 1;
    }
  }
}

// scores[i][t] = q[i] . rows[t] of four tokens from `first` on.
template <int kQueries>
inline void ScoreRows(const LatentRow* q, const LatentRow* rows, int dim, int first,
                      float (*scores)[kBlockTokens]) {
  __m256 acc[kQueries][kScoreTokens];
  for (int i = 0; i < kQueries; ++i)
    for (int t = 0; t < kScoreTokens; ++t) acc[i][t] = _mm256_setzero_ps();
  for (int d = 0; d < dim; d += kLanes) {
    __m256 in[kQueries];
    for (int i = 0; i < kQueries; ++i) in[i] = _mm256_load_ps(q[i] + d);
    for (int t = 0; t < kScoreTokens; ++t) {
      const __m256 row = _mm256_load_ps(rows[first + t] + d);
      for (int i = 0; i < kQueries; ++i) acc[i][t] = _mm256_fmadd_ps(in[i], row, acc[i][t]);
    }
  }
  for (int i = 0; i < kQueries; ++i) {
    const __m256 fours =
        _mm256_hadd_ps(_mm256_hadd_ps(acc[i][0], acc[i][1]), _mm256_hadd_ps(acc[i][2], acc[i][3]));
    _mm_store_ps(scores[i] + first,
                 _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1)));
  }
}

// out[d, d + 8 kVectors) = that * rescale + the weighted values of `seen` tokens.
template <int kQueries, int kVectors>
inline void AddRows(const LatentRow* rows, int d, int seen, const Softmax* softmax, const Query* queries) {
  __m256 part[kQueries][kVectors];
  for (int i = 0; i < kQueries; ++i)
    for (int v = 0; v < kVectors; ++v)
      part[i][v] =
          _mm256_mul_ps(_mm256_loadu_ps(queries[i].out + d + v * kLanes), _mm256_set1_ps(softmax[i].rescale));
  for (int t = 0; t < seen; ++t) {
    __m256 weight[kQueries];
    for (int i = 0; i < kQueries; ++i) weight[i] = _mm256_set1_ps(softmax[i].weights[t]);
    for (int v = 0; v < kVectors; ++v) {
      const __m256 value = _mm256_load_ps(rows[t] + d + v * kLanes);
      for (int i = 0; i < kQueries; ++i) part[i][v] = _mm256_fmadd_ps(weight[i], value, part[i][v]);
    }
  }
  for (int i = 0; i < kQueries; ++i)
    for (int v = 0; v < kVectors; ++v) _mm256_storeu_ps(queries[i].out + d + v * kLanes, part[i][v]);
}

void ToRows(const Bf16* block, int dim, int seen, LatentRow* rows) {
  for (int t = 0; t < seen; ++t, block += dim) {
    int d = 0;
    for (; d + kLanes <= dim; d += kLanes) _mm256_store_ps(rows[t] + d, FloatOf(block + d));
    for (; d < dim; ++d) rows[t][d] = ToFloat(block[d]);
  }
}

// One block, of which all queries see `seen` tokens. Meanwhile `next` is fetched, if there is one.
void AttendLatentBlock(const Bf16* block, const Bf16* next, const KvLayout& kv, const Query* queries,
                       int count, int seen, float scale, LatentScratch& scratch) {
  const int dim = kv.head_dim, values = kv.latent_values;
  ToRows(block, dim, seen, scratch.rows);
  alignas(32) float scores[kUnitQueries][kBlockTokens];
  for (int t = 0; t < seen; t += kScoreTokens)
    ForQueries(count,
               [&](int i, auto some) { ScoreRows<some()>(scratch.q + i, scratch.rows, dim, t, scores + i); });
  for (int i = 0; i < count; ++i)
    Advance(_mm256_load_ps(scores[i]), _mm256_load_ps(scores[i] + kLanes), 0, seen, scale,
            scratch.softmax[i]);
  int d = 0;
  constexpr int kStep = kValueVectors * kLanes;
  const int lines = static_cast<int>(kv.LayerBytes() / 64), steps = std::max(1, values / kStep);
  for (; d + kStep <= values; d += kStep) {
    const int step = d / kStep;
    for (int line = lines * step / steps; next != nullptr && line < lines * (step + 1) / steps; ++line)
      _mm_prefetch(reinterpret_cast<const char*>(next) + std::size_t(line) * 64, _MM_HINT_T1);
    ForQueries(count, [&](int i, auto some) {
      AddRows<some(), kValueVectors>(scratch.rows, d, seen, scratch.softmax + i, queries + i);
    });
  }
  for (; d + kLanes <= values; d += kLanes)
    ForQueries(count, [&](int i, auto some) {
      AddRows<some(), 1>(scratch.rows, d, seen, scratch.softmax + i, queries + i);
    });
  for (; d < values; ++d)
    for (int i = 0; i < count; ++i) {
      const Softmax& softmax = scratch.softmax[i];
      float part = queries[i].out[d] * softmax.rescale;
      for (int t = 0; t < seen; ++t) part = std::fma(softmax.weights[t], scratch.rows[t][d], part);
      queries[i].out[d] = part;
    }
}

// Queries that see the same tokens.
void AttendLatentQueries(const KvCache& cache, int layer, const std::uint32_t* block_table,
                         const Query* queries, int count, float scale, LatentScratch& scratch) {
  const KvLayout& kv = cache.layout;
  const int tokens = queries[0].tokens;
  for (int i = 0; i < count; ++i) {
    std::memcpy(scratch.q[i], queries[i].q, std::size_t(kv.head_dim) * sizeof(float));
    std::memset(queries[i].out, 0, std::size_t(kv.latent_values) * sizeof(float));
    scratch.softmax[i] = {};
  }
  const auto block_at = [&](int token) {
    return reinterpret_cast<const Bf16*>(cache.Block(block_table[token / kBlockTokens]) +
                                         layer * kv.LayerBytes());
  };
  for (int begin = 0; begin < tokens; begin += kBlockTokens) {
    const Bf16* next = begin + kBlockTokens < tokens ? block_at(begin + kBlockTokens) : nullptr;
    AttendLatentBlock(block_at(begin), next, kv, queries, count, std::min(kBlockTokens, tokens - begin),
                      scale, scratch);
  }
  for (int i = 0; i < count; ++i) {
    const float inverse = 1.0F / scratch.softmax[i].sum;
    for (int d = 0; d < kv.latent_values; ++d) queries[i].out[d] *= inverse;
  }
}

// As Kernels::attend.
void AttendLatents(const KvCache& cache, int layer, const AttendUnit* units, int count, float scale) {
  LatentScratch scratch;
  for (int d = cache.layout.head_dim; d % kLanes != 0; ++d) {
    for (LatentRow& q : scratch.q) q[d] = 0;
    for (LatentRow& row : scratch.rows) row[d] = 0;
  }
  for (int u = 0; u < count; ++u) {
    const AttendUnit& unit = units[u];
    for (int i = 0, end; i < unit.count; i = end) {
      for (end = i + 1; end < unit.count && unit.queries[end].tokens == unit.queries[i].tokens;) ++end;
      AttendLatentQueries(cache, layer, unit.block_table, unit.queries + i, end - i, scale, scratch);
    }
  }
}

}  // namespace
}  // namespace elasticmoe::compute
