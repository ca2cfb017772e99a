// Attention of the AVX512 tables: up to four queries of a KV head side by side over spans of 64 tokens, so
// that neither the products' latency nor the softmax's shows. What comes next is fetched meanwhile: a block's
// K or V of one head is a few KiB somewhere in memory, too short for the machine to see it coming.
//
// K of a block: [head_dim / 2][16 tokens][2] bf16 (16 tokens = 16 lanes of one dot product); V: [8 pairs of
// tokens][head_dim][2] bf16. Spans begin at multiples of 64 tokens of the sequence, a softmax is brought up
// to date once a span, and sums run token by token: the same bits whatever shares the call.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "compute/attend_latent_avx512.h"
#include "compute/kernels.h"
#include "compute/simd_avx512.h"
#include "compute/softmax_avx512.h"

namespace elasticmoe::compute {
namespace {

constexpr int kSideBySide = 4;  // queries: 4 x 4 blocks of scores, K and q fit the 32 registers

void ToActivation(const float* in, int count, void* out) {
  auto* to = static_cast<Bf16*>(out);
  int i = 0;
  for (; i + 16 <= count; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), Bf16Of(_mm512_loadu_ps(in + i)));
  if (i < count) {
    const __mmask16 tail = FirstLanes(count - i);
    _mm256_mask_storeu_epi16(to + i, tail, Bf16Of(_mm512_maskz_loadu_ps(tail, in + i)));
  }
}

void StoreKv(const KvLayout& kv, int layer, int slot, const float* k, const float* v, std::byte* block) {
  if (kv.latent_values > 0) return StoreLatent(kv, layer, slot, k, block);
  for (int head = 0; head < kv.kv_heads; ++head) {
    auto* keys = reinterpret_cast<Bf16*>(block + kv.KeyOffset(layer, head));
    auto* values = reinterpret_cast<Bf16*>(block + kv.ValueOffset(layer, head));
    const int begin = head * kv.head_dim;
    for (int d = 0; d < kv.head_dim; ++d) {
      keys[(d / 2 * kBlockTokens + slot) * 2 + d % 2] = ToBf16(k[begin + d]);
      values[(slot / 2 * kv.head_dim + d) * 2 + slot % 2] = ToBf16(v[begin + d]);
    }
  }
}

// The blocks of a span that some query sees: [first, count) of it.
struct SpanBlocks {
  const Bf16* keys[kSpanBlocks];
  const Bf16* values[kSpanBlocks];
  int first = 0, count = 0;
};

SpanBlocks SpanAt(const KvCache& cache, int layer, const AttendUnit& unit, int begin, int first, int tokens) {
  SpanBlocks span;
  span.first = std::max(0, first - begin) / kBlockTokens;
  span.count = std::min(kSpanBlocks, (tokens - begin + kBlockTokens - 1) / kBlockTokens);
  for (int b = span.first; b < span.count; ++b) {
    const std::byte* block = cache.Block(unit.block_table[begin / kBlockTokens + b]);
    span.keys[b] = reinterpret_cast<const Bf16*>(block + cache.layout.KeyOffset(layer, unit.kv_head));
    span.values[b] = reinterpret_cast<const Bf16*>(block + cache.layout.ValueOffset(layer, unit.kv_head));
  }
  return span;
}

// Brings the softmax up to date with the span's kBlocks blocks.
template <int kQueries, int kBlocks>
inline void Score(const SpanBlocks& span, const Bf16 (*q)[kMaxHeadDim], int dim, float scale,
                  Softmax* softmax, Fetch& fetch) {
  constexpr int kStep = 16;  // of dim between fetches
  const Bf16* const* keys = span.keys + span.first;
  __m512 acc[kQueries][kBlocks];
#pragma GCC unroll 4
  for (int i = 0; i < kQueries; ++i)
    for (int b = 0; b < kBlocks; ++b) acc[i][b] = _mm512_setzero_ps();
  for (int begin = 0; begin < dim; begin += kStep) {
    fetch.Some();
    const int end = std::min(dim, begin + kStep);
    for (int d = begin; d < end; d += 2) {
      __m512i key[kBlocks];
      for (int b = 0; b < kBlocks; ++b) key[b] = _mm512_loadu_si512(keys[b] + d * kBlockTokens);
#pragma GCC unroll 4
      for (int i = 0; i < kQueries; ++i) {
        std::uint32_t both;
        std::memcpy(&both, q[i] + d, 4);
        const __m512i pair = _mm512_set1_epi32(static_cast<int>(both));
        for (int b = 0; b < kBlocks; ++b) acc[i][b] = DotBf16(acc[i][b], key[b], pair);
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kQueries; ++i)
    if (softmax[i].first < softmax[i].seen) Advance<kBlocks>(acc[i], span.first, scale, softmax[i]);
}

template <int kQueries>
inline void ScoreSpan(const SpanBlocks& span, const Bf16 (*q)[kMaxHeadDim], int dim, float scale,
                      Softmax* softmax, Fetch& fetch) {
  switch (span.count - span.first) {
    case 1:
      return Score<kQueries, 1>(span, q, dim, scale, softmax, fetch);
    case 2:
      return Score<kQueries, 2>(span, q, dim, scale, softmax, fetch);
    case 3:
      return Score<kQueries, 3>(span, q, dim, scale, softmax, fetch);
    default:
      return Score<kQueries, 4>(span, q, dim, scale, softmax, fetch);
  }
}

// out[d, d + 16 kChunks) = that * rescale + the weighted values of the span, for queries that see the same
// tokens. `lanes`: of the last chunk.
template <int kQueries, int kChunks>
inline void AddChunks(const SpanBlocks& span, int dim, int d, __mmask16 lanes, const Softmax* softmax,
                      const Query* queries, Fetch& fetch) {
  const auto lanes_of = [&](int chunk) { return chunk + 1 < kChunks ? __mmask16(0xffff) : lanes; };
  __m512 part[kQueries][kChunks];
  for (int i = 0; i < kQueries; ++i)
    for (int c = 0; c < kChunks; ++c)
      part[i][c] = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes_of(c), queries[i].out + d + c * 16),
                                 _mm512_set1_ps(softmax[i].rescale));
  const auto add_pair = [&](const Bf16* values, int token, __m512i present) {
    __m512i pairs[kChunks];
    for (int c = 0; c < kChunks; ++c)
      pairs[c] = _mm512_and_si512(_mm512_maskz_loadu_epi32(lanes_of(c), values + c * 32), present);
    for (int i = 0; i < kQueries; ++i) {
      std::uint32_t both;
      std::memcpy(&both, softmax[i].weights + token, 4);
      const __m512i weights = _mm512_set1_epi32(static_cast<int>(both));
      for (int c = 0; c < kChunks; ++c) part[i][c] = DotBf16(part[i][c], pairs[c], weights);
    }
  };
  const int seen = softmax[0].seen;
  for (int b = softmax[0].first / kBlockTokens; b * kBlockTokens < seen; ++b) {
    fetch.Some();
    const Bf16* values = span.values[b] + d * 2;
    const int begin = b * kBlockTokens, tokens = std::min(kBlockTokens, seen - begin);
    int t = 0;
    for (; t + 2 <= tokens; t += 2, values += dim * 2) add_pair(values, begin + t, _mm512_set1_epi32(-1));
    if (t < tokens)
      add_pair(values, begin + t, _mm512_set1_epi32(0xffff));  // what stands behind never enters
  }
  for (int i = 0; i < kQueries; ++i)
    for (int c = 0; c < kChunks; ++c)
      _mm512_mask_storeu_ps(queries[i].out + d + c * 16, lanes_of(c), part[i][c]);
}

template <int kQueries>
inline void AddValues(const SpanBlocks& span, int dim, const Softmax* softmax, const Query* queries,
                      Fetch& fetch) {
  int d = 0;
  for (; d + 64 <= dim; d += 64) AddChunks<kQueries, 4>(span, dim, d, 0xffff, softmax, queries, fetch);
  for (; d < dim; d += 16) AddChunks<kQueries, 1>(span, dim, d, FirstLanes(dim - d), softmax, queries, fetch);
}

// One span. Its queries are several heads of a few rows: those of a row see the same tokens.
template <int kQueries>
void AttendSpan(const SpanBlocks& span, int begin, const Bf16 (*q)[kMaxHeadDim], int dim, float scale,
                const Query* queries, Softmax* softmax, Fetch& values_here, Fetch& keys_next) {
  for (int i = 0; i < kQueries; ++i) {
    softmax[i].first = std::max(0, queries[i].first - begin);
    softmax[i].seen = std::min(kSpan, queries[i].tokens - begin);
  }
  ScoreSpan<kQueries>(span, q, dim, scale * kLog2E, softmax, values_here);
  for (int i = 0; i < kQueries;) {
    const Softmax& s = softmax[i];
    const auto alike = [&](int j) {
      return j < kQueries && softmax[j].first == s.first && softmax[j].seen == s.seen;
    };
    if (s.first >= s.seen) {
      ++i;
    } else if (kQueries == 4 && alike(i + 1) && alike(i + 2) && alike(i + 3)) {
      AddValues<kQueries>(span, dim, softmax + i, queries + i, keys_next);
      i += 4;
    } else if (kQueries >= 2 && alike(i + 1)) {
      AddValues<2>(span, dim, softmax + i, queries + i, keys_next);
      i += 2;
    } else {
      AddValues<1>(span, dim, softmax + i, queries + i, keys_next);
      ++i;
    }
  }
}

// Where a unit's blocks begin and end: the tokens that some query of it sees.
struct Reach {
  int first, tokens;
  explicit Reach(const AttendUnit& unit) : first(unit.queries[0].first), tokens(0) {
    for (int i = 0; i < unit.count; ++i) {
      first = std::min(first, unit.queries[i].first);
      tokens = std::max(tokens, unit.queries[i].tokens);
    }
  }
  int Begin() const { return first / kSpan * kSpan; }
};

// `next`: the unit after this one, or null.
void AttendUnitSpans(const KvCache& cache, int layer, const AttendUnit& unit, const AttendUnit* next,
                     float scale) {
  const KvLayout& kv = cache.layout;
  const int dim = kv.head_dim, count = unit.count;
  const std::size_t bytes = kv.HeadBytes();
  alignas(64) Bf16 q[kUnitQueries][kMaxHeadDim];
  Softmax softmax[kUnitQueries];
  for (int i = 0; i < count; ++i) {
    const Query& query = unit.queries[i];
    ToActivation(query.q, dim, q[i]);
    std::memset(query.out, 0, std::size_t(dim) * sizeof(float));
    softmax[i].largest = query.sink * kLog2E;
    softmax[i].sum = query.sink == -std::numeric_limits<float>::infinity() ? 0.0F : 1.0F;
  }
  const Reach reach(unit);
  SpanBlocks span = SpanAt(cache, layer, unit, reach.Begin(), reach.first, reach.tokens);
  for (int begin = reach.Begin(); begin < reach.tokens; begin += kSpan) {
    SpanBlocks after;
    if (begin + kSpan < reach.tokens) {
      after = SpanAt(cache, layer, unit, begin + kSpan, reach.first, reach.tokens);
    } else if (next != nullptr) {
      const Reach beyond(*next);
      after = SpanAt(cache, layer, *next, beyond.Begin(), beyond.first, beyond.tokens);
    }
    Fetch values_here(span.values + span.first, span.count - span.first, bytes, (dim + 15) / 16);
    Fetch keys_next(after.keys + after.first, after.count - after.first, bytes,
                    (span.count - span.first) * ((dim + 63) / 64));
    for (int i = 0; i < count;) {
      const int left = count - i;
      if (left >= 4) {
        AttendSpan<4>(span, begin, q + i, dim, scale, unit.queries + i, softmax + i, values_here, keys_next);
        i += 4;
      } else if (left >= 2) {
        AttendSpan<2>(span, begin, q + i, dim, scale, unit.queries + i, softmax + i, values_here, keys_next);
        i += 2;
      } else {
        AttendSpan<1>(span, begin, q + i, dim, scale, unit.queries + i, softmax + i, values_here, keys_next);
        i += 1;
      }
    }
    span = after;
  }
  for (int i = 0; i < count; ++i) {
    const float inverse = 1.0F / softmax[i].sum;
    for (int d = 0; d < dim; ++d) unit.queries[i].out[d] *= inverse;
  }
}

void Attend(const KvCache& cache, int layer, const AttendUnit* units, int count, float scale) {
  if (cache.layout.latent_values > 0) return AttendLatents(cache, layer, units, count, scale);
  for (int u = 0; u < count; ++u)
    AttendUnitSpans(cache, layer, units[u], u + 1 < count ? &units[u + 1] : nullptr, scale);
}

}  // namespace
}  // namespace elasticmoe::compute
