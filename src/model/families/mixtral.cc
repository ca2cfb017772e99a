#include "model/families/mixtral.h"

#include "model/families/decoder.h"
#include "model/fused_tensors.h"

namespace elasticmoe::model {
namespace {

class MixtralFamily final : public Family {
 public:
  std::string_view ModelType() const override { return "mixtral"; }

  Json Defaults() const override { return {{"rope_theta", 1e6}, {"rms_norm_eps", 1e-5}}; }

  Status Read(const ConfigReader& config, core::ModelSpec& spec) const override {
    EM_RETURN_IF_ERROR(ReadDecoder(config, spec));
    EM_RETURN_IF_ERROR(OnlyWholeRope(config));
    EM_RETURN_IF_ERROR(ReadWindows(config, 0, spec));
    EM_RETURN_IF_ERROR(ReadExperts(config, "num_local_experts", spec));
    EM_ASSIGN_OR_RETURN(spec.moe.expert_width, config.Int("intermediate_size", 1, kMaxWidth));
    spec.moe.renormalize = true;
    for (core::LayerSpec& layer : spec.layers) layer.moe = true;
    return {};
  }

  std::vector<TensorName> Tensors(const core::ModelSpec& spec) const override {
    const std::int64_t hidden = spec.hidden;
    const std::int64_t width = spec.moe.expert_width;
    std::vector<TensorName> out;
    AddGlobalTensors(spec, out);
    for (int layer = 0; layer < spec.LayerCount(); ++layer) {
      AddAttentionTensors(spec, layer, out);
      const std::string prefix = LayerPrefix(layer) + "block_sparse_moe.";
      out.push_back({TensorRole::kRouter, layer, -1, prefix + "gate.weight", {spec.moe.experts, hidden}});
      for (int e = 0; e < spec.moe.experts; ++e) {
        const std::string expert = fmt::format("{}experts.{}.", prefix, e);
        out.push_back({TensorRole::kExpertGate, layer, e, expert + "w1.weight", {width, hidden}});
        out.push_back({TensorRole::kExpertUp, layer, e, expert + "w3.weight", {width, hidden}});
        out.push_back({TensorRole::kExpertDown, layer, e, expert + "w2.weight", {hidden, width}});
      }
    }
    return out;
  }

  Status Unfuse(const core::ModelSpec&, TensorIndex& index) const override {
    for (const char* part : {".gate.", ".experts."})  // as transformers 5 calls them
      RenameTensors(std::string(".mlp") + part, std::string(".block_sparse_moe") + part, index);
    return SplitStackedExperts({.gate = "w1", .up = "w3", .down = "w2"}, index);
  }

  Json Config(const core::ModelSpec& spec) const override {
    Json config = DecoderConfig(spec);
    config["architectures"] = {"MixtralForCausalLM"};
    WriteWindows(spec, config);
    config["num_local_experts"] = spec.moe.experts;
    config["num_experts_per_tok"] = spec.moe.top_k;
    config["intermediate_size"] = spec.moe.expert_width;
    return config;
  }
};

}  // namespace

const Family& Mixtral() {
  static const MixtralFamily family;
  return family;
}

}  // namespace elasticmoe::model
