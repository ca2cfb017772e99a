#include "model/families/olmoe.h"

#include "model/families/decoder.h"

namespace elasticmoe::model {
namespace {

class OlmoeFamily final : public Family {
 public:
  std::string_view ModelType() const override { return "olmoe"; }

  Json Defaults() const override { return {{"rms_norm_eps", 1e-5}}; }

  Status Read(const ConfigReader& config, core::ModelSpec& spec) const override {
    EM_RETURN_IF_ERROR(ReadDecoder(config, spec));
    spec.attention.qk_norm_whole = true;
    spec.attention.o_bias = spec.attention.qkv_bias;
    EM_RETURN_IF_ERROR(OnlyWholeRope(config));
    EM_RETURN_IF_ERROR(OnlyFullAttention(config));
    EM_ASSIGN_OR_RETURN(const double clip, config.Number("clip_qkv", 1e-6, 1e6, 0.0));
    spec.attention.clip_qkv = static_cast<float>(clip);
    EM_RETURN_IF_ERROR(ReadExperts(config, "num_experts", spec));
    EM_ASSIGN_OR_RETURN(spec.moe.expert_width, config.Int("intermediate_size", 1, kMaxWidth));
    EM_ASSIGN_OR_RETURN(spec.moe.renormalize, config.Bool("norm_topk_prob", false));
    for (core::LayerSpec& layer : spec.layers) layer.moe = true;
    return {};
  }

  std::vector<TensorName> Tensors(const core::ModelSpec& spec) const override { return DecoderTensors(spec); }

  Json Config(const core::ModelSpec& spec) const override {
    Json config = DecoderConfig(spec);
    config["architectures"] = {"OlmoeForCausalLM"};
    config["clip_qkv"] = nullptr;
    if (spec.attention.clip_qkv > 0)
      config["clip_qkv"] = std::stod(fmt::format("{:.9g}", spec.attention.clip_qkv));
    config["num_experts"] = spec.moe.experts;
    config["num_experts_per_tok"] = spec.moe.top_k;
    config["intermediate_size"] = spec.moe.expert_width;
    config["norm_topk_prob"] = spec.moe.renormalize;
    return config;
  }
};

}  // namespace

const Family& Olmoe() {
  static const OlmoeFamily family;
  return family;
}

}  // namespace elasticmoe::model
