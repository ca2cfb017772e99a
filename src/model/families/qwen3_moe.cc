#include "model/families/qwen3_moe.h"

#include "model/families/decoder.h"

namespace elasticmoe::model {
namespace {

class Qwen3MoeFamily final : public Family {
 public:
  std::string_view ModelType() const override { return "qwen3_moe"; }

  Status Read(const ConfigReader& config, core::ModelSpec& spec) const override {
    spec.attention.qk_norm = true;
    EM_RETURN_IF_ERROR(ReadDecoder(config, spec));
    spec.attention.o_bias = spec.attention.qkv_bias;
    EM_RETURN_IF_ERROR(OnlyWholeRope(config));
    EM_ASSIGN_OR_RETURN(const bool windows, config.Bool("use_sliding_window", false));
    // Earlier versions of the original's code read it and write it, later ones do neither.
    EM_ASSIGN_OR_RETURN(const int first, config.Int("max_window_layers", 0, INT32_MAX, 0));
    EM_RETURN_IF_ERROR(windows ? ReadWindows(config, first, spec) : OnlyFullAttention(config));
    EM_RETURN_IF_ERROR(ReadExperts(config, "num_experts", spec));
    EM_ASSIGN_OR_RETURN(spec.moe.expert_width, config.Int("moe_intermediate_size", 1, kMaxWidth));
    EM_ASSIGN_OR_RETURN(spec.moe.renormalize, config.Bool("norm_topk_prob", false));
    EM_RETURN_IF_ERROR(ReadRouting(config, spec.moe));
    EM_RETURN_IF_ERROR(ReadSparseLayers(config, spec));
    return {};
  }

  std::vector<TensorName> Tensors(const core::ModelSpec& spec) const override {
    std::vector<TensorName> out = DecoderTensors(spec);
    for (TensorName& tensor : out)
      if (tensor.role == TensorRole::kRouterCorrection)
        tensor.name = LayerPrefix(tensor.layer) + "mlp.gate.thresholds";
    return out;
  }

  Json Config(const core::ModelSpec& spec) const override {
    Json config = DecoderConfig(spec);
    config["architectures"] = {"Qwen3MoeForCausalLM"};
    WriteWindows(spec, config);
    config["num_experts"] = spec.moe.experts;
    config["num_experts_per_tok"] = spec.moe.top_k;
    config["moe_intermediate_size"] = spec.moe.expert_width;
    config["norm_topk_prob"] = spec.moe.renormalize;
    if (spec.moe.top_any) config["moe_routing"] = "top_any";
    WriteSparseLayers(spec, config);
    return config;
  }

 private:
  // Ours: no checkpoint of a text model with top-any routing is published under names of its own.
  static Status ReadRouting(const ConfigReader& config, core::MoeSpec& moe) {
    const Json* routing = config.Find("moe_routing");
    if (routing == nullptr || *routing == "top_k") return {};
    if (*routing != "top_any")
      return config.Unsupported("moe_routing={} (supported: \"top_k\", \"top_any\")", Shown(*routing));
    moe.scores = core::MoeSpec::Scores::kCosine;
    moe.top_any = moe.correction = true;
    moe.renormalize = false;
    return {};
  }
};

}  // namespace

const Family& Qwen3Moe() {
  static const Qwen3MoeFamily family;
  return family;
}

}  // namespace elasticmoe::model
