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
    EM_RETURN_IF_ERROR(config.Only("partial_rotary_factor", 1.0));
    EM_ASSIGN_OR_RETURN(const bool windows, config.Bool("use_sliding_window", false));
    EM_RETURN_IF_ERROR(windows ? ReadWindows(config, 0, spec) : OnlyFullAttention(config));
    EM_RETURN_IF_ERROR(ReadExperts(config, "num_experts", spec));
    EM_ASSIGN_OR_RETURN(spec.moe.expert_width, config.Int("moe_intermediate_size", 1, kMaxWidth));
    EM_ASSIGN_OR_RETURN(spec.moe.renormalize, config.Bool("norm_topk_prob", false));
    EM_RETURN_IF_ERROR(ReadSparseLayers(config, spec));
    return {};
  }

  std::vector<TensorName> Tensors(const core::ModelSpec& spec) const override { return DecoderTensors(spec); }

  Json Config(const core::ModelSpec& spec) const override {
    Json config = DecoderConfig(spec);
    config["architectures"] = {"Qwen3MoeForCausalLM"};
    WriteWindows(spec, config);
    config["num_experts"] = spec.moe.experts;
    config["num_experts_per_tok"] = spec.moe.top_k;
    config["moe_intermediate_size"] = spec.moe.expert_width;
    config["norm_topk_prob"] = spec.moe.renormalize;
    WriteSparseLayers(spec, config);
    return config;
  }
};

}  // namespace

const Family& Qwen3Moe() {
  static const Qwen3MoeFamily family;
  return family;
}

}  // namespace elasticmoe::model
