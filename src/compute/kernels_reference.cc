// The slow, plain truth: float32 everywhere, one loop a formula. What the SIMD tables are tested against, and
// what runs where there is no SIMD.
//
// K of a block: [head_dim][16 tokens] float32; V: [16 tokens][head_dim] float32, and so are latents.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "compute/kernel_tables.h"

namespace elasticmoe::compute {
namespace {

void ToActivation(const float* in, int count, void* out) {
  std::memcpy(out, in, std::size_t(count) * sizeof(float));
}

// sums[j] = x . output j of the panel, each added front to back.
void PanelDot(const PackedMatrix& w, int panel, const float* x, float (&sums)[kPanel]) {
  const auto* in = reinterpret_cast<const Bf16*>(w.Panel(panel));
  for (float& sum : sums) sum = 0;
  for (int i = 0; i < w.k; ++i) {
    const Bf16* column = in + std::size_t(i / 2) * kPanel * 2 + i % 2;
    for (int j = 0; j < kPanel; ++j) sums[j] += x[i] * ToFloat(column[j * 2]);
  }
}

void Matmul(const PackedMatrix& w, const void* const* rows, int m, int panel_begin, int panel_end,
            float* const* out) {
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    const int begin = panel * kPanel;
    for (int i = 0; i < m; ++i) {
      float sums[kPanel];
      PanelDot(w, panel, static_cast<const float*>(rows[i]), sums);
      std::copy(sums, sums + std::min(kPanel, w.n - begin), out[i] + begin);
    }
  }
}

void GateUp(const PackedMatrix& gate, const PackedMatrix& up, const Activation& activation,
            const void* const* rows, int m, int panel_begin, int panel_end, void* const* out) {
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    const int begin = panel * kPanel;
    for (int i = 0; i < m; ++i) {
      float g[kPanel], u[kPanel];
      PanelDot(gate, panel, static_cast<const float*>(rows[i]), g);
      PanelDot(up, panel, static_cast<const float*>(rows[i]), u);
      for (int j = 0; j < kPanel && begin + j < gate.n; ++j) {
        if (activation.gate_bias != nullptr) {
          g[j] += activation.gate_bias[begin + j];
          u[j] += activation.up_bias[begin + j];
        }
        static_cast<float*>(out[i])[begin + j] = Activate(activation.spec, g[j], u[j]);
      }
    }
  }
}

void Router(const float* x, int m, const float* w, int experts, int hidden, float* logits) {
  for (int i = 0; i < m; ++i) {
    for (int e = 0; e < experts; ++e) {
      float sum = 0;
      for (int j = 0; j < hidden; ++j) sum += x[std::size_t(i) * hidden + j] * w[std::size_t(e) * hidden + j];
      logits[std::size_t(i) * experts + e] = sum;
    }
  }
}

float* KeyOf(const KvLayout& kv, int layer, int head, std::byte* block) {
  return reinterpret_cast<float*>(block + kv.KeyOffset(layer, head));
}
float* ValueOf(const KvLayout& kv, int layer, int head, std::byte* block) {
  return reinterpret_cast<float*>(block + kv.ValueOffset(layer, head));
}

void StoreKv(const KvLayout& kv, int layer, int slot, const float* k, const float* v, std::byte* block) {
  if (kv.latent_values > 0) {
    std::memcpy(block + layer * kv.LayerBytes() + slot * kv.head_dim * sizeof(float), k,
                kv.head_dim * sizeof(float));
    return;
  }
  for (int head = 0; head < kv.kv_heads; ++head) {
    float* keys = KeyOf(kv, layer, head, block);
    float* values = ValueOf(kv, layer, head, block);
    for (int d = 0; d < kv.head_dim; ++d) {
      keys[d * kBlockTokens + slot] = k[head * kv.head_dim + d];
      values[slot * kv.head_dim + d] = v[head * kv.head_dim + d];
    }
  }
}

void AttendOne(const KvCache& cache, int layer, int kv_head, const std::uint32_t* block_table,
               const Query& query, float scale) {
  const KvLayout& kv = cache.layout;
  const bool latent = kv.latent_values > 0;
  const int out_dim = latent ? kv.latent_values : kv.head_dim;
  float* acc = query.out;
  for (int d = 0; d < out_dim; ++d) acc[d] = 0;
  float largest = query.sink;
  float sum = query.sink == -std::numeric_limits<float>::infinity() ? 0.0F : 1.0F;
  for (int begin = query.first / kBlockTokens * kBlockTokens; begin < query.tokens; begin += kBlockTokens) {
    std::byte* block = cache.Block(block_table[begin / kBlockTokens]);
    const float* keys = KeyOf(kv, layer, kv_head, block);
    const float* values = latent ? keys : ValueOf(kv, layer, kv_head, block);
    const int count = std::min(kBlockTokens, query.tokens - begin);
    float scores[kBlockTokens];
    float block_largest = largest;
    const int hidden = std::max(0, query.first - begin);
    for (int t = hidden; t < count; ++t) {
      float score = 0;
      for (int d = 0; d < kv.head_dim; ++d)
        score += query.q[d] * keys[latent ? t * kv.head_dim + d : d * kBlockTokens + t];
      scores[t] = score * scale;
      block_largest = std::max(block_largest, scores[t]);
    }
    const float rescale = std::exp(largest - block_largest);
    sum *= rescale;
    for (int d = 0; d < out_dim; ++d) acc[d] *= rescale;
    for (int t = hidden; t < count; ++t) {
      const float p = std::exp(scores[t] - block_largest);
      sum += p;
      for (int d = 0; d < out_dim; ++d) acc[d] += p * values[t * kv.head_dim + d];
    }
    largest = block_largest;
  }
  for (int d = 0; d < out_dim; ++d) acc[d] /= sum;
}

void Attend(const KvCache& cache, int layer, const AttendUnit* units, int count, float scale) {
  for (int u = 0; u < count; ++u)
    for (int i = 0; i < units[u].count; ++i)
      AttendOne(cache, layer, units[u].kv_head, units[u].block_table, units[u].queries[i], scale);
}

}  // namespace

const Kernels& ReferenceKernels() {
  static const Kernels table{"reference",
                             4,
                             4,
                             false,
                             ToActivation,
                             Matmul,
                             GateUp,
                             Router,
                             StoreKv,
                             Attend,
                             ReferenceQuantizedKernels()};
  return table;
}

}  // namespace elasticmoe::compute
