#include "model/gguf/names.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <iterator>

namespace elasticmoe::model {
namespace {

constexpr std::string_view kNorm = "ffn_norm.weight", kPostNorm = "post_attention_norm.weight";
constexpr std::string_view kShared = "n_shared_experts", kDense = "first_k_dense_replace";
constexpr auto kSoftmax = GgufGating::kSoftmax, kSigmoid = GgufGating::kSigmoid;

// clang-format off
constexpr std::array<GgufArchitecture, 14> kArchitectures = {{
    {"qwen3moe",     "qwen3_moe",      true,  "num_experts",       "moe_intermediate_size", false, true,  false, kSoftmax, kNorm},
    {"qwen2moe",     "qwen2_moe",      true,  "num_experts",       "moe_intermediate_size", false, false, false, kSoftmax, kNorm},
    {"llama",        "mixtral",        true,  "num_local_experts", "intermediate_size",     true,  true,  true,  kSoftmax, kNorm},
    {"olmoe",        "olmoe",          true,  "num_experts",       "intermediate_size",     true,  false, false, kSoftmax, kNorm},
    {"deepseek2",    "deepseek_v2",    true,  "n_routed_experts",  "moe_intermediate_size", false, false, false, kSoftmax, kNorm, kShared, kDense},
    {"deepseek2",    "deepseek_v3",    true,  "n_routed_experts",  "moe_intermediate_size", false, true,  false, kSigmoid, kNorm, kShared, kDense},
    {"glm4moe",      "glm4_moe",       true,  "n_routed_experts",  "moe_intermediate_size", false, true,  false, kSigmoid, kPostNorm, kShared, kDense},
    {"bailingmoe",   "bailing_moe",    true,  "num_experts",       "moe_intermediate_size", false, false, true,  kSoftmax, kNorm, "num_shared_experts", kDense},
    {"bailingmoe2",  "bailing_moe_v2", true,  "num_experts",       "moe_intermediate_size", false, true,  false, kSigmoid, kNorm, "num_shared_experts", kDense, true},
    {"ernie4_5-moe", "ernie4_5_moe",   true,  "moe_num_experts",   "moe_intermediate_size", false, true,  false, kSoftmax, kNorm, "moe_num_shared_experts", "moe_layer_start_index"},
    {"gpt-oss",      "gpt_oss",        true,  "num_local_experts", "intermediate_size",     false, true,  false, GgufGating::kSoftmaxOfChosen, kPostNorm},
    {"llama",        "llama",          false, "",                  "",                      false, false, true,  kSoftmax, kNorm},
    {"qwen3",        "qwen3",          false, "",                  "",                      false, false, false, kSoftmax, kNorm},
    {"qwen2",        "qwen2",          false, "",                  "",                      false, false, false, kSoftmax, kNorm},
}};
// clang-format on

struct NameRow {
  TensorRole role;
  std::string_view name;  // within a layer after "blk.N.", with its ending
};

constexpr NameRow kNames[] = {{TensorRole::kEmbedding, "token_embd.weight"},
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
                              {TensorRole::kOBias, "attn_output.bias"},
                              {TensorRole::kSinks, "attn_sinks.weight"},
                              {TensorRole::kQDown, "attn_q_a.weight"},
                              {TensorRole::kQDownNorm, "attn_q_a_norm.weight"},
                              {TensorRole::kQUp, "attn_q_b.weight"},
                              {TensorRole::kKvDown, "attn_kv_a_mqa.weight"},
                              {TensorRole::kKvDownNorm, "attn_kv_a_norm.weight"},
                              {TensorRole::kKvUp, "attn_kv_b.weight"},
                              {TensorRole::kKeyUp, "attn_k_b.weight"},
                              {TensorRole::kValueUp, "attn_v_b.weight"},
                              {TensorRole::kRouter, "ffn_gate_inp.weight"},
                              {TensorRole::kRouterBias, "ffn_gate_inp.bias"},
                              {TensorRole::kRouterCorrection, "exp_probs_b.bias"},
                              {TensorRole::kDenseGate, "ffn_gate.weight"},
                              {TensorRole::kDenseUp, "ffn_up.weight"},
                              {TensorRole::kDenseDown, "ffn_down.weight"},
                              {TensorRole::kSharedGate, "ffn_gate_shexp.weight"},
                              {TensorRole::kSharedUp, "ffn_up_shexp.weight"},
                              {TensorRole::kSharedDown, "ffn_down_shexp.weight"},
                              {TensorRole::kSharedMix, "ffn_gate_inp_shexp.weight"},
                              {TensorRole::kDenseGateBias, "ffn_gate.bias"},
                              {TensorRole::kDenseUpBias, "ffn_up.bias"},
                              {TensorRole::kDenseDownBias, "ffn_down.bias"},
                              {TensorRole::kSharedGateBias, "ffn_gate_shexp.bias"},
                              {TensorRole::kSharedUpBias, "ffn_up_shexp.bias"},
                              {TensorRole::kSharedDownBias, "ffn_down_shexp.bias"},
                              {TensorRole::kExpertGate, "ffn_gate_exps.weight"},
                              {TensorRole::kExpertUp, "ffn_up_exps.weight"},
                              {TensorRole::kExpertDown, "ffn_down_exps.weight"},
                              {TensorRole::kExpertGateBias, "ffn_gate_exps.bias"},
                              {TensorRole::kExpertUpBias, "ffn_up_exps.bias"},
                              {TensorRole::kExpertDownBias, "ffn_down_exps.bias"}};

std::string_view NameOfRole(const GgufArchitecture& architecture, TensorRole role) {
  if (role == TensorRole::kMlpNorm) return architecture.mlp_norm;
  const auto row = std::ranges::find(kNames, role, &NameRow::role);
  return row == std::end(kNames) ? std::string_view() : row->name;
}

}  // namespace

const GgufArchitecture* FindGgufArchitecture(std::string_view name, bool experts, std::int64_t gating) {
  const auto at = std::ranges::find_if(kArchitectures, [&](const GgufArchitecture& a) {
    return a.name == name && a.experts == experts &&
           (!experts || gating == 0 || gating == static_cast<std::int64_t>(a.gating));
  });
  return at == kArchitectures.end() ? nullptr : &*at;
}

const GgufArchitecture* FindGgufArchitectureOf(std::string_view model_type) {
  const auto at = std::ranges::find(kArchitectures, model_type, &GgufArchitecture::model_type);
  return at == kArchitectures.end() ? nullptr : &*at;
}

std::string GgufArchitectureNames() {
  std::string names;
  for (const GgufArchitecture& architecture : kArchitectures) {
    if (!names.empty() && !names.ends_with(", ")) names += ", ";
    const std::string name =
        fmt::format("{} {} experts", architecture.name, architecture.experts ? "with" : "without");
    if (names.ends_with(name + ", ")) continue;  // of another gating
    names += name;
  }
  return names;
}

std::string GgufTensorName(const GgufArchitecture& architecture, TensorRole role, int layer) {
  const std::string_view name = NameOfRole(architecture, role);
  return layer < 0 || name.empty() ? std::string(name) : fmt::format("blk.{}.{}", layer, name);
}

std::string GgufFusedName(TensorRole role, int layer) {
  switch (role) {
    case TensorRole::kQ:
    case TensorRole::kK:
    case TensorRole::kV:
      return fmt::format("blk.{}.attn_qkv.weight", layer);
    case TensorRole::kQBias:
    case TensorRole::kKBias:
    case TensorRole::kVBias:
      return fmt::format("blk.{}.attn_qkv.bias", layer);
    default:
      return {};
  }
}

std::string GgufExpertName(const GgufArchitecture& architecture, TensorRole role, int layer, int expert) {
  const std::string_view name = NameOfRole(architecture, role);
  return fmt::format("blk.{}.{}.{}{}", layer, name.substr(0, name.find("_exps")), expert,
                     name.substr(name.rfind('.')));
}

}  // namespace elasticmoe::model
