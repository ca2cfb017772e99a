// Where every tensor sits inside its blob. Two kinds of blob: one `shared` blob with all that each device
// reads (attention, norms, routers, dense MLPs, embedding, head), and one blob an expert a layer, the unit
// that a resize moves. The same for every process, from the ModelSpec alone. Pure.
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
  PackedMatrix gate, up;  // [width, hidden]
  PackedMatrix down;      // [hidden, width]
};

struct LayerWeights {
  const float* attention_norm = nullptr;  // [hidden]
  PackedMatrix qkv;                       // [QkvRows, hidden]
  const float* qkv_bias = nullptr;        // [QkvRows] or null
  const float* q_norm = nullptr;          // [head_dim] or null
  const float* k_norm = nullptr;
  PackedMatrix o;                   // [hidden, heads * head_dim]
  const float* mlp_norm = nullptr;  // [hidden]
  const float* router = nullptr;    // [experts, hidden], null in a dense layer
  MlpWeights dense;                 // of a dense layer
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
