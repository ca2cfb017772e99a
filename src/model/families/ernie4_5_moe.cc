#include "model/families/ernie4_5_moe.h"

#include "model/families/decoder.h"
#include "model/fused_tensors.h"

namespace elasticmoe::model {
namespace {

// After transformers' modeling_ernie4_5_moe.py. The correction is that of softmax scores, for the choice
// alone.
class Ernie45MoeFamily final : public Family {
 public:
  std::string_view ModelType() const override { return "ernie4_5_moe"; }

  Json Defaults() const override {
    return {{"rope_theta", 500000.0},
            {"rms_norm_eps", 1e-5},
            {"tie_word_embeddings", true},
            {"moe_layer_start_index", 1},
            {"moe_num_shared_experts", 2}};
  }

  Status Read(const ConfigReader& config, core::ModelSpec& spec) const override {
    EM_RETURN_IF_ERROR(ReadDecoder(config, spec));
    EM_RETURN_IF_ERROR(OnlyWholeRope(config));
    EM_RETURN_IF_ERROR(config.Only("moe_gate", "topk"));
    EM_RETURN_IF_ERROR(OnlyFullAttention(config));
    EM_ASSIGN_OR_RETURN(spec.attention.qkv_bias, config.Bool("use_bias", false));
    spec.attention.o_bias = spec.dense_bias = spec.moe.expert_bias = spec.attention.qkv_bias;
    spec.attention.rope.interleaved = true;
    EM_RETURN_IF_ERROR(ReadExperts(config, "moe_num_experts", spec, "moe_k"));
    core::MoeSpec& moe = spec.moe;
    EM_ASSIGN_OR_RETURN(moe.expert_width, config.Int("moe_intermediate_size", 1, kMaxWidth));
    EM_ASSIGN_OR_RETURN(const int shared,
                        config.Int("moe_num_shared_experts", 0, kMaxWidth / moe.expert_width, 0));
    moe.shared_width = shared * moe.expert_width;
    moe.renormalize = true;
    EM_ASSIGN_OR_RETURN(moe.correction, config.Bool("moe_use_aux_free", true));
    EM_ASSIGN_OR_RETURN(const int first, config.Int("moe_layer_start_index", 0, kMaxLayers, 0));
    EM_ASSIGN_OR_RETURN(const int end, config.Int("moe_layer_end_index", -1, kMaxLayers, -1));
    EM_ASSIGN_OR_RETURN(const int every, config.Int("moe_layer_interval", 1, kMaxLayers, 1));
    const int last = end < 0 ? spec.LayerCount() - 1 : end;
    for (int layer = 0; layer < spec.LayerCount(); ++layer)
      spec.layers[layer].moe = layer >= first && layer <= last && (layer + 1) % every == 0;
    return ReadDenseWidth(config, spec);
  }

  std::vector<TensorName> Tensors(const core::ModelSpec& spec) const override {
    std::vector<TensorName> out = DecoderTensors(spec);
    for (TensorName& tensor : out) {
      if (tensor.role != TensorRole::kRouterCorrection) continue;
      tensor.name = LayerPrefix(tensor.layer) + "mlp.moe_statics.e_score_correction_bias";
      tensor.shape = {1, spec.moe.experts};
    }
    return out;
  }

  Status Unfuse(const core::ModelSpec&, TensorIndex& index) const override {
    RenameTensors(".gate.moe_statics.", ".moe_statics.", index);  // as transformers 5 calls it
    return SplitStackedExperts({}, index);
  }

  Json Config(const core::ModelSpec& spec) const override {
    const core::MoeSpec& moe = spec.moe;
    Json config = DecoderConfig(spec);
    config["architectures"] = {"Ernie4_5_MoeForCausalLM"};
    config.erase("attention_bias");
    config["use_bias"] = spec.dense_bias;
    config["moe_num_experts"] = moe.experts;
    config["moe_k"] = moe.top_k;
    config["moe_intermediate_size"] = moe.expert_width;
    config["moe_num_shared_experts"] = moe.shared_width / moe.expert_width;
    config["moe_use_aux_free"] = moe.correction;
    int first = -1, last = -1, every = 1, count = 0;
    for (int layer = 0; layer < spec.LayerCount(); ++layer) {
      if (!spec.layers[layer].moe) {
        config["intermediate_size"] = spec.layers[layer].dense_width;
        continue;
      }
      if (count++ == 1) every = layer - first;
      if (first < 0) first = layer;
      last = layer;
    }
    config["moe_layer_start_index"] = first < 0 ? spec.LayerCount() : first;
    config["moe_layer_end_index"] = last;
    config["moe_layer_interval"] = count == 1 ? first + 1 : every;
    return config;
  }
};

}  // namespace

const Family& Ernie45Moe() {
  static const Ernie45MoeFamily family;
  return family;
}

}  // namespace elasticmoe::model
