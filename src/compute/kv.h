// Layout of the paged KV cache in memory: a block holds 16 tokens of all layers of one sequence, so a
// handover moves one id a 16 tokens. How K and V lie inside a block is the kernels' business
// (kernels_*.cc); its size is everyone's. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/spec.h"

namespace elasticmoe::compute {

inline constexpr int kBlockTokens = 16;  // = lanes of a 512-bit register of float32

struct KvLayout {
  int layers = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int element_bytes = 2;  // 2 = bf16 (SIMD kernels), 4 = float32 (reference kernels)
  // MLA: K and V are one row of head_dim values a token, the first so many of which are V; 0 = apart.
  int latent_values = 0;

  static KvLayout Of(const core::ModelSpec& spec, int element_bytes);
  std::size_t HeadBytes() const { return std::size_t(head_dim) * kBlockTokens * element_bytes; }
  // K of all heads, then V.
  std::size_t LayerBytes() const { return (latent_values > 0 ? 1 : 2) * kv_heads * HeadBytes(); }
  std::size_t BlockBytes() const { return layers * LayerBytes(); }
  // Where K or V of one head of one layer begins in a block; not over latents.
  [[gnu::always_inline]] std::size_t KeyOffset(int layer, int head) const {
    return layer * LayerBytes() + head * HeadBytes();
  }
  [[gnu::always_inline]] std::size_t ValueOffset(int layer, int head) const {
    return layer * LayerBytes() + (kv_heads + head) * HeadBytes();
  }
};

// The blocks as one device sees them: chunks of `blocks_per_chunk` blocks, mapped anywhere.
// Does not own. Blocks of different sequences may be used by several threads at once.
struct KvCache {
  KvLayout layout;
  std::byte* const* chunks = nullptr;
  std::uint32_t blocks_per_chunk = 1;

  std::byte* Block(std::uint32_t id) const {
    return chunks[id / blocks_per_chunk] + std::size_t(id % blocks_per_chunk) * layout.BlockBytes();
  }
};

}  // namespace elasticmoe::compute
