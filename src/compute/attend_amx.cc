// Attention on AMX tiles (over latents as the AVX512-BF16 table's): 16 queries side by side over 64 tokens at
// a time, scores and weighted values by TDPBF16PS, softmax in between by AVX512. The weights are taken as the
// sum of two bf16, so that no more is lost than float32 rounding loses.
//
// K of a block: [head_dim / 2][16 tokens][2] bf16 (16 pairs of a dot product are a tile); V: [8 pairs of
// tokens] [head_dim][2] bf16.
#include <algorithm>
#include <cstring>
#include <limits>

#include "compute/amx_tiles.h"
#include "compute/kernel_tables.h"
#include "compute/simd_avx512.h"

namespace elasticmoe::compute {
namespace {

constexpr int kQueries = kUnitQueries;
constexpr int kSpanBlocks = 4;
constexpr int kSpan = kSpanBlocks * kBlockTokens;  // tokens between two updates of the softmax
constexpr int kTileDim = 32;                       // of q and k: 64 bytes of bf16
constexpr int kValueDim = 16;                      // of v: 64 bytes of pairs

Bf16* KeyOf(const KvLayout& kv, int layer, int head, std::byte* block) {
  return reinterpret_cast<Bf16*>(block + kv.KeyOffset(layer, head));
}
Bf16* ValueOf(const KvLayout& kv, int layer, int head, std::byte* block) {
  return reinterpret_cast<Bf16*>(block + kv.ValueOffset(layer, head));
}

void StoreKv(const KvLayout& kv, int layer, int slot, const float* k, const float* v, std::byte* block) {
  if (kv.latent_values > 0) return Avx512Bf16Kernels().store_kv(kv, layer, slot, k, v, block);
  for (int head = 0; head < kv.kv_heads; ++head) {
    Bf16* keys = KeyOf(kv, layer, head, block);
    Bf16* values = ValueOf(kv, layer, head, block);
    const int begin = head * kv.head_dim;
    for (int d = 0; d < kv.head_dim; ++d) {
      keys[(d / 2 * kBlockTokens + slot) * 2 + d % 2] = ToBf16(k[begin + d]);
      values[(slot / 2 * kv.head_dim + d) * 2 + slot % 2] = ToBf16(v[begin + d]);
    }
  }
}

// Tiles 0-3: sums; 4: q, 5: k, 6: weights, 7: v.
void Configure(int queries) {
  TileConfig config;
  for (const int tile : {0, 1, 2, 3, 4}) config.Shape(tile, queries, 64);
  config.Shape(5, 16, 64);
  config.Shape(6, queries, kBlockTokens * sizeof(Bf16));
  config.Shape(7, kBlockTokens / 2, 64);
  config.Load();
}

// v of one block where a tile may not read it as it lies.
using ValueTile = Bf16[kBlockTokens / 2][(kMaxHeadDim + kValueDim) * 2];

struct alignas(64) Scratch {
  Bf16 q[kQueries][kMaxHeadDim];
  float scores[kSpanBlocks][kQueries][kBlockTokens];
  Bf16 high[kSpanBlocks][kQueries][kBlockTokens];  // weights = high + low
  Bf16 low[kSpanBlocks][kQueries][kBlockTokens];
  float sums[2][kQueries][kValueDim];
  Bf16 key_tail[16][kBlockTokens * 2];  // k where a tile of it ends early
  // v of a block that ends early, or of all where head_dim does.
  ValueTile values[kSpanBlocks];
};

// The running softmax of one query.
struct Softmax {
  float largest = 0;
  float sum = 0;
  float rescale = 1;  // of what earlier spans left in the output
};

// A block's K or V of one head is a few KiB somewhere in memory: too short for the machine to see it coming.
inline void Prefetch(const Bf16* from, std::size_t bytes) {
  for (std::size_t line = 0; line < bytes; line += 64)
    _mm_prefetch(reinterpret_cast<const char*>(from) + line, _MM_HINT_T0);
}

// scores[block] = q . k of a block, unscaled.
void Score(const Bf16* keys, int dim, Scratch& scratch, int block) {
  constexpr int kKeyBytes = kBlockTokens * 2 * sizeof(Bf16);
  const int whole = dim / kTileDim;
  _tile_zero(0);
  for (int i = 0; i < whole; ++i) {
    _tile_loadd(4, &scratch.q[0][i * kTileDim], sizeof(scratch.q[0]));
    _tile_loadd(5, keys + std::size_t(i) * kTileDim * kBlockTokens, kKeyBytes);
    _tile_dpbf16ps(0, 4, 5);
  }
  if (const int left = dim % kTileDim; left != 0) {  // q goes on with zeros
    std::memset(scratch.key_tail, 0, sizeof(scratch.key_tail));
    std::memcpy(scratch.key_tail, keys + std::size_t(whole) * kTileDim * kBlockTokens,
                std::size_t(left) * kBlockTokens * sizeof(Bf16));
    Settle(&scratch);
    _tile_loadd(4, &scratch.q[0][whole * kTileDim], sizeof(scratch.q[0]));
    _tile_loadd(5, scratch.key_tail, kKeyBytes);
    _tile_dpbf16ps(0, 4, 5);
  }
  _tile_stored(0, scratch.scores[block], sizeof(scratch.scores[0][0]));
}

// Takes in the scores of a span of which query `i` sees tokens [first, count): weights, their sum, rescale.
// The other lanes hold anything, NaN included: they never enter.
void Advance(int i, int first_block, int blocks, int first, int count, float scale, Scratch& scratch,
             Softmax& softmax) {
  __m512 scores[kSpanBlocks];
  __mmask16 valid[kSpanBlocks];
  __m512 most = _mm512_set1_ps(softmax.largest);
  const __m512 factor = _mm512_set1_ps(scale);
  for (int b = first_block; b < blocks; ++b) {
    const int begin = b * kBlockTokens;
    valid[b] = static_cast<__mmask16>(FirstLanes(std::max(0, count - begin)) &
                                      ~FirstLanes(std::max(0, first - begin)));
    scores[b] = _mm512_mul_ps(_mm512_load_ps(scratch.scores[b][i]), factor);
    most = _mm512_mask_max_ps(most, valid[b], most, scores[b]);
  }
  const float largest = _mm512_reduce_max_ps(most);
  const __m512 shift = _mm512_set1_ps(largest);
  __m512 sum = _mm512_setzero_ps();
  for (int b = first_block; b < blocks; ++b) {
    const __m512 p = _mm512_maskz_mov_ps(valid[b], Exp(_mm512_sub_ps(scores[b], shift)));
    const __m256i high = Bf16Of(p);
    const __m256i low = Bf16Of(_mm512_sub_ps(p, FloatOf(high)));
    _mm256_store_si256(reinterpret_cast<__m256i*>(scratch.high[b][i]), high);
    _mm256_store_si256(reinterpret_cast<__m256i*>(scratch.low[b][i]), low);
    sum = _mm512_add_ps(sum, p);
  }
  softmax.rescale = _mm512_cvtss_f32(Exp(_mm512_set1_ps(softmax.largest - largest)));
  softmax.sum = softmax.sum * softmax.rescale + _mm512_reduce_add_ps(sum);
  softmax.largest = largest;
}

// The span shows nothing to query `i`.
void Skip(int i, int blocks, Scratch& scratch, Softmax& softmax) {
  softmax.rescale = 1;
  for (int b = 0; b < blocks; ++b) {
    std::memset(scratch.high[b][i], 0, sizeof(scratch.high[b][i]));
    std::memset(scratch.low[b][i], 0, sizeof(scratch.low[b][i]));
  }
}

// out = out * rescale + weights x values, for all queries.
// Meanwhile the next span's keys are fetched.
void AddValues(const Bf16* const* values, const int* strides, const Bf16* const* next_keys, int next_blocks,
               int first_block, int blocks, int dim, Scratch& scratch, const Softmax* softmax,
               const Query* queries, int count) {
  Settle(&scratch);
  const int tiles = (dim + kValueDim - 1) / kValueDim;
  const auto multiply = [&](int tile) {
    _tile_zero(0);
    for (int b = first_block; b < blocks; ++b) {
      _tile_loadd(7, values[b] + tile * kValueDim * 2, strides[b]);
      _tile_loadd(6, scratch.high[b], sizeof(scratch.high[0][0]));
      _tile_dpbf16ps(0, 6, 7);
      _tile_loadd(6, scratch.low[b], sizeof(scratch.low[0][0]));
      _tile_dpbf16ps(0, 6, 7);
    }
    _tile_stored(0, scratch.sums[tile % 2], sizeof(scratch.sums[0][0]));
  };
  multiply(0);
  for (int tile = 0; tile < tiles; ++tile) {
    // One behind: tile stores are slow to be read back.
    if (tile + 1 < tiles) multiply(tile + 1);
    for (int b = 0; b < next_blocks; ++b)
      Prefetch(next_keys[b] + std::size_t(tile) * kValueDim * kBlockTokens,
               kValueDim * kBlockTokens * sizeof(Bf16));
    const __mmask16 lanes = FirstLanes(dim - tile * kValueDim);
    for (int i = 0; i < count; ++i) {
      float* out = queries[i].out + tile * kValueDim;
      const __m512 before = _mm512_maskz_loadu_ps(lanes, out);
      _mm512_mask_storeu_ps(out, lanes,
                            _mm512_fmadd_ps(before, _mm512_set1_ps(softmax[i].rescale),
                                            _mm512_load_ps(scratch.sums[tile % 2][i])));
    }
  }
}

// The first `tokens` of a block's values, zeros after them and after `dim`: what lies there must not meet a
// tile.
void CopyValues(const Bf16* from, int tokens, int dim, ValueTile& to) {
  const std::size_t row = std::size_t(dim) * 2 * sizeof(Bf16);
  for (int pair = 0; pair < kBlockTokens / 2; ++pair) {
    const int present = std::clamp(tokens - 2 * pair, 0, 2);
    std::memset(to[pair] + dim * 2, 0, kValueDim * 2 * sizeof(Bf16));
    if (present == 0) {
      std::memset(to[pair], 0, row);
      continue;
    }
    std::memcpy(to[pair], from + std::size_t(pair) * dim * 2, row);
    if (present == 1)
      for (int d = 0; d < dim; ++d) to[pair][d * 2 + 1] = 0;
  }
}

// Up to kQueries queries.
void AttendTile(const KvCache& cache, int layer, int kv_head, const std::uint32_t* block_table,
                const Query* queries, int count, float scale) {
  const KvLayout& kv = cache.layout;
  const int dim = kv.head_dim;
  Scratch scratch;
  Softmax softmax[kQueries];
  int tokens = 0, first = queries[0].first;
  const int padded = (dim + kTileDim - 1) / kTileDim * kTileDim;
  for (int i = 0; i < count; ++i) {
    for (int d = 0; d < padded; d += 16) {
      const __m512 q = _mm512_maskz_loadu_ps(FirstLanes(std::max(0, dim - d)), queries[i].q + d);
      _mm256_store_si256(reinterpret_cast<__m256i*>(&scratch.q[i][d]), Bf16Of(q));
    }
    std::memset(queries[i].out, 0, std::size_t(dim) * sizeof(float));
    tokens = std::max(tokens, queries[i].tokens);
    first = std::min(first, queries[i].first);
    softmax[i].largest = queries[i].sink;
    softmax[i].sum = queries[i].sink == -std::numeric_limits<float>::infinity() ? 0.0F : 1.0F;
  }
  Settle(&scratch);
  Configure(count);
  for (int begin = first / kSpan * kSpan; begin < tokens; begin += kSpan) {
    const int blocks = std::min(kSpanBlocks, (tokens - begin + kBlockTokens - 1) / kBlockTokens);
    const int first_block = std::max(0, first - begin) / kBlockTokens;  // what no query sees is not touched
    const Bf16* values[kSpanBlocks];
    int strides[kSpanBlocks];
    for (int b = first_block; b < blocks; ++b) {
      std::byte* block = cache.Block(block_table[begin / kBlockTokens + b]);
      values[b] = ValueOf(kv, layer, kv_head, block);
      Prefetch(values[b], kv.HeadBytes());
      Score(KeyOf(kv, layer, kv_head, block), dim, scratch, b);
      strides[b] = dim * 2 * static_cast<int>(sizeof(Bf16));
      const int present = std::min(kBlockTokens, tokens - begin - b * kBlockTokens);
      if (present < kBlockTokens || dim % kValueDim != 0) {
        CopyValues(values[b], present, dim, scratch.values[b]);
        values[b] = scratch.values[b][0];
        strides[b] = sizeof(scratch.values[b][0]);
      }
    }
    for (int i = 0; i < count; ++i) {
      const int seen = std::min(kSpan, queries[i].tokens - begin);
      const int hidden = std::max(0, queries[i].first - begin);
      if (hidden < seen) {
        Advance(i, first_block, blocks, hidden, seen, scale, scratch, softmax[i]);
      } else {
        Skip(i, blocks, scratch, softmax[i]);
      }
    }
    const Bf16* next_keys[kSpanBlocks];
    int next_blocks = 0;
    for (int next = begin + kSpan; next < tokens && next_blocks < kSpanBlocks; next += kBlockTokens)
      next_keys[next_blocks++] = KeyOf(kv, layer, kv_head, cache.Block(block_table[next / kBlockTokens]));
    AddValues(values, strides, next_keys, next_blocks, first_block, blocks, dim, scratch, softmax, queries,
              count);
  }
  _tile_release();
  for (int i = 0; i < count; ++i) {
    const float inverse = 1.0F / softmax[i].sum;
    for (int d = 0; d < dim; ++d) queries[i].out[d] *= inverse;
  }
}

void Attend(const KvCache& cache, int layer, const AttendUnit* units, int count, float scale) {
  if (cache.layout.latent_values > 0) return Avx512Bf16Kernels().attend(cache, layer, units, count, scale);
  for (int u = 0; u < count; ++u)
    AttendTile(cache, layer, units[u].kv_head, units[u].block_table, units[u].queries, units[u].count, scale);
}

}  // namespace

AttentionKernels AmxAttention() {
  return {StoreKv, Attend};
}

}  // namespace elasticmoe::compute
