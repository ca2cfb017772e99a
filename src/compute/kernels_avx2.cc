// AVX2 + FMA: activations bf16, widened to float32 on the way; for machines without AVX512-BF16. Each output
// is one lane that adds its inputs front to back (even, then odd input of a pair), whatever the number of
// rows.
//
// K of a block: [head_dim][16 tokens] bf16; V: [16 tokens][head_dim] bf16.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "compute/attend_latent_avx2.h"
#include "compute/kernel_tables.h"
#include "compute/simd_avx2.h"
#include "compute/softmax_avx2.h"

namespace elasticmoe::compute {
namespace {

void ToActivation(const float* in, int count, void* out) {
  for (int i = 0; i < count; ++i) static_cast<Bf16*>(out)[i] = ToBf16(in[i]);
}

constexpr int kVectors = kPanel / 8;

template <int kRows>
inline void Accumulate(const Bf16* w, const Bf16* const* x, int k, __m256 (&acc)[kRows][kVectors]) {
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm256_setzero_ps();
  for (int i = 0; i < k; i += 2) {
    const Bf16* at = w + std::size_t(i) * kPanel;
    __m256 even[kRows], odd[kRows];
    for (int r = 0; r < kRows; ++r) {
      even[r] = _mm256_set1_ps(ToFloat(x[r][i]));
      odd[r] = _mm256_set1_ps(i + 1 < k ? ToFloat(x[r][i + 1]) : 0.0F);
    }
    for (int v = 0; v < kVectors; ++v) {
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + v * 16));
      const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
      const __m256 second =
          _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
      for (int r = 0; r < kRows; ++r)
        acc[r][v] = _mm256_fmadd_ps(second, odd[r], _mm256_fmadd_ps(first, even[r], acc[r][v]));
    }
  }
}

inline const Bf16* PanelOf(const PackedMatrix& w, int panel) {
  return reinterpret_cast<const Bf16*>(w.Panel(panel));
}

template <int kRows>
void MatmulTile(const PackedMatrix& w, const void* const* rows, int panel, float* const* out) {
  const Bf16* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = static_cast<const Bf16*>(rows[r]);
  __m256 acc[kRows][kVectors];
  Accumulate<kRows>(PanelOf(w, panel), x, w.k, acc);
  for (int r = 0; r < kRows; ++r) {
    alignas(32) float values[kPanel];
    for (int v = 0; v < kVectors; ++v) _mm256_store_ps(values + v * 8, acc[r][v]);
    std::memcpy(out[r] + panel * kPanel, values,
                std::size_t(std::min(kPanel, w.n - panel * kPanel)) * sizeof(float));
  }
}

void Matmul(const PackedMatrix& w, const void* const* rows, int m, int panel_begin, int panel_end,
            float* const* out) {
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    int r = 0;
    for (; r + 2 <= m; r += 2) MatmulTile<2>(w, rows + r, panel, out + r);
    if (r < m) MatmulTile<1>(w, rows + r, panel, out + r);
  }
}

template <int kRows>
void GateUpTile(const PackedMatrix& gate, const PackedMatrix& up, const Activation& activation,
                const void* const* rows, int panel, void* const* out) {
  const Bf16* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = static_cast<const Bf16*>(rows[r]);
  __m256 g[kRows][kVectors], u[kRows][kVectors];
  Accumulate<kRows>(PanelOf(gate, panel), x, gate.k, g);
  Accumulate<kRows>(PanelOf(up, panel), x, up.k, u);
  for (int r = 0; r < kRows; ++r) {
    alignas(32) float values[kPanel];
    for (int v = 0; v < kVectors; ++v)
      _mm256_store_ps(values + v * 8,
                      Activated(activation, g[r][v], u[r][v], panel * kPanel + v * 8, gate.n));
    ToActivation(values, std::min(kPanel, gate.n - panel * kPanel),
                 static_cast<Bf16*>(out[r]) + panel * kPanel);
  }
}

void GateUp(const PackedMatrix& gate, const PackedMatrix& up, const Activation& activation,
            const void* const* rows, int m, int panel_begin, int panel_end, void* const* out) {
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    int r = 0;
    for (; r + 2 <= m; r += 2) GateUpTile<2>(gate, up, activation, rows + r, panel, out + r);
    if (r < m) GateUpTile<1>(gate, up, activation, rows + r, panel, out + r);
  }
}

template <int kRows>
void RouterRows(const float* x, const float* w, int experts, int hidden, float* logits) {
  for (int e = 0; e < experts; ++e) {
    const float* weight = w + std::size_t(e) * hidden;
    __m256 sum[kRows];
    for (int r = 0; r < kRows; ++r) sum[r] = _mm256_setzero_ps();
    int i = 0;
    for (; i + 8 <= hidden; i += 8)
      for (int r = 0; r < kRows; ++r)
        sum[r] = _mm256_fmadd_ps(_mm256_loadu_ps(x + std::size_t(r) * hidden + i),
                                 _mm256_loadu_ps(weight + i), sum[r]);
    for (int r = 0; r < kRows; ++r) {
      float total = ReduceAdd(sum[r]);
      for (int j = i; j < hidden; ++j) total = std::fma(x[std::size_t(r) * hidden + j], weight[j], total);
      logits[std::size_t(r) * experts + e] = total;
    }
  }
}

void Router(const float* x, int m, const float* w, int experts, int hidden, float* logits) {
  int r = 0;
  for (; r + 8 <= m; r += 8)
    RouterRows<8>(x + std::size_t(r) * hidden, w, experts, hidden, logits + std::size_t(r) * experts);
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
  if (kv.latent_values > 0) return StoreLatent(kv, layer, slot, k, block);
  for (int head = 0; head < kv.kv_heads; ++head) {
    Bf16* keys = KeyOf(kv, layer, head, block);
    Bf16* values = ValueOf(kv, layer, head, block);
    for (int d = 0; d < kv.head_dim; ++d) {
      keys[d * kBlockTokens + slot] = ToBf16(k[head * kv.head_dim + d]);
      values[slot * kv.head_dim + d] = ToBf16(v[head * kv.head_dim + d]);
    }
  }
}

// out = out * rescale + the weighted values of `count` tokens, for queries that see as many.
template <int kQueries>
inline void AddValues(const Bf16* values, int dim, int count, const Softmax* softmax, const Query* queries) {
  int d = 0;
  for (; d + 8 <= dim; d += 8) {
    __m256 part[kQueries];
    for (int i = 0; i < kQueries; ++i)
      part[i] = _mm256_mul_ps(_mm256_loadu_ps(queries[i].out + d), _mm256_set1_ps(softmax[i].rescale));
    for (int t = 0; t < count; ++t) {
      const __m256 value = FloatOf(values + t * dim + d);
      for (int i = 0; i < kQueries; ++i)
        part[i] = _mm256_fmadd_ps(_mm256_set1_ps(softmax[i].weights[t]), value, part[i]);
    }
    for (int i = 0; i < kQueries; ++i) _mm256_storeu_ps(queries[i].out + d, part[i]);
  }
  for (; d < dim; ++d) {
    for (int i = 0; i < kQueries; ++i) {
      float part = queries[i].out[d] * softmax[i].rescale;
      for (int t = 0; t < count; ++t)
        part = std::fma(softmax[i].weights[t], ToFloat(values[t * dim + d]), part);
      queries[i].out[d] = part;
    }
  }
}

// Queries side by side read each block once and hide each other's latencies.
template <int kQueries>
void AttendTile(const KvCache& cache, int layer, const AttendUnit& unit, int first_query, float scale) {
  const Query* const queries = unit.queries + first_query;
  const KvLayout& kv = cache.layout;
  const int dim = kv.head_dim;
  Softmax softmax[kQueries];
  int tokens = 0, first = queries[0].first;
  for (int i = 0; i < kQueries; ++i) {
    std::memset(queries[i].out, 0, std::size_t(dim) * sizeof(float));
    tokens = std::max(tokens, queries[i].tokens);
    first = std::min(first, queries[i].first);
    softmax[i].largest = queries[i].sink;
    softmax[i].sum = queries[i].sink == -std::numeric_limits<float>::infinity() ? 0.0F : 1.0F;
  }
  for (int begin = first / kBlockTokens * kBlockTokens; begin < tokens; begin += kBlockTokens) {
    std::byte* block = cache.Block(unit.block_table[begin / kBlockTokens]);
    const Bf16* keys = KeyOf(kv, layer, unit.kv_head, block);
    const Bf16* values = ValueOf(kv, layer, unit.kv_head, block);
    __m256 scores[kQueries][2];
    for (int i = 0; i < kQueries; ++i) scores[i][0] = scores[i][1] = _mm256_setzero_ps();
    for (int d = 0; d < dim; ++d) {
      const __m256 low = FloatOf(keys + d * kBlockTokens);
      const __m256 high = FloatOf(keys + d * kBlockTokens + 8);
      for (int i = 0; i < kQueries; ++i) {
        const __m256 query = _mm256_set1_ps(queries[i].q[d]);
        scores[i][0] = _mm256_fmadd_ps(query, low, scores[i][0]);
        scores[i][1] = _mm256_fmadd_ps(query, high, scores[i][1]);
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
      if (counts[i] > 0) Advance(scores[i][0], scores[i][1], hidden, count, scale, softmax[i]);
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

void Attend(const KvCache& cache, int layer, const AttendUnit* units, int count, float scale) {
  if (cache.layout.latent_values > 0) return AttendLatents(cache, layer, units, count, scale);
  for (int u = 0; u < count; ++u) {
    const AttendUnit& unit = units[u];
    int i = 0;
    for (; i + 4 <= unit.count; i += 4) AttendTile<4>(cache, layer, unit, i, scale);
    for (; i + 2 <= unit.count; i += 2) AttendTile<2>(cache, layer, unit, i, scale);
    for (; i < unit.count; ++i) AttendTile<1>(cache, layer, unit, i, scale);
  }
}

}  // namespace

const Kernels& Avx2Kernels() {
  static const Kernels table{"avx2", 2,      2,       false,  ToActivation,          Matmul,
                             GateUp, Router, StoreKv, Attend, Avx2QuantizedKernels()};
  return table;
}

}  // namespace elasticmoe::compute
