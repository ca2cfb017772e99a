#include "model/gguf/names.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

namespace elasticmoe::model {
namespace {

// clang-format off
constexpr std::array<GgufArchitecture, 7> kArchitectures = {{
    {"qwen3moe", "qwen3_moe", true,  "num_experts",       "moe_intermediate_size", false, true,  false},
    {"qwen2moe", "qwen2_moe", true,  "num_experts",       "moe_intermediate_size", false, false, false},
    {"llama",    "mixtral",   true,  "num_local_experts", "intermediate_size",     true,  true,  true},
    {"olmoe",    "olmoe",     true,  "num_experts",       "intermediate_size",     true,  false, false},
    {"llama",    "llama",     false, "",                  "",                      false, false, true},
    {"qwen3",    "qwen3",     false, "",                  "",                      false, false, false},
    {"qwen2",    "qwen2",     false, "",                  "",                      false, false, false},
}};
// clang-format on

struct NameRow {
  TensorRole role;
  std::string_view name;  // within a layer after "blk.N.", with its ending
};

constexpr std::array<NameRow, 28> kNames = {{{TensorRole::kEmbedding, "token_embd.weight"},
                                             {TensorRole::kFinalNorm, "output_norm.weight"},
                                             {TensorRole::kLmHead, "output.weight"},
                                             {TensorRole::kAttentionNorm, "attn_norm.weight"},
                                             {TensorRole::kQ, "attn_q.weight"},
                                             {TensorRole::kK, "attn_k.weight"},
                                             {TensorRole::kV, "attn_v.weight"},
                                             {TensorRole::kQBias, "attn_q.bias"},
                                             {TensorRole::kKBias, "attn_k.bias"},
                                             {TensorRole::kVBias, "attn_v.bias"},
                                             {TensorRole::kQNorm, "attn_q_norm.weight"},
                                             {TensorRole::kKNorm, "attn_k_norm.weight"},
                                             {TensorRole::kO, "attn_output.weight"},
                                             {TensorRole::kMlpNorm, "ffn_norm.weight"},
                                             {TensorRole::kRouter, "ffn_gate_inp.weight"},
                                             {TensorRole::kDenseGate, "ffn_gate.weight"},
                                             {TensorRole::kDenseUp, "ffn_up.weight"},
                                             {TensorRole::kDenseDown, "ffn_down.weight"},
                                             {TensorRole::kSharedGate, "ffn_gate_shexp.weight"},
                                             {TensorRole::kSharedUp, "ffn_up_shexp.weight"},
                                             {TensorRole::kSharedDown, "ffn_down_shexp.weight"},
                                             {TensorRole::kSharedMix, "ffn_gate_inp_shexp.weight"},
                                             {TensorRole::kOBias, "attn_output.bias"},
                                             {TensorRole::kSinks, "attn_sinks.weight"},
                                             {TensorRole::kRouterCorrection, "exp_probs_b.bias"},
                                             {TensorRole::kExpertGate, "ffn_gate_exps.weight"},
                                             {TensorRole::kExpertUp, "ffn_up_exps.weight"},
                                             {TensorRole::kExpertDown, "ffn_down_exps.weight"}}};

std::string_view NameOfRole(TensorRole role) {
  const auto row = std::ranges::find(kNames, role, &NameRow::role);
  return row == kNames.end() ? std::string_view() : row->name;
}

}  // namespace

const GgufArchitecture* FindGgufArchitecture(std::string_view name, bool experts) {
  const auto at = std::ranges::find_if(
      kArchitectures, [&](const GgufArchitecture& a) { return a.name == name && a.experts == experts; });
  return at == kArchitectures.end() ? nullptr : &*at;
}

const GgufArchitecture* FindGgufArchitectureOf(std::string_view model_type) {
  const auto at = std::ranges::find(kArchitectures, model_type, &GgufArchitecture::model_type);
  return at == kArchitectures.end() ? nullptr : &*at;
}

std::string GgufArchitectureNames() {
  std::string names;
  for (const GgufArchitecture& architecture : kArchitectures) {
    if (!names.empty()) names += ", ";
    names += fmt::format("{} {} experts", architecture.name, architecture.experts ? "with" : "without");
  }
  return names;
}

std::string GgufTensorName(TensorRole role, int layer) {
  const std::string_view name = NameOfRole(role);
  return layer < 0 || name.empty() ? std::string(name) : fmt::format("blk.{}.{}", layer, name);
}

std::string GgufExpertName(TensorRole role, int layer, int expert) {
  const std::string_view name = NameOfRole(role);
  return fmt::format("blk.{}.{}.{}.weight", layer, name.substr(0, name.find("_exps")), expert);
}

}  // namespace elasticmoe::model
