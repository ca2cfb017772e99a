#include "model/families/deepseek.h"

#include <cmath>

#include "model/families/decoder.h"

namespace elasticmoe::model {
namespace {

class DeepseekFamily final : public Family {
 public:
  explicit DeepseekFamily(bool v3) : v3_(v3) {}

  std::string_view ModelType() const override { return v3_ ? "deepseek_v3" : "deepseek_v2"; }

  Json Defaults() const override {
    if (!v3_) return Json::object();
    return {{"n_group", 8},           {"topk_group", 4},
            {"n_shared_experts", 1},  {"first_k_dense_replace", 3},
            {"norm_topk_prob", true}, {"routed_scaling_factor", 2.5}};
  }

  Status Read(const ConfigReader& config, core::ModelSpec& spec) const override {
    EM_RETURN_IF_ERROR(ReadModel(config, spec));
    EM_RETURN_IF_ERROR(ReadLatents(config, spec));
    EM_RETURN_IF_ERROR(OnlyWholeRope(config));  // of the part that is rotated at all
    EM_RETURN_IF_ERROR(config.Only("mlp_bias", false));
    EM_RETURN_IF_ERROR(OnlyFullAttention(config));
    EM_RETURN_IF_ERROR(ReadExperts(config, "n_routed_experts", spec));
    EM_ASSIGN_OR_RETURN(spec.moe.expert_width, config.Int("moe_intermediate_size", 1, kMaxWidth));
    EM_ASSIGN_OR_RETURN(const int shared,
                        config.Int("n_shared_experts", 0, kMaxWidth / spec.moe.expert_width, 0));
    spec.moe.shared_width = shared * spec.moe.expert_width;
    EM_RETURN_IF_ERROR(v3_ ? ReadV3Routing(config, spec.moe) : ReadV2Routing(config, spec.moe));
    EM_ASSIGN_OR_RETURN(const int dense, config.Int("first_k_dense_replace", 0, kMaxLayers, 0));
    EM_ASSIGN_OR_RETURN(const int every, config.Int("moe_layer_freq", 1, kMaxLayers, 1));
    for (int layer = 0; layer < spec.LayerCount(); ++layer)
      spec.layers[layer].moe = layer >= dense && layer % every == 0;
    EM_RETURN_IF_ERROR(ReadDenseWidth(config, spec));
    return {};
  }

  std::vector<TensorName> Tensors(const core::ModelSpec& spec) const override { return DecoderTensors(spec); }

  Json Config(const core::ModelSpec& spec) const override {
    const core::AttentionSpec& a = spec.attention;
    const core::MoeSpec& moe = spec.moe;
    Json config = DecoderConfig(spec);
    config["architectures"] = {v3_ ? "DeepseekV3ForCausalLM" : "DeepseekV2ForCausalLM"};
    config.erase("head_dim");
    config["num_key_value_heads"] = a.heads;
    config["q_lora_rank"] = nullptr;
    if (a.q_lora_rank > 0) config["q_lora_rank"] = a.q_lora_rank;
    config["kv_lora_rank"] = a.kv_lora_rank;
    config["qk_nope_head_dim"] = a.PlainDim();
    config["qk_rope_head_dim"] = a.RopeDim();
    config["v_head_dim"] = a.value_dim;
    config["n_routed_experts"] = moe.experts;
    config["n_shared_experts"] = moe.shared_width / moe.expert_width;
    config["num_experts_per_tok"] = moe.top_k;
    config["moe_intermediate_size"] = moe.expert_width;
    config["n_group"] = moe.groups;
    config["topk_group"] = moe.chosen_groups;
    if (!a.rope.interleaved) config["rope_interleave"] = false;
    config["norm_topk_prob"] = moe.renormalize;
    config["routed_scaling_factor"] = std::stod(fmt::format("{:.9g}", moe.scaling));
    config["scoring_func"] = v3_ ? "sigmoid" : "softmax";
    config["topk_method"] = v3_ ? "noaux_tc" : moe.groups > 1 ? "group_limited_greedy" : "greedy";
    config["moe_layer_freq"] = 1;
    int dense = 0;
    while (dense < spec.LayerCount() && !spec.layers[dense].moe) ++dense;
    config["first_k_dense_replace"] = dense;
    for (int layer = dense + 1; layer < spec.LayerCount(); ++layer)
      if (!spec.layers[layer].moe) config["moe_layer_freq"] = EveryOf(spec, dense);
    for (const core::LayerSpec& layer : spec.layers)
      if (!layer.moe) config["intermediate_size"] = layer.dense_width;
    return config;
  }

 private:
  // Distance of MoE layers; the count of layers where only one is left.
  static int EveryOf(const core::ModelSpec& spec, int first) {
    for (int layer = first + 1; layer < spec.LayerCount(); ++layer)
      if (spec.layers[layer].moe) return layer - first;
    return std::max(first, spec.LayerCount() - first);
  }

  static Status ReadLatents(const ConfigReader& config, core::ModelSpec& spec) {
    core::AttentionSpec& a = spec.attention;
    EM_ASSIGN_OR_RETURN(a.heads, config.Int("num_attention_heads", 1, kMaxHeads));
    a.kv_heads = a.heads;
    EM_ASSIGN_OR_RETURN(a.q_lora_rank, config.Int("q_lora_rank", 1, kMaxHidden, 0));
    EM_ASSIGN_OR_RETURN(a.kv_lora_rank, config.Int("kv_lora_rank", 1, kMaxLatents));
    EM_ASSIGN_OR_RETURN(const int plain, config.Int("qk_nope_head_dim", 1, kMaxLatentHeadDim));
    EM_ASSIGN_OR_RETURN(a.rope.dim, config.Int("qk_rope_head_dim", 2, kMaxRotated));
    EM_ASSIGN_OR_RETURN(a.value_dim, config.Int("v_head_dim", 1, kMaxLatentHeadDim));
    if (plain % 2 != 0 || a.rope.dim % 2 != 0)
      return Fail(ErrorCode::kInvalidArgument,
                  "qk_nope_head_dim={} and qk_rope_head_dim={} (expected even numbers)", plain, a.rope.dim);
    EM_ASSIGN_OR_RETURN(a.rope.interleaved, config.Bool("rope_interleave", true));
    a.head_dim = plain + a.rope.dim;
    EM_ASSIGN_OR_RETURN(a.qkv_bias, config.Bool("attention_bias", false));
    a.o_bias = a.qkv_bias;
    a.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(a.head_dim)));
    return ReadRope(config, spec);
  }

  static Status ReadV2Routing(const ConfigReader& config, core::MoeSpec& moe) {
    EM_RETURN_IF_ERROR(config.Only("rope_interleave", true));
    EM_RETURN_IF_ERROR(config.Only("scoring_func", "softmax"));
    const Json* method = config.Find("topk_method");
    if (method && *method != "greedy" && *method != "group_limited_greedy")
      EM_RETURN_IF_ERROR(
          config.Unsupported("topk_method={} (supported: greedy, group_limited_greedy)", Shown(*method)));
    if (method && *method == "group_limited_greedy") EM_RETURN_IF_ERROR(ReadGroups(config, moe));
    moe.left_out_as_zero = true;
    EM_ASSIGN_OR_RETURN(const bool renormalize, config.Bool("norm_topk_prob", false));
    EM_ASSIGN_OR_RETURN(const double scaling, config.Number("routed_scaling_factor", 1e-6, 1e6, 1.0));
    // One or the other, as in the original's code.
    moe.renormalize = renormalize && moe.top_k > 1;
    if (!moe.renormalize) moe.scaling = static_cast<float>(scaling);
    return {};
  }

  static Status ReadV3Routing(const ConfigReader& config, core::MoeSpec& moe) {
    EM_RETURN_IF_ERROR(config.Only("scoring_func", "sigmoid"));
    EM_RETURN_IF_ERROR(config.Only("topk_method", "noaux_tc"));
    EM_RETURN_IF_ERROR(ReadGroups(config, moe));
    moe.scores = core::MoeSpec::Scores::kSigmoid;
    moe.correction = true;
    moe.group_score = core::MoeSpec::GroupScore::kTopTwoSum;
    EM_ASSIGN_OR_RETURN(const bool renormalize, config.Bool("norm_topk_prob", true));
    moe.renormalize = renormalize && moe.top_k > 1;
    EM_ASSIGN_OR_RETURN(const double scaling, config.Number("routed_scaling_factor", 1e-6, 1e6, 1.0));
    moe.scaling = static_cast<float>(scaling);
    return {};
  }

  static constexpr int kMaxLatents = 960;  // with the rotated part 1024, what kernels hold of a token
  static constexpr int kMaxRotated = 64;
  static constexpr int kMaxLatentHeadDim = 256;

  bool v3_;
};

}  // namespace

const Family& DeepseekV2() {
  static const DeepseekFamily family(false);
  return family;
}

const Family& DeepseekV3() {
  static const DeepseekFamily family(true);
  return family;
}

}  // namespace elasticmoe::model
