// Attention over latents (forward_latent.cc) of the AVX512 tables: up to 64 queries of a sequence, of however
// many units, over spans of 64 tokens: each block is read from memory once for all of them, and the next ones
// are fetched meanwhile.
//
// A block: [head_dim / 8][16 tokens][8] bf16; of what eights leave, [head_dim % 8 / 2][16 tokens][2]. So a
// register is eight dims of four tokens, which serves both uses: as keys, with eight of q to each of the four
// (four partial sums a token, added up once a block), and as values, which two shuffles turn into pairs of
// tokens side by side. Those are made once for all queries, 64 dims at a time, while they stay in L1.
//
// Spans begin at multiples of 64 tokens of the sequence, a softmax is brought up to date once a span, and
// sums run in the order of tokens: the same bits whatever shares the call.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "compute/kernels.h"
#include "compute/simd_avx512.h"
#include "compute/softmax_avx512.h"

namespace elasticmoe::compute {
namespace {

constexpr int kEight = 8;
constexpr int kEightOfBlock = kEight * kBlockTokens;  // elements
constexpr int kQuads = kBlockTokens / 4;              // registers that hold eight dims of a block
constexpr int kLatentTile = 4;                        // queries: 4 x 4 sums, keys and q fit the 32 registers
constexpr int kPairDims = 64;                         // of values at a time: 8 KiB of pairs

// Where element `d` of the token in `slot` lies in a block's layer.
[[gnu::always_inline]] inline int LatentAt(int dim, int slot, int d) {
  const int whole = dim / kEight * kEight;
  if (d < whole) return d / kEight * kEightOfBlock + slot * kEight + d % kEight;
  return whole * kBlockTokens + ((d - whole) / 2 * kBlockTokens + slot) * 2 + d % 2;
}

void StoreLatent(const KvLayout& kv, int layer, int slot, const float* latent, std::byte* block) {
  auto* out = reinterpret_cast<Bf16*>(block + layer * kv.LayerBytes());
  for (int d = 0; d < kv.head_dim; ++d) out[LatentAt(kv.head_dim, slot, d)] = ToBf16(latent[d]);
}

// Queries that see the same tokens of one sequence: query `first` of `units` and what follows, some of it in
// further units.
struct LatentRun {
  static constexpr int kMost = 64;  // at 16, one after the other, 128 heads would read 12 GB/s a thread

  const AttendUnit* units;
  int first;
  int count = 0;
  const AttendUnit* end_unit;  // where the next run begins
  int end;

  // REQUIRES: unit < last, begin < unit->count.
  LatentRun(const AttendUnit* unit, int begin, const AttendUnit* last)
      : units(unit), first(begin), end_unit(unit), end(begin) {
    while (count < kMost && end_unit < last && end_unit->block_table == units->block_table &&
           end_unit->queries[end].tokens == Tokens()) {
      ++count;
      if (++end == end_unit->count) ++end_unit, end = 0;
    }
  }
  int Tokens() const { return units->queries[first].tokens; }
};

struct LatentSpan {
  const Bf16* blocks[kSpanBlocks];
  int count = 0;
};

// The span that begins with token `begin` of a sequence of `tokens`.
LatentSpan LatentSpanAt(const KvCache& cache, int layer, const std::uint32_t* block_table, int begin,
                        int tokens) {
  LatentSpan span;
  for (; span.count < kSpanBlocks && begin < tokens; begin += kBlockTokens)
    span.blocks[span.count++] = reinterpret_cast<const Bf16*>(cache.Block(block_table[begin / kBlockTokens]) +
                                                              layer * cache.layout.LayerBytes());
  return span;
}

// Of the present run, 180 KiB.
struct alignas(64) LatentScratch {
  int count;                                 // queries
  int stride;                                // of q
  Bf16 q[LatentRun::kMost * kMaxLatentDim];  // [count][stride]
  float* out[LatentRun::kMost];
  __m512 scores[LatentRun::kMost][kSpanBlocks];
  Bf16 pairs[kSpan / 2][kPairDims * 2];  // [pairs of tokens][dims][2]
  Softmax softmax[LatentRun::kMost];
};

// Lane i = the sum of the four lanes that belong to token i.
[[gnu::always_inline]] inline __m512 AddFours(const __m512 (&quads)[kQuads]) {
  const auto halves = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  };
  const __m512d low = _mm512_castps_pd(halves(quads[0], quads[1]));
  const __m512d high = _mm512_castps_pd(halves(quads[2], quads[3]));
  const __m512 across = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                                      _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_ps(order, across);
}

// scores[i][block] = q[i] . the tokens of a block.
template <int kQueries>
inline void ScoreLatents(const Bf16* keys, int dim, const Bf16* q, int stride, int block,
                         __m512 (*scores)[kSpanBlocks]) {
  __m512 acc[kQueries][kQuads];
#pragma GCC unroll 4
  for (int i = 0; i < kQueries; ++i)
    for (int a = 0; a < kQuads; ++a) acc[i][a] = _mm512_setzero_ps();
  int d = 0;
  for (; d + kEight <= dim; d += kEight, keys += kEightOfBlock) {
    __m512i key[kQuads];
    for (int a = 0; a < kQuads; ++a) key[a] = _mm512_loadu_si512(keys + a * 32);
#pragma GCC unroll 4
    for (int i = 0; i < kQueries; ++i) {
      const __m512i eight = _mm512_broadcast_i32x4(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(q + std::size_t(i) * stride + d)));
      for (int a = 0; a < kQuads; ++a) acc[i][a] = DotBf16(acc[i][a], key[a], eight);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kQueries; ++i) {
    __m512 sum = AddFours(acc[i]);
    for (int rest = d; rest < dim; rest += 2) {
      std::uint32_t both;
      std::memcpy(&both, q + std::size_t(i) * stride + rest, 4);
      sum = DotBf16(sum, _mm512_loadu_si512(keys + (rest - d) * kBlockTokens),
                    _mm512_set1_epi32(static_cast<int>(both)));
    }
    scores[i][block] = sum;
  }
}

// Values [d, d + dims) of the span's tokens, in pairs of tokens. What stands behind the last token stays
// what it was, in its half of a pair.
void PairValues(const LatentSpan& span, int dim, int d, int dims, Bf16 (*pairs)[kPairDims * 2]) {
  alignas(64) static constexpr std::uint16_t kFirst[32] = {0,  8,  1,  9,  2,  10, 3,  11, 4,  12, 5,
                                                           13, 6,  14, 7,  15, 32, 40, 33, 41, 34, 42,
                                                           35, 43, 36, 44, 37, 45, 38, 46, 39, 47};
  const __m512i first = _mm512_load_si512(kFirst);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  for (int b = 0; b < span.count; ++b, pairs += kBlockTokens / 2) {
    const Bf16* values = span.blocks[b] + d * kBlockTokens;
    int at = 0;
    for (; at + 16 <= dims; at += 16, values += 2 * kEightOfBlock) {
      for (int a = 0; a < kQuads; ++a) {
        const __m512i x = _mm512_loadu_si512(values + a * 32);
        const __m512i y = _mm512_loadu_si512(values + kEightOfBlock + a * 32);
        _mm512_store_si512(pairs[2 * a] + at * 2, _mm512_permutex2var_epi16(x, first, y));
        _mm512_store_si512(pairs[2 * a + 1] + at * 2, _mm512_permutex2var_epi16(x, second, y));
      }
    }
    for (; at < dims; ++at)
      for (int t = 0; t < kBlockTokens; ++t)
        pairs[t / 2][at * 2 + t % 2] = span.blocks[b][LatentAt(dim, t, d + at)];
  }
}

// out[d, d + 16 kChunks) = that * rescale + the weighted values, which begin at `pairs`. `lanes`: of the last
// chunk.
template <int kQueries, int kChunks>
inline void AddPairs(const Bf16* pairs, int d, __mmask16 lanes, const Softmax* softmax, float* const* out,
                     Fetch& fetch) {
  const auto lanes_of = [&](int chunk) { return chunk + 1 < kChunks ? __mmask16(0xffff) : lanes; };
  __m512 part[kQueries][kChunks];
#pragma GCC unroll 4
  for (int i = 0; i < kQueries; ++i)
    for (int c = 0; c < kChunks; ++c)
      part[i][c] = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes_of(c), out[i] + d + c * 16),
                                 _mm512_set1_ps(softmax[i].rescale));
  const auto add_pair = [&](int token, __m512i present) {
    __m512i pair[kChunks];
    for (int c = 0; c < kChunks; ++c)
      pair[c] = _mm512_and_si512(_mm512_load_si512(pairs + token * kPairDims + c * 32), present);
#pragma GCC unroll 4
    for (int i = 0; i < kQueries; ++i) {
      std::uint32_t both;
      std::memcpy(&both, softmax[i].weights + token, 4);
      const __m512i weights = _mm512_set1_epi32(static_cast<int>(both));
      for (int c = 0; c < kChunks; ++c) part[i][c] = DotBf16(part[i][c], pair[c], weights);
    }
  };
  const int seen = softmax[0].seen;
  int t = 0;
  while (t + 2 <= seen) {
    fetch.Some();
    const int end = std::min(seen, t + kBlockTokens);
    for (; t + 2 <= end; t += 2) add_pair(t, _mm512_set1_epi32(-1));
  }
  if (t < seen) add_pair(t, _mm512_set1_epi32(0xffff));  // what stands behind never enters
#pragma GCC unroll 4
  for (int i = 0; i < kQueries; ++i)
    for (int c = 0; c < kChunks; ++c) _mm512_mask_storeu_ps(out[i] + d + c * 16, lanes_of(c), part[i][c]);
}

// One span, of which the run sees `seen` tokens.
void AttendLatentSpan(const LatentSpan& span, const KvLayout& kv, int seen, float scale,
                      LatentScratch& scratch, Fetch& next) {
  const int dim = kv.head_dim, values = kv.latent_values, stride = scratch.stride;
  for (int b = 0; b < span.count; ++b)
    ForTiles<kLatentTile>(scratch.count, [&](int first, auto count, bool) {
      ScoreLatents<count()>(span.blocks[b], dim, scratch.q + std::size_t(first) * stride, stride, b,
                            scratch.scores + first);
    });
  for (int i = 0; i < scratch.count; ++i) {
    scratch.softmax[i].seen = seen;
    ForRows<kSpanBlocks>(span.count, [&](auto blocks) {
      Advance<blocks()>(scratch.scores[i], 0, scale * kLog2E, scratch.softmax[i]);
    });
  }
  for (int d = 0; d < values; d += kPairDims) {
    const int dims = std::min(kPairDims, values - d);
    PairValues(span, dim, d, dims, scratch.pairs);
    ForTiles<kLatentTile>(scratch.count, [&](int first, auto count, bool) {
      const Softmax* softmax = scratch.softmax + first;
      float* const* out = scratch.out + first;
      if (dims == kPairDims)
        return AddPairs<count(), kPairDims / 16>(scratch.pairs[0], d, 0xffff, softmax, out, next);
      for (int at = 0; at < dims; at += 16)
        AddPairs<count(), 1>(scratch.pairs[0] + at * 2, d + at, FirstLanes(dims - at), softmax, out, next);
    });
  }
}

// `after`: what is attended to after this run, or null.
void AttendLatentRun(const KvCache& cache, int layer, const LatentRun& run, const LatentRun* after,
                     float scale, LatentScratch& scratch) {
  const KvLayout& kv = cache.layout;
  const int dim = kv.head_dim, values = kv.latent_values, tokens = run.Tokens();
  scratch.count = run.count;
  scratch.stride = (dim + 31) / 32 * 32;
  const AttendUnit* unit = run.units;
  for (int i = 0, at = run.first; i < run.count; ++i) {
    const Query& query = unit->queries[at];
    if (++at == unit->count) ++unit, at = 0;
    Bf16* q = scratch.q + std::size_t(i) * scratch.stride;
    for (int d = 0; d < dim; d += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + d),
                          Bf16Of(_mm512_maskz_loadu_ps(FirstLanes(dim - d), query.q + d)));
    scratch.out[i] = query.out;
    std::memset(query.out, 0, std::size_t(values) * sizeof(float));
    scratch.softmax[i].first = 0;
    scratch.softmax[i].largest = -std::numeric_limits<float>::infinity();
    scratch.softmax[i].sum = 0;
  }
  const int tiles = (run.count + kLatentTile - 1) / kLatentTile;
  LatentSpan span = LatentSpanAt(cache, layer, run.units->block_table, 0, tokens);
  for (int begin = 0; begin < tokens; begin += kSpan) {
    LatentSpan next;
    if (begin + kSpan < tokens) {
      next = LatentSpanAt(cache, layer, run.units->block_table, begin + kSpan, tokens);
    } else if (after != nullptr) {
      next = LatentSpanAt(cache, layer, after->units->block_table, 0, after->Tokens());
    }
    Fetch fetch(next.blocks, next.count, kv.LayerBytes(),
                span.count * tiles * ((values + kPairDims - 1) / kPairDims));
    AttendLatentSpan(span, kv, std::min(kSpan, tokens - begin), scale, scratch, fetch);
    span = next;
  }
  for (int i = 0; i < run.count; ++i) {
    const float inverse = 1.0F / scratch.softmax[i].sum;
    for (int d = 0; d < values; ++d) scratch.out[i][d] *= inverse;
  }
}

// As Kernels::attend.
void AttendLatents(const KvCache& cache, int layer, const AttendUnit* units, int count, float scale) {
  const AttendUnit* const last = units + count;
  LatentScratch scratch;
  for (LatentRun run(units, 0, last);;) {
    if (run.end_unit == last) return AttendLatentRun(cache, layer, run, nullptr, scale, scratch);
    const LatentRun after(run.end_unit, run.end, last);
    AttendLatentRun(cache, layer, run, &after, scale, scratch);
    run = after;
  }
}

}  // namespace
}  // namespace elasticmoe::compute
