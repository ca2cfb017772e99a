#include "model/families/qwen2_moe.h"

#include "model/families/decoder.h"

namespace elasticmoe::model {
namespace {

class Qwen2MoeFamily final : public Family {
 public:
  std::string_view ModelType() const override { return "qwen2_moe"; }

  Status Read(const ConfigReader& config, core::ModelSpec& spec) const override {
    EM_RETURN_IF_ERROR(ReadDecoder(config, spec));
    // The original has biases whatever attention_bias says.
    EM_ASSIGN_OR_RETURN(spec.attention.qkv_bias, config.Bool("qkv_bias", true));
    EM_RETURN_IF_ERROR(OnlyWholeRope(config));
    EM_ASSIGN_OR_RETURN(const bool windows, config.Bool("use_sliding_window", false));
    EM_ASSIGN_OR_RETURN(const int first, config.Int("max_window_layers", 0, INT32_MAX, 28));
    EM_RETURN_IF_ERROR(windows ? ReadWindows(config, first, spec) : OnlyFullAttention(config));
    EM_RETURN_IF_ERROR(ReadExperts(config, "num_experts", spec));
    EM_ASSIGN_OR_RETURN(spec.moe.expert_width, config.Int("moe_intermediate_size", 1, kMaxWidth));
    EM_ASSIGN_OR_RETURN(spec.moe.shared_width, config.Int("shared_expert_intermediate_size", 1, kMaxWidth));
    spec.moe.shared_gate = true;
    EM_ASSIGN_OR_RETURN(spec.moe.renormalize, config.Bool("norm_topk_prob", false));
    EM_RETURN_IF_ERROR(ReadSparseLayers(config, spec));
    return {};
  }

  std::vector<TensorName> Tensors(const core::ModelSpec& spec) const override {
    return DecoderTensors(spec, "shared_expert");
  }

  Json Config(const core::ModelSpec& spec) const override {
    Json config = DecoderConfig(spec);
    config["architectures"] = {"Qwen2MoeForCausalLM"};
    config.erase("attention_bias");
    config["qkv_bias"] = spec.attention.qkv_bias;
    WriteWindows(spec, config);
    config["num_experts"] = spec.moe.experts;
    config["num_experts_per_tok"] = spec.moe.top_k;
    config["moe_intermediate_size"] = spec.moe.expert_width;
    config["shared_expert_intermediate_size"] = spec.moe.shared_width;
    config["norm_topk_prob"] = spec.moe.renormalize;
    WriteSparseLayers(spec, config);
    return config;
  }
};

}  // namespace

const Family& Qwen2Moe() {
  static const Qwen2MoeFamily family;
  return family;
}

}  // namespace elasticmoe::model
