// Where every tensor sits inside its blob. Two kinds of blob: one `shared` blob with all that each device
// reads (attention, norms, routers, dense MLPs, embedding, head), and one blob an expert a layer, the unit
// that a resize moves. The same for every process, from the ModelSpec alone. Pure.
//
// Of spec.weights: attention, MLPs and experts. The head is int8 in int4 models (what it loses goes straight
// into the logits), and so is an embedding that is the head too; another embedding is bf16, since a row of it
// is only copied, and so are MLA's per-head matrices, whose inputs are too short for groups.
#pragma once

#include <cstddef>
#include <vector>

#include "compute/packed.h"
#include "core/spec.h"
#include "model/family.h"

namespace elasticmoe::compute {

using Role = model::TensorRole;

// kQ, kK and kV of a layer share one packed matrix of QkvRows() outputs (row_begin tells them apart), so
// that attention needs one product. Norms, biases and routers are float32 vectors or row-major matrices.
struct TensorPlace {
  std::size_t offset = 0;  // of the (fused) matrix within its blob, a multiple of kAlign
  int row_begin = 0;       // first output of this tensor in the fused matrix
  int n = 0;               // outputs of this tensor
  int n_fused = 0;         // outputs of the fused matrix
  int k = 0;               // inputs; 1 for vectors
  bool packed = false;     // false: float32, n * k values
  // kKvUp: each head's rows are two matrices one behind the other, its keys' transposed [k, keys] (it takes q
  // to where the latents are) and its values' [values, k].
  int head_keys = 0;
  int head_values = 0;
  WeightFormat format = WeightFormat::kBf16;  // of a packed matrix
  // kKeyUp, kValueUp: each head's rows are a matrix of its own, `head_stride` bytes behind the one before;
  // the place is that of kKvUp.
  int head_rows = 0;
  std::size_t head_stride = 0;

  std::size_t HeadBytes() const { return PackedBytes(k, head_keys) + PackedBytes(head_values, k); }
};

class WeightLayout {
 public:
  explicit WeightLayout(const core::ModelSpec& spec);

  std::size_t SharedBytes() const { return shared_bytes_; }
  std::size_t ExpertBytes() const { return expert_bytes_; }  // 0 for a model without experts

  // REQUIRES: the model has such a tensor (a tied head has no kLmHead, a dense layer no kRouter, ...).
  // `layer` is ignored for expert roles: all experts look alike.
  const TensorPlace& Place(Role role, int layer = -1) const;

 private:
  std::size_t Index(Role role, int layer) const;
  std::vector<TensorPlace> places_;  // [layer + 1][role]; n = 0 where absent
  std::size_t shared_bytes_ = 0;
  std::size_t expert_bytes_ = 0;
};

// Writes one checkpoint tensor (row-major [n, k], `type`) into its place in `blob`.
void PackTensor(const TensorPlace& place, const void* source, DType type, std::byte* blob);

// Views into blobs; they do not own and live as long as the blobs.
struct MlpWeights {
  PackedMatrix gate, up;             // [width, hidden]
  PackedMatrix down;                 // [hidden, width]
  const float* gate_bias = nullptr;  // [width] or null, like the other two
  const float* up_bias = nullptr;    // [width]
  const float* down_bias = nullptr;  // [hidden]
};

struct LayerWeights {
  const float* attention_norm = nullptr;  // [hidden]
  PackedMatrix qkv;                       // [QkvRows, hidden]
  const float* qkv_bias = nullptr;        // [QkvRows] or null
  const float* q_norm = nullptr;          // [head_dim], or [heads * head_dim] where the norm is of the whole
  const float* k_norm = nullptr;
  PackedMatrix q_up;                    // MLA with q_lora_rank: [heads * head_dim, q_lora_rank]
  const float* q_down_norm = nullptr;   // [q_lora_rank] or null
  const float* kv_down_norm = nullptr;  // MLA: [kv_lora_rank]
  std::vector<PackedMatrix> key_up;     // MLA, a head: [kv_lora_rank, PlainDim]
  std::vector<PackedMatrix> value_up;   // MLA, a head: [value_dim, kv_lora_rank]
  PackedMatrix o;                       // [hidden, heads * OutDim]
  const float* o_bias = nullptr;        // [hidden] or null
  const float* sinks = nullptr;         // [heads] or null
  const float* mlp_norm = nullptr;      // [hidden]
  const float* router = nullptr;        // [experts, hidden], null in a dense layer
  const float* router_bias = nullptr;   // [experts] or null
  const float* correction = nullptr;    // [experts] or null
  const float* shared_mix = nullptr;    // [hidden] or null
  MlpWeights dense;                     // of a dense layer, or a MoE layer's shared expert
};

struct SharedWeights {
  PackedMatrix embedding;  // [vocab, hidden]
  PackedMatrix lm_head;    // [vocab, hidden]; = embedding where tied
  const float* final_norm = nullptr;
  std::vector<LayerWeights> layers;
};

SharedWeights BindShared(const core::ModelSpec& spec, const WeightLayout& layout,
                         const std::byte* shared_blob);
MlpWeights BindExpert(const core::ModelSpec& spec, const WeightLayout& layout, const std::byte* expert_blob);

}  // namespace elasticmoe::compute
