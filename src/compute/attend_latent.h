// Attention over latents (MLA in absorbed form: every head reads the one row a token, values are its first
// part), written once in plain loops over 16 lanes, for every table to compile for its own instruction set.
// Everything is inlined where it is used, so that no copy of it can be linked into code for other machines.
//
// A block: [16 tokens][head_dim] elements.
#pragma once

#include <algorithm>
#include <limits>

#include "compute/exp.h"
#include "compute/kernels.h"

namespace elasticmoe::compute {

[[gnu::always_inline]] inline void PutElement(float value, float& out) {
  out = value;
}
[[gnu::always_inline]] inline void PutElement(float value, Bf16& out) {
  out = ToBf16(value);
}
[[gnu::always_inline]] inline float GetElement(float value) {
  return value;
}
[[gnu::always_inline]] inline float GetElement(Bf16 value) {
  return ToFloat(value);
}

template <class Element>
[[gnu::always_inline]] inline void StoreLatent(const KvLayout& kv, int layer, int slot, const float* latent,
                                               std::byte* block) {
  auto* out = reinterpret_cast<Element*>(block + layer * kv.LayerBytes()) + slot * kv.head_dim;
  for (int d = 0; d < kv.head_dim; ++d) PutElement(latent[d], out[d]);
}

// One unit. Blocks outside, queries inside: a block is converted once for all of them.
template <class Element>
[[gnu::always_inline]] inline void AttendLatent(const KvCache& cache, int layer,
                                                const std::uint32_t* block_table, const Query* queries,
                                                int count, float scale) {
  constexpr int kLanes = 16;
  constexpr int kMost = 16;  // queries that pass a block together
  const KvLayout& kv = cache.layout;
  const int dim = kv.head_dim, whole = dim / kLanes * kLanes, values = kv.latent_values;
  alignas(64) float rows[kBlockTokens][kMaxLatentDim];
  for (; count > 0; queries += kMost, count -= kMost) {
    const int some = std::min(kMost, count);
    float largest[kMost], sum[kMost];
    int tokens = 0;
    for (int i = 0; i < some; ++i) {
      largest[i] = -std::numeric_limits<float>::infinity();
      sum[i] = 0;
      std::fill(queries[i].out, queries[i].out + values, 0.0F);
      tokens = std::max(tokens, queries[i].tokens);
    }
    for (int begin = 0; begin < tokens; begin += kBlockTokens) {
      const auto* block = reinterpret_cast<const Element*>(cache.Block(block_table[begin / kBlockTokens]) +
                                                           layer * kv.LayerBytes());
      const int present = std::min(kBlockTokens, tokens - begin);
      for (int t = 0; t < present; ++t)
        for (int d = 0; d < dim; ++d) rows[t][d] = GetElement(block[t * dim + d]);
      for (int i = 0; i < some; ++i) {
        const int seen = std::min(kBlockTokens, queries[i].tokens - begin);
        if (seen <= 0) continue;
        const float* q = queries[i].q;
        float* out = queries[i].out;
        float scores[kBlockTokens];
        float block_largest = largest[i];
        for (int t = 0; t < seen; ++t) {
          float lanes[kLanes] = {};
          for (int d = 0; d < whole; d += kLanes)
            for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += q[d + lane] * rows[t][d + lane];
          for (int d = whole; d < dim; ++d) lanes[d - whole] += q[d] * rows[t][d];
          for (int width = kLanes / 2; width > 0; width /= 2)
            for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
          scores[t] = lanes[0] * scale;
          block_largest = std::max(block_largest, scores[t]);
        }
        const float rescale = Exp(largest[i] - block_largest);
        largest[i] = block_largest;
        sum[i] *= rescale;
        for (int d = 0; d < values; ++d) out[d] *= rescale;
        for (int t = 0; t < seen; ++t) {
          const float p = Exp(scores[t] - block_largest);
          sum[i] += p;
          for (int d = 0; d < values; ++d) out[d] += p * rows[t][d];
        }
      }
    }
    for (int i = 0; i < some; ++i)
      for (int d = 0; d < values; ++d) queries[i].out[d] /= sum[i];
  }
}

// As Kernels::attend.
template <class Element>
[[gnu::always_inline]] inline void AttendLatents(const KvCache& cache, int layer, const AttendUnit* units,
                                                 int count, float scale) {
  for (int u = 0; u < count; ++u)
    AttendLatent<Element>(cache, layer, units[u].block_table, units[u].queries, units[u].count, scale);
}

}  // namespace elasticmoe::compute
