#include "model/families/qwen3_moe.h"

#include <algorithm>

#include "model/families/decoder.h"

namespace elasticmoe::model {
namespace {

class Qwen3MoeFamily final : public Family {
 public:
  std::string_view ModelType() const override { return "qwen3_moe"; }

  Expected<core::ModelSpec> Spec(const Json& json) const override {
    EM_RETURN_IF_ERROR(IsObject(json));
    const ConfigReader config(json);
    core::ModelSpec spec;
    spec.family = ModelType();
    spec.attention.qk_norm = true;
    EM_RETURN_IF_ERROR(ReadDecoder(config, spec));
    EM_RETURN_IF_ERROR(config.Only("use_sliding_window", false));
    EM_RETURN_IF_ERROR(ReadExperts(config, "num_experts", spec));
    EM_ASSIGN_OR_RETURN(spec.moe.expert_width, config.Int("moe_intermediate_size", 1, kMaxWidth));
    EM_ASSIGN_OR_RETURN(spec.moe.renormalize, config.Bool("norm_topk_prob", false));
    EM_RETURN_IF_ERROR(ReadLayers(config, spec));
    return spec;
  }

  std::vector<TensorName> Tensors(const core::ModelSpec& spec) const override {
    std::vector<TensorName> out;
    AddGlobalTensors(spec, out);
    for (int layer = 0; layer < spec.LayerCount(); ++layer) {
      AddAttentionTensors(spec, layer, out);
      AddMlpTensors(spec, layer, out);
    }
    return out;
  }

  Json Config(const core::ModelSpec& spec) const override {
    Json config = DecoderConfig(spec);
    config["architectures"] = {"Qwen3MoeForCausalLM"};
    config["use_sliding_window"] = false;
    config["num_experts"] = spec.moe.experts;
    config["num_experts_per_tok"] = spec.moe.top_k;
    config["moe_intermediate_size"] = spec.moe.expert_width;
    config["norm_topk_prob"] = spec.moe.renormalize;
    config["decoder_sparse_step"] = 1;
    Json dense = Json::array();
    for (int layer = 0; layer < spec.LayerCount(); ++layer) {
      if (spec.layers[layer].moe) continue;
      dense.push_back(layer);
      config["intermediate_size"] = spec.layers[layer].dense_width;
    }
    config["mlp_only_layers"] = std::move(dense);
    return config;
  }

 private:
  // A layer is MoE unless listed in mlp_only_layers or passed over by decoder_sparse_step.
  static Status ReadLayers(const ConfigReader& config, core::ModelSpec& spec) {
    EM_ASSIGN_OR_RETURN(const int step, config.Int("decoder_sparse_step", 1, kMaxLayers, 1));
    EM_ASSIGN_OR_RETURN(const std::vector<int> only, config.Ints("mlp_only_layers", 0, INT32_MAX));
    std::vector<bool> listed(spec.layers.size(), false);
    for (const int layer : only)
      if (layer < spec.LayerCount()) listed[layer] = true;  // others have no effect, as in the original
    bool any_dense = false;
    for (int layer = 0; layer < spec.LayerCount(); ++layer) {
      spec.layers[layer].moe = !listed[layer] && (layer + 1) % step == 0;
      any_dense = any_dense || !spec.layers[layer].moe;
    }
    if (std::ranges::none_of(spec.layers, &core::LayerSpec::moe))
      return Fail(
          ErrorCode::kUnimplemented,
          "decoder_sparse_step={} and mlp_only_layers leave no layer with experts (supported: at least one)",
          step);
    if (!any_dense) return {};
    EM_ASSIGN_OR_RETURN(const int width, config.Int("intermediate_size", 1, kMaxWidth));
    for (core::LayerSpec& layer : spec.layers)
      if (!layer.moe) layer.dense_width = width;
    return {};
  }

  static void AddMlpTensors(const core::ModelSpec& spec, int layer, std::vector<TensorName>& out) {
    const std::int64_t hidden = spec.hidden;
    const std::string prefix = LayerPrefix(layer) + "mlp.";
    if (!spec.layers[layer].moe) {
      const std::int64_t width = spec.layers[layer].dense_width;
      out.push_back({TensorRole::kDenseGate, layer, -1, prefix + "gate_proj.weight", {width, hidden}});
      out.push_back({TensorRole::kDenseUp, layer, -1, prefix + "up_proj.weight", {width, hidden}});
      out.push_back({TensorRole::kDenseDown, layer, -1, prefix + "down_proj.weight", {hidden, width}});
      return;
    }
    const std::int64_t width = spec.moe.expert_width;
    out.push_back({TensorRole::kRouter, layer, -1, prefix + "gate.weight", {spec.moe.experts, hidden}});
    for (int e = 0; e < spec.moe.experts; ++e) {
      const std::string expert = fmt::format("{}experts.{}.", prefix, e);
      out.push_back({TensorRole::kExpertGate, layer, e, expert + "gate_proj.weight", {width, hidden}});
      out.push_back({TensorRole::kExpertUp, layer, e, expert + "up_proj.weight", {width, hidden}});
      out.push_back({TensorRole::kExpertDown, layer, e, expert + "down_proj.weight", {hidden, width}});
    }
  }
};

}  // namespace

const Family& Qwen3Moe() {
  static const Qwen3MoeFamily family;
  return family;
}

}  // namespace elasticmoe::model
