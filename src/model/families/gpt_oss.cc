#include "model/families/gpt_oss.h"

#include "model/families/decoder.h"
#include "model/fused_tensors.h"

namespace elasticmoe::model {
namespace {

// gpt-oss (OpenAI's model card, and transformers' modeling_gpt_oss.py): attention sinks, windows on every
// other layer, biases everywhere, a clamped swiglu. Its weights are softmax over the chosen logits, which is
// softmax over all of them, renormalised.
class GptOssFamily final : public Family {
 public:
  std::string_view ModelType() const override { return "gpt_oss"; }

  Json Defaults() const override {
    return {{"rope_theta", 150000.0},
            {"rms_norm_eps", 1e-5},
            {"sliding_window", 128},
            {"rope_scaling",
             {{"rope_type", "yarn"},
              {"factor", 32.0},
              {"beta_fast", 32.0},
              {"beta_slow", 1.0},
              {"truncate", false},
              {"original_max_position_embeddings", 4096}}}};
  }

  Status Read(const ConfigReader& config, core::ModelSpec& spec) const override {
    EM_RETURN_IF_ERROR(ReadDecoder(config, spec));
    EM_RETURN_IF_ERROR(OnlyWholeRope(config));
    EM_ASSIGN_OR_RETURN(spec.attention.qkv_bias, config.Bool("attention_bias", true));
    spec.attention.o_bias = spec.attention.qkv_bias;
    spec.attention.sinks = true;
    EM_RETURN_IF_ERROR(ReadWindows(config, 0, spec));
    if (!config.Find("layer_types"))
      for (int layer = 1; layer < spec.LayerCount(); layer += 2) spec.layers[layer].window = 0;
    EM_RETURN_IF_ERROR(ReadExperts(config, "num_local_experts", spec));
    EM_ASSIGN_OR_RETURN(spec.moe.expert_width, config.Int("intermediate_size", 1, kMaxWidth));
    spec.moe.renormalize = true;
    spec.moe.router_bias = spec.moe.expert_bias = true;
    spec.activation.kind = core::ActivationSpec::Kind::kClampedSwiglu;
    EM_ASSIGN_OR_RETURN(const double limit, config.Number("swiglu_limit", 1e-6, 1e6, 7.0));
    spec.activation.limit = static_cast<float>(limit);
    for (core::LayerSpec& layer : spec.layers) layer.moe = true;
    return {};
  }

  std::vector<TensorName> Tensors(const core::ModelSpec& spec) const override {
    using enum TensorRole;
    const std::int64_t width = spec.moe.expert_width, hidden = spec.hidden;
    std::vector<TensorName> out;
    AddGlobalTensors(spec, out);
    for (int layer = 0; layer < spec.LayerCount(); ++layer) {
      AddAttentionTensors(spec, layer, out);
      const std::string prefix = LayerPrefix(layer) + "mlp.";
      out.push_back({kSinks, layer, -1, LayerPrefix(layer) + "self_attn.sinks", {spec.attention.heads}});
      out.push_back({kRouter, layer, -1, prefix + "router.weight", {spec.moe.experts, hidden}});
      out.push_back({kRouterBias, layer, -1, prefix + "router.bias", {spec.moe.experts}});
      for (int e = 0; e < spec.moe.experts; ++e) {
        const std::string expert = fmt::format("{}experts.{}.", prefix, e);
        out.push_back({kExpertGate, layer, e, expert + "gate_proj.weight", {width, hidden}});
        out.push_back({kExpertUp, layer, e, expert + "up_proj.weight", {width, hidden}});
        out.push_back({kExpertDown, layer, e, expert + "down_proj.weight", {hidden, width}});
        out.push_back({kExpertGateBias, layer, e, expert + "gate_proj.bias", {width}});
        out.push_back({kExpertUpBias, layer, e, expert + "up_proj.bias", {width}});
        out.push_back({kExpertDownBias, layer, e, expert + "down_proj.bias", {hidden}});
      }
    }
    return out;
  }

  Status Unfuse(const core::ModelSpec&, TensorIndex& index) const override {
    return SplitFusedExperts(index);
  }

  Json Config(const core::ModelSpec& spec) const override {
    Json config = DecoderConfig(spec);
    config["architectures"] = {"GptOssForCausalLM"};
    WriteWindows(spec, config);
    config["num_local_experts"] = spec.moe.experts;
    config["num_experts_per_tok"] = spec.moe.top_k;
    config["intermediate_size"] = spec.moe.expert_width;
    config["swiglu_limit"] = std::stod(fmt::format("{:.9g}", spec.activation.limit));
    return config;
  }
};

}  // namespace

const Family& GptOss() {
  static const GptOssFamily family;
  return family;
}

}  // namespace elasticmoe::model
