#include "model/families/glm4_moe.h"

#include "model/families/decoder.h"

namespace elasticmoe::model {
namespace {

class Glm4MoeFamily final : public Family {
 public:
  std::string_view ModelType() const override { return "glm4_moe"; }

  Json Defaults() const override { return {{"rms_norm_eps", 1e-5}}; }

  Status Read(const ConfigReader& config, core::ModelSpec& spec) const override {
    EM_RETURN_IF_ERROR(ReadDecoder(config, spec));
    EM_RETURN_IF_ERROR(ReadPartialRope(config, 0.5, spec));
    EM_RETURN_IF_ERROR(OnlyFullAttention(config));
    EM_ASSIGN_OR_RETURN(spec.attention.qk_norm, config.Bool("use_qk_norm", false));
    EM_RETURN_IF_ERROR(ReadExperts(config, "n_routed_experts", spec));
    core::MoeSpec& moe = spec.moe;
    EM_ASSIGN_OR_RETURN(moe.expert_width, config.Int("moe_intermediate_size", 1, kMaxWidth));
    EM_ASSIGN_OR_RETURN(const int shared, config.Int("n_shared_experts", 0, kMaxWidth / moe.expert_width, 1));
    moe.shared_width = shared * moe.expert_width;
    EM_RETURN_IF_ERROR(ReadGroups(config, moe));
    moe.scores = core::MoeSpec::Scores::kSigmoid;
    moe.correction = true;
    moe.group_score = core::MoeSpec::GroupScore::kTopTwoSum;
    moe.left_out_as_zero = true;
    EM_ASSIGN_OR_RETURN(moe.renormalize, config.Bool("norm_topk_prob", true));
    EM_ASSIGN_OR_RETURN(const double scaling, config.Number("routed_scaling_factor", 1e-6, 1e6, 1.0));
    moe.scaling = static_cast<float>(scaling);
    EM_ASSIGN_OR_RETURN(const int dense, config.Int("first_k_dense_replace", 0, kMaxLayers, 1));
    for (int layer = 0; layer < spec.LayerCount(); ++layer) spec.layers[layer].moe = layer >= dense;
    EM_RETURN_IF_ERROR(ReadDenseWidth(config, spec));
    return {};
  }

  std::vector<TensorName> Tensors(const core::ModelSpec& spec) const override { return DecoderTensors(spec); }

  Json Config(const core::ModelSpec& spec) const override {
    const core::MoeSpec& moe = spec.moe;
    Json config = DecoderConfig(spec);
    config["architectures"] = {"Glm4MoeForCausalLM"};
    config["partial_rotary_factor"] = static_cast<double>(spec.attention.RopeDim()) / spec.attention.head_dim;
    config["use_qk_norm"] = spec.attention.qk_norm;
    config["n_routed_experts"] = moe.experts;
    config["n_shared_experts"] = moe.shared_width / moe.expert_width;
    config["num_experts_per_tok"] = moe.top_k;
    config["moe_intermediate_size"] = moe.expert_width;
    config["n_group"] = moe.groups;
    config["topk_group"] = moe.chosen_groups;
    config["norm_topk_prob"] = moe.renormalize;
    config["routed_scaling_factor"] = std::stod(fmt::format("{:.9g}", moe.scaling));
    int dense = 0;
    for (const core::LayerSpec& layer : spec.layers) {
      if (layer.moe) continue;
      ++dense;
      config["intermediate_size"] = layer.dense_width;
    }
    config["first_k_dense_replace"] = dense;
    return config;
  }
};

}  // namespace

const Family& Glm4Moe() {
  static const Glm4MoeFamily family;
  return family;
}

}  // namespace elasticmoe::model
