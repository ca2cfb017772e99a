// What GGUF calls the architectures and tensors of the families here: the one table that reading and writing
// share. Pure.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "model/family.h"

namespace elasticmoe::model {

// expert_gating_func: how router logits become scores.
enum class GgufGating { kSoftmax = 1, kSigmoid = 2, kSoftmaxOfChosen = 3 };

// How an architecture of GGUF maps onto a family.
struct GgufArchitecture {
  std::string_view name;              // general.architecture
  std::string_view model_type;        // config.json's
  bool experts;                       // with expert_count > 0, else without; "llama" is both kinds
  std::string_view experts_key;       // config.json's key of the number of experts
  std::string_view expert_width_key;  // ... and of an expert's width
  bool width_is_experts;              // feed_forward_length is an expert's width where nothing else says it
  bool renormalize;                   // where expert_weights_norm is missing
  bool rotary_pairs;                  // rows of q and k are ordered for rotation of neighbours (RowOrder)
  GgufGating gating;                  // where expert_gating_func is missing; another one is another row's
  std::string_view mlp_norm;          // name of the norm before the MLP
  // config.json's keys of what some families alone have; empty where this one has not.
  std::string_view shared_key = {};  // of the number of shared experts
  std::string_view dense_key = {};   // of the number of dense layers before the first MoE layer
  bool fused_qkv = false;            // q, k and v are one tensor
};

// nullptr where the architecture is not known here. `gating` 0: the file does not say.
const GgufArchitecture* FindGgufArchitecture(std::string_view name, bool experts, std::int64_t gating);
const GgufArchitecture* FindGgufArchitectureOf(std::string_view model_type);

// "qwen3moe, llama, ...", for errors.
std::string GgufArchitectureNames();

// "blk.3.attn_q.weight"; for an expert's matrix that of the stack of all experts, "blk.3.ffn_up_exps.weight".
// "" where it has no name that is known here.
std::string GgufTensorName(const GgufArchitecture& architecture, TensorRole role, int layer);

// "blk.3.attn_qkv.weight", or .bias
std::string GgufFusedName(TensorRole role, int layer);

// "blk.3.ffn_up.5.weight": how older files name an expert's matrix on its own.
std::string GgufExpertName(const GgufArchitecture& architecture, TensorRole role, int layer, int expert);

}  // namespace elasticmoe::model
