// The AVX512 tables, for kernels_avx512.cc and kernels_avx512bf16.cc to compile: activations bf16, products
// by VDPBF16PS where the machine has it, else two multiplications of float32. A panel's 32 outputs are two
// registers; each output is one lane that adds its pairs of inputs front to back, for one row as for twelve.
//
// K of a block: [head_dim / 2][16 tokens][2] bf16 (16 tokens = 16 lanes of one dot product); V: [16
// tokens][head_dim] bf16.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "compute/attend_latent.h"
#include "compute/kernel_tables.h"
#include "compute/simd_avx512.h"

namespace elasticmoe::compute {
namespace {

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

// The pair of inputs (2 pair, 2 pair + 1) in every lane; a missing last input is zero.
inline __m512i PairOf(const Bf16* x, int pair, int k) {
  std::uint32_t both;
  if (2 * pair + 1 < k) {
    std::memcpy(&both, x + 2 * pair, 4);
  } else {
    both = x[2 * pair];
  }
  return _mm512_set1_epi32(static_cast<int>(both));
}

// Rows x panels of one tile: acc[row][panel][2 registers]. All loops over constants are unrolled.
template <int kRows, int kPanels>
inline void Accumulate(const Bf16* const (&w)[kPanels], const Bf16* const* x, int k,
                       __m512 (&acc)[kRows][kPanels][2]) {
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kPanels; ++p) acc[r][p][0] = acc[r][p][1] = _mm512_setzero_ps();
  const int pairs = k / 2;
  for (int i = 0; i < pairs; ++i) {
    __m512i weights[kPanels][2];
    for (int p = 0; p < kPanels; ++p) {
      const Bf16* at = w[p] + std::size_t(i) * kPanel * 2;
      weights[p][0] = _mm512_loadu_si512(at);
      weights[p][1] = _mm512_loadu_si512(at + 32);
      if constexpr (kRows <= 4) {
        _mm_prefetch(reinterpret_cast<const char*>(at) + 2048, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(at) + 2112, _MM_HINT_T0);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      std::uint32_t both;
      std::memcpy(&both, x[r] + 2 * i, 4);
      const __m512i pair = _mm512_set1_epi32(static_cast<int>(both));
      for (int p = 0; p < kPanels; ++p) {
        acc[r][p][0] = DotBf16(acc[r][p][0], weights[p][0], pair);
        acc[r][p][1] = DotBf16(acc[r][p][1], weights[p][1], pair);
      }
    }
  }
  if (k % 2 != 0) {
    for (int r = 0; r < kRows; ++r) {
      const __m512i pair = PairOf(x[r], pairs, k);
      for (int p = 0; p < kPanels; ++p) {
        const Bf16* at = w[p] + std::size_t(pairs) * kPanel * 2;
        acc[r][p][0] = DotBf16(acc[r][p][0], _mm512_loadu_si512(at), pair);
        acc[r][p][1] = DotBf16(acc[r][p][1], _mm512_loadu_si512(at + 32), pair);
      }
    }
  }
}

inline void StorePanel(float* out, int n, int panel, const __m512 (&acc)[2]) {
  for (int half = 0; half < 2; ++half) {
    const int begin = panel * kPanel + half * 16;
    if (begin + 16 <= n) {
      _mm512_storeu_ps(out + begin, acc[half]);
    } else if (begin < n) {
      _mm512_mask_storeu_ps(out + begin, static_cast<__mmask16>((1u << (n - begin)) - 1), acc[half]);
    }
  }
}

template <int kRows, int kPanels>
void MatmulTile(const PackedMatrix& w, const void* const* rows, int panel, float* const* out) {
  const Bf16* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = static_cast<const Bf16*>(rows[r]);
  const Bf16* panels[kPanels];
  for (int p = 0; p < kPanels; ++p) panels[p] = PanelOf(w, panel + p);
  __m512 acc[kRows][kPanels][2];
  Accumulate<kRows, kPanels>(panels, x, w.k, acc);
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kPanels; ++p) StorePanel(out[r], w.n, panel + p, acc[r][p]);
}

template <int kRows>
void MatmulRows(const PackedMatrix& w, const void* const* rows, int panel_begin, int panel_end,
                float* const* out) {
  int panel = panel_begin;
  if constexpr (kRows <= 4)  // two panels at once: enough independent sums to hide the latency
    for (; panel + 2 <= panel_end; panel += 2) MatmulTile<kRows, 2>(w, rows, panel, out);
  for (; panel < panel_end; ++panel) MatmulTile<kRows, 1>(w, rows, panel, out);
}

// Rows a tile: 12 x 2 sums + 2 weights fit the 32 registers.
constexpr int kMatmulRows = 12;

void Matmul(const PackedMatrix& w, const void* const* rows, int m, int panel_begin, int panel_end,
            float* const* out) {
  if (m > kMatmulRows) {  // panel by panel, so that a panel stays in cache for all rows
    for (int panel = panel_begin; panel < panel_end; ++panel) {
      int r = 0;
      for (; r + kMatmulRows <= m; r += kMatmulRows) MatmulTile<kMatmulRows, 1>(w, rows + r, panel, out + r);
      if (r < m) Matmul(w, rows + r, m - r, panel, panel + 1, out + r);
    }
    return;
  }
  switch (m) {
    case 1:
      return MatmulRows<1>(w, rows, panel_begin, panel_end, out);
    case 2:
      return MatmulRows<2>(w, rows, panel_begin, panel_end, out);
    case 3:
      return MatmulRows<3>(w, rows, panel_begin, panel_end, out);
    case 4:
      return MatmulRows<4>(w, rows, panel_begin, panel_end, out);
    case 5:
      return MatmulRows<5>(w, rows, panel_begin, panel_end, out);
    case 6:
      return MatmulRows<6>(w, rows, panel_begin, panel_end, out);
    case 7:
      return MatmulRows<7>(w, rows, panel_begin, panel_end, out);
    case 8:
      return MatmulRows<8>(w, rows, panel_begin, panel_end, out);
    case 9:
      return MatmulRows<9>(w, rows, panel_begin, panel_end, out);
    case 10:
      return MatmulRows<10>(w, rows, panel_begin, panel_end, out);
    case 11:
      return MatmulRows<11>(w, rows, panel_begin, panel_end, out);
    case 12:
      return MatmulRows<12>(w, rows, panel_begin, panel_end, out);
    default:
      return;
  }
}

template <int kRows>
void GateUpTile(const PackedMatrix& gate, const PackedMatrix& up, const Activation& activation,
                const void* const* rows, int panel, void* const* out) {
  const Bf16* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = static_cast<const Bf16*>(rows[r]);
  const Bf16* panels[2] = {PanelOf(gate, panel), PanelOf(up, panel)};
  __m512 acc[kRows][2][2];
  Accumulate<kRows, 2>(panels, x, gate.k, acc);
  for (int r = 0; r < kRows; ++r) {
    for (int half = 0; half < 2; ++half)
      StoreActivated(activation, acc[r][0][half], acc[r][1][half], panel * kPanel + half * 16, gate.n,
                     static_cast<Bf16*>(out[r]));
  }
}

constexpr int kGateUpRows = 6;  // 6 x 4 sums + 4 weights

void GateUp(const PackedMatrix& gate, const PackedMatrix& up, const Activation& activation,
            const void* const* rows, int m, int panel_begin, int panel_end, void* const* out) {
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    for (int r = 0; r < m;) {
      const int left = std::min(kGateUpRows, m - r);
      switch (left) {
        case 1:
          GateUpTile<1>(gate, up, activation, rows + r, panel, out + r);
          break;
        case 2:
          GateUpTile<2>(gate, up, activation, rows + r, panel, out + r);
          break;
        case 3:
          GateUpTile<3>(gate, up, activation, rows + r, panel, out + r);
          break;
        case 4:
          GateUpTile<4>(gate, up, activation, rows + r, panel, out + r);
          break;
        case 5:
          GateUpTile<5>(gate, up, activation, rows + r, panel, out + r);
          break;
        default:
          GateUpTile<6>(gate, up, activation, rows + r, panel, out + r);
          break;
      }
      r += left;
    }
  }
}

// A tile of the router: each logit is one register of 16 partial sums, added up in one fixed tree.
template <int kRows, int kExperts>
void RouterTile(const float* x, const float* w, int experts, int hidden, float* logits) {
  __m512 acc[kRows][kExperts];
  for (int r = 0; r < kRows; ++r)
    for (int e = 0; e < kExperts; ++e) acc[r][e] = _mm512_setzero_ps();
  for (int i = 0; i < hidden; i += 16) {
    const __mmask16 lanes = FirstLanes(hidden - i);
    __m512 in[kRows];
    for (int r = 0; r < kRows; ++r) in[r] = _mm512_maskz_loadu_ps(lanes, x + std::size_t(r) * hidden + i);
    for (int e = 0; e < kExperts; ++e) {
      const __m512 weight = _mm512_maskz_loadu_ps(lanes, w + std::size_t(e) * hidden + i);
      for (int r = 0; r < kRows; ++r) acc[r][e] = _mm512_fmadd_ps(in[r], weight, acc[r][e]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int e = 0; e < kExperts; ++e) logits[std::size_t(r) * experts + e] = _mm512_reduce_add_ps(acc[r][e]);
}

template <int kRows>
void RouterRows(const float* x, const float* w, int experts, int hidden, float* logits) {
  int e = 0;
  for (; e + 4 <= experts; e += 4)
    RouterTile<kRows, 4>(x, w + std::size_t(e) * hidden, experts, hidden, logits + e);
  for (; e < experts; ++e) RouterTile<kRows, 1>(x, w + std::size_t(e) * hidden, experts, hidden, logits + e);
}

void Router(const float* x, int m, const float* w, int experts, int hidden, float* logits) {
  int r = 0;
  for (; r + 4 <= m; r += 4)
    RouterRows<4>(x + std::size_t(r) * hidden, w, experts, hidden, logits + std::size_t(r) * experts);
  for (; r < m; ++r)
    RouterRows<1>(x + std::size_t(r) * hidden, w, experts, hidden, logits + std::size_t(r) * experts);
}

Bf16* KeyOf(const KvLayout& kv, int layer, int head, std::byte* block) {
  return reinterpret_cast<Bf16*>(block + kv.KeyOffset(layer, head));
}
Bf16* ValueOf(const KvLayout& kv, int layer, int head, std::byte* block) {
  return reinterpret_cast<Bf16*>(block + kv.ValueOffset(layer, head));
}

void StoreKv(const KvLayout& kv, int layer, int slot, const float* k, const float* v, std::byte* block) {
  if (kv.latent_values > 0) return StoreLatent<Bf16>(kv, layer, slot, k, block);
  for (int head = 0; head < kv.kv_heads; ++head) {
    Bf16* keys = KeyOf(kv, layer, head, block);
    const float* key = k + head * kv.head_dim;
    for (int d = 0; d < kv.head_dim; ++d) keys[(d / 2 * kBlockTokens + slot) * 2 + d % 2] = ToBf16(key[d]);
    ToActivation(v + head * kv.head_dim, kv.head_dim, ValueOf(kv, layer, head, block) + slot * kv.head_dim);
  }
}

// The running softmax of one query.
struct Softmax {
  float largest = -std::numeric_limits<float>::infinity();
  float sum = 0;
  float rescale = 0;                        // of what earlier blocks left in the output
  alignas(64) float weights[kBlockTokens];  // of the present block's tokens
};

// Takes in the scores of a block of which the query sees tokens [first, count). The other lanes hold
// anything, NaN included: they never enter.
inline void Advance(__m512 scores, int first, int count, float scale, Softmax& softmax) {
  const auto valid = static_cast<__mmask16>(FirstLanes(count) & ~FirstLanes(first));
  scores = _mm512_mul_ps(scores, _mm512_set1_ps(scale));
  const float largest = std::max(softmax.largest, _mm512_mask_reduce_max_ps(valid, scores));
  const __m512 p = _mm512_maskz_mov_ps(valid, Exp(_mm512_sub_ps(scores, _mm512_set1_ps(largest))));
  softmax.rescale = _mm512_cvtss_f32(Exp(_mm512_set1_ps(softmax.largest - largest)));
  softmax.sum = softmax.sum * softmax.rescale + _mm512_reduce_add_ps(p);
  softmax.largest = largest;
  _mm512_store_ps(softmax.weights, p);
}

// out = out * rescale + the weighted values of `count` tokens, for queries that see as many.
template <int kQueries>
inline void AddValues(const Bf16* values, int dim, int count, const Softmax* softmax, const Query* queries) {
  for (int d = 0; d < dim; d += 16) {
    const __mmask16 lanes = FirstLanes(dim - d);
    __m512 part[kQueries];
    for (int i = 0; i < kQueries; ++i)
      part[i] =
          _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, queries[i].out + d), _mm512_set1_ps(softmax[i].rescale));
    for (int t = 0; t < count; ++t) {
      const __m512 value = FloatOf(_mm256_maskz_loadu_epi16(lanes, values + t * dim + d));
      for (int i = 0; i < kQueries; ++i)
        part[i] = _mm512_fmadd_ps(_mm512_set1_ps(softmax[i].weights[t]), value, part[i]);
    }
    for (int i = 0; i < kQueries; ++i) _mm512_mask_storeu_ps(queries[i].out + d, lanes, part[i]);
  }
}

// Queries side by side read each block once and hide each other's latencies.
template <int kQueries>
void AttendTile(const KvCache& cache, int layer, int kv_head, const std::uint32_t* block_table,
                const Query* queries, float scale) {
  const KvLayout& kv = cache.layout;
  const int dim = kv.head_dim;
  alignas(64) Bf16 in[kQueries][kMaxHeadDim];
  Softmax softmax[kQueries];
  int tokens = 0, first = queries[0].first;
  for (int i = 0; i < kQueries; ++i) {
    ToActivation(queries[i].q, dim, in[i]);
    std::memset(queries[i].out, 0, std::size_t(dim) * sizeof(float));
    tokens = std::max(tokens, queries[i].tokens);
    first = std::min(first, queries[i].first);
    softmax[i].largest = queries[i].sink;
    softmax[i].sum = queries[i].sink == -std::numeric_limits<float>::infinity() ? 0.0F : 1.0F;
  }
  for (int begin = first / kBlockTokens * kBlockTokens; begin < tokens; begin += kBlockTokens) {
    std::byte* block = cache.Block(block_table[begin / kBlockTokens]);
    const Bf16* keys = KeyOf(kv, layer, kv_head, block);
    const Bf16* values = ValueOf(kv, layer, kv_head, block);
    __m512 scores[kQueries];
    for (int i = 0; i < kQueries; ++i) scores[i] = _mm512_setzero_ps();
    for (int d = 0; d < dim; d += 2) {
      const __m512i key = _mm512_loadu_si512(keys + d * kBlockTokens);
      for (int i = 0; i < kQueries; ++i) {
        std::uint32_t both;
        std::memcpy(&both, in[i] + d, 4);
        scores[i] = DotBf16(scores[i], key, _mm512_set1_epi32(static_cast<int>(both)));
      }
    }
    int counts[kQueries];  // of tokens up to the last one that the query sees; 0 = none here
    bool whole = true;     // every query sees the whole block, or as much of it as the first one
    const int first_count = std::min(kBlockTokens, queries[0].tokens - begin);
    for (int i = 0; i < kQueries; ++i) {
      const int count = std::min(kBlockTokens, queries[i].tokens - begin);
      const int hidden = std::max(0, queries[i].first - begin);
      counts[i] = hidden < count ? count : 0;
      whole &= counts[i] > 0 && count == first_count;
      if (counts[i] > 0) Advance(scores[i], hidden, count, scale, softmax[i]);
    }
    if (whole) {
      AddValues<kQueries>(values, dim, first_count, softmax, queries);
      continue;
    }
    for (int i = 0; i < kQueries; ++i)
      if (counts[i] > 0) AddValues<1>(values, dim, counts[i], softmax + i, queries + i);
  }
  for (int i = 0; i < kQueries; ++i) {
    const float inverse = 1.0F / softmax[i].sum;
    for (int d = 0; d < dim; ++d) queries[i].out[d] *= inverse;
  }
}

void Attend(const KvCache& cache, int layer, int kv_head, const std::uint32_t* block_table,
            const Query* queries, int count, float scale) {
  if (cache.layout.latent_values > 0)
    return AttendLatent<Bf16>(cache, layer, block_table, queries, count, scale);
  int i = 0;
  for (; i + 8 <= count; i += 8) AttendTile<8>(cache, layer, kv_head, block_table, queries + i, scale);
  for (; i + 4 <= count; i += 4) AttendTile<4>(cache, layer, kv_head, block_table, queries + i, scale);
  for (; i + 2 <= count; i += 2) AttendTile<2>(cache, layer, kv_head, block_table, queries + i, scale);
  for (; i < count; ++i) AttendTile<1>(cache, layer, kv_head, block_table, queries + i, scale);
}

Kernels TableOf(std::string_view name, const QuantizedKernels& quantized) {
  return {name, 2, 2, false, ToActivation, Matmul, GateUp, Router, StoreKv, Attend, quantized};
}

}  // namespace
}  // namespace elasticmoe::compute
