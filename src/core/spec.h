// What a decoder is, as data: every difference between model families that the forward pass reads.
// A family adapter (model/families) makes one from config.json; nothing else knows family names. Pure.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/ids.h"
#include "core/weight_format.h"

namespace elasticmoe::core {

// Rotary position embedding: pair i turns by position * frequency(i), all times `amplitude`.
struct RopeSpec {
  enum class Scaling { kNone, kLinear, kYarn, kLlama3 };

  int dim = 0;               // rotated values of a head, even; 0 = the whole head
  bool interleaved = false;  // pairs are (2i, 2i + 1) rather than (i, i + dim / 2)
  Scaling scaling = Scaling::kNone;
  double factor = 1.0;         // frequencies are divided by it (yarn, llama3: the low ones)
  int original_positions = 0;  // context before scaling
  double beta_fast = 32.0;     // yarn: turns over the original context above which a frequency stays
  double beta_slow = 1.0;      // ... and below which it is divided
  bool truncate = true;        // yarn: the ramp begins and ends at whole pairs
  double low_frequency = 1.0;  // llama3: the same limits, in turns
  double high_frequency = 4.0;
  double amplitude = 1.0;       // of cosine and sine
  double mscale_all_dim = 0.0;  // yarn of DeepSeek: what AttentionSpec::scale was corrected by
};

// Grouped-query attention, or, where kv_lora_rank > 0, multi-head latent attention (DeepSeek-V2, arXiv
// 2405.04434 section 2.1): one latent [kv_lora_rank] and one rotated key [rope.dim] a token stand for all
// heads.
struct AttentionSpec {
  int heads = 0;
  int kv_heads = 0;      // divides heads; = heads in MLA
  int head_dim = 0;      // independent of hidden / heads; in MLA of q and k: the plain part + rope.dim
  bool qk_norm = false;  // RMSNorm over head_dim of each q and k head, before RoPE
  bool qkv_bias = false;
  double rope_theta = 10000.0;
  float scale = 0.0F;  // of q . k, usually head_dim^-0.5
  RopeSpec rope;
  bool qk_norm_whole = false;  // RMSNorm over all heads of q, and of k, together (not with qk_norm)
  bool o_bias = false;
  bool sinks = false;        // a learned logit a head that takes part in the softmax and has no value
  float clip_qkv = 0;        // q, k and v are clamped to [-clip, clip]; 0 = not
  int q_lora_rank = 0;       // MLA: q comes through a normed vector of this size; 0 = straight from hidden
  int kv_lora_rank = 0;      // MLA: size of the latent; 0 = GQA
  int value_dim = 0;         // MLA: of a head's v
  float latent_eps = 1e-6F;  // MLA: of the norms of q's vector and the latent, whatever rms_eps is

  bool Latent() const { return kv_lora_rank > 0; }
  int RopeDim() const { return rope.dim > 0 ? rope.dim : head_dim; }
  int PlainDim() const { return head_dim - RopeDim(); }           // MLA: the part of q and k without position
  int LatentDim() const { return kv_lora_rank + RopeDim(); }      // MLA: what a token caches
  int OutDim() const { return Latent() ? value_dim : head_dim; }  // of a head, into the output projection
  // Outputs of the first product: q, k and v; in MLA q (or its vector) and the latent.
  int QRows() const { return q_lora_rank > 0 ? q_lora_rank : heads * head_dim; }
  int QkvRows() const { return Latent() ? QRows() + LatentDim() : (heads + 2 * kv_heads) * head_dim; }
};

// How a token chooses its experts: scores of all of them, the top_k largest of scores + correction (ties: the
// lower index), their scores as weights. Or top-any (DynMoE, arXiv 2405.14297 section 3.1): all whose score,
// the cosine of x and the router's row, passes their correction (a threshold here; the paper's sigmoid of
// both sides changes no order), at most top_k of them, the best one where none does, with equal weights.
struct MoeSpec {
  enum class Scores { kSoftmax, kSigmoid, kCosine };
  enum class GroupScore { kLargest, kTopTwoSum };

  int experts = 0;
  int top_k = 0;
  int expert_width = 0;      // intermediate size of one expert
  bool renormalize = false;  // chosen weights are divided by their sum
  Scores scores = Scores::kSoftmax;
  bool correction = false;  // a learned value an expert is added for the choice only
  bool top_any = false;     // with kCosine and a correction, without groups, renormalisation or scaling
  int groups = 1;           // divides experts; only experts of the best `chosen_groups` groups are chosen
  int chosen_groups = 1;
  GroupScore group_score = GroupScore::kLargest;
  bool left_out_as_zero = false;  // experts of other groups count as 0 rather than not at all
  float scaling = 1.0F;           // of the weights, after renormalisation
  int shared_width = 0;           // intermediate size of the expert that every token visits; 0 = none
  bool shared_gate = false;       // its output is weighted by sigmoid(gate . x)
  bool router_bias = false;       // a learned value an expert is added to the logits
  bool expert_bias = false;       // of an expert's gate, up and down
};

// Of a gated MLP, dense or expert, from its sums gate and up.
struct ActivationSpec {
  enum class Kind {
    kSilu,           // gate * sigmoid(gate) * up
    kClampedSwiglu,  // g * sigmoid(alpha * g) * (u + 1), g = min(gate, limit), u = up within +-limit
                     // (gpt-oss)
  };
  Kind kind = Kind::kSilu;
  float alpha = 1.702F;  // of kClampedSwiglu
  float limit = 7.0F;
};

struct LayerSpec {
  bool moe = false;
  int dense_width = 0;  // intermediate size where !moe
  int window = 0;       // a token sees itself and the window - 1 tokens before it; 0 = all
};

struct ModelSpec {
  std::string family;  // config.json's model_type
  int vocab = 0;       // rows of the embedding, >= the tokenizer's ids
  int hidden = 0;
  int max_positions = 0;  // context limit in tokens
  float rms_eps = 1e-6F;
  bool tied_head = false;
  bool head_norm = false;   // each column of the head counts divided by its length (not with tied_head)
  bool dense_bias = false;  // gate, up and down of dense layers and of the shared expert have biases
  ActivationSpec activation;
  AttentionSpec attention;
  MoeSpec moe;
  std::vector<LayerSpec> layers;
  WeightFormat weights = WeightFormat::kBf16;  // as served, whatever the checkpoint has
  std::vector<TokenId> eos_ids;                // generation_config.json's if there, else config.json's

  int LayerCount() const { return static_cast<int>(layers.size()); }
};

}  // namespace elasticmoe::core
