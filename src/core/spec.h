// What a decoder is, as data: every difference between model families that the forward pass reads.
// A family adapter (model/families) makes one from config.json; nothing else knows family names. Pure.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/ids.h"

namespace elasticmoe::core {

struct AttentionSpec {
  int heads = 0;
  int kv_heads = 0;      // divides heads
  int head_dim = 0;      // independent of hidden / heads
  bool qk_norm = false;  // RMSNorm over head_dim of each q and k head, before RoPE
  bool qkv_bias = false;
  double rope_theta = 10000.0;  // rotate-half RoPE over the whole head
  float scale = 0.0F;           // of q . k, usually head_dim^-0.5

  int QkvRows() const { return (heads + 2 * kv_heads) * head_dim; }
};

// Softmax over all experts' logits, then the top_k largest (ties: the lower index).
struct MoeSpec {
  int experts = 0;
  int top_k = 0;
  int expert_width = 0;      // intermediate size of one expert
  bool renormalize = false;  // chosen weights are divided by their sum
};

struct LayerSpec {
  bool moe = false;
  int dense_width = 0;  // intermediate size where !moe
};

struct ModelSpec {
  std::string family;  // config.json's model_type
  int vocab = 0;       // rows of the embedding, >= the tokenizer's ids
  int hidden = 0;
  int max_positions = 0;  // context limit in tokens
  float rms_eps = 1e-6F;
  bool tied_head = false;
  AttentionSpec attention;
  MoeSpec moe;
  std::vector<LayerSpec> layers;
  std::vector<TokenId> eos_ids;  // generation_config.json's if there, else config.json's

  int LayerCount() const { return static_cast<int>(layers.size()); }
};

}  // namespace elasticmoe::core
