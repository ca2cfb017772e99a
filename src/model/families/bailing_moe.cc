#include "model/families/bailing_moe.h"

#include "model/families/decoder.h"
#include "model/fused_tensors.h"

namespace elasticmoe::model {
namespace {

constexpr char kFused[] = ".attention.query_key_value";
constexpr char kV2[] = "BailingMoeV2ForCausalLM";

// After the published modeling_bailing_moe.py and modeling_bailing_moe_v2.py. 2.0 chooses as DeepSeek-V3 does
// and rotates half of a head whose q and k are normed.
class BailingMoeFamily final : public Family {
 public:
  explicit BailingMoeFamily(bool v2) : v2_(v2) {}

  std::string_view ModelType() const override { return v2_ ? "bailing_moe_v2" : "bailing_moe"; }

  Json Defaults() const override {
    return {{"rms_norm_eps", 1e-5},
            {"norm_topk_prob", true},
            {"n_group", 8},
            {"topk_group", 4},
            {"routed_scaling_factor", 2.5}};
  }

  Status Read(const ConfigReader& config, core::ModelSpec& spec) const override {
    const bool v2 = v2_ || IsV2(config);
    EM_RETURN_IF_ERROR(ReadDecoder(config, spec));
    EM_ASSIGN_OR_RETURN(spec.attention.o_bias, config.Bool("use_bias", false));
    EM_ASSIGN_OR_RETURN(spec.head_norm, config.Bool("norm_head", false));
    if (spec.head_norm && spec.tied_head)
      EM_RETURN_IF_ERROR(config.Unsupported("norm_head=true with tie_word_embeddings=true (supported: one)"));
    if (v2) spec.family = "bailing_moe_v2";
    EM_RETURN_IF_ERROR(config.Only("multi_gate", false));
    EM_RETURN_IF_ERROR(config.Only("use_sliding_window", false));
    EM_RETURN_IF_ERROR(OnlyFullAttention(config));
    EM_ASSIGN_OR_RETURN(spec.attention.qkv_bias, config.Bool("use_qkv_bias", false));
    EM_RETURN_IF_ERROR(ReadExperts(config, "num_experts", spec));
    core::MoeSpec& moe = spec.moe;
    EM_ASSIGN_OR_RETURN(moe.expert_width, config.Int("moe_intermediate_size", 1, kMaxWidth));
    EM_ASSIGN_OR_RETURN(const int shared,
                        config.Int("num_shared_experts", 0, kMaxWidth / moe.expert_width, 0));
    EM_ASSIGN_OR_RETURN(const int shared_width,
                        config.Int("moe_shared_expert_intermediate_size", 1, kMaxWidth / std::max(shared, 1),
                                   moe.expert_width));
    moe.shared_width = shared * shared_width;
    EM_RETURN_IF_ERROR(v2 ? ReadV2(config, spec) : ReadV1(config, spec));
    EM_ASSIGN_OR_RETURN(const int dense, config.Int("first_k_dense_replace", 0, kMaxLayers, 0));
    for (int layer = 0; layer < spec.LayerCount(); ++layer) spec.layers[layer].moe = layer >= dense;
    return ReadDenseWidth(config, spec);
  }

  std::vector<TensorName> Tensors(const core::ModelSpec& spec) const override {
    std::vector<TensorName> out = DecoderTensors(spec);
    for (TensorName& tensor : out) {
      const std::string attention = LayerPrefix(tensor.layer) + "attention.";
      switch (tensor.role) {
        case TensorRole::kEmbedding:
          tensor.name = "model.word_embeddings.weight";
          break;
        case TensorRole::kQ:
        case TensorRole::kK:
        case TensorRole::kV:
        case TensorRole::kQBias:
        case TensorRole::kKBias:
        case TensorRole::kVBias: {
          const bool bias = tensor.shape.size() == 1;
          const char letter = tensor.name[tensor.name.find("_proj.") - 1];  // q, k or v
          tensor.name = fmt::format("{}query_key_value.{}.{}", attention, letter, bias ? "bias" : "weight");
          break;
        }
        case TensorRole::kQNorm:
          tensor.name = attention + "query_layernorm.weight";
          break;
        case TensorRole::kKNorm:
          tensor.name = attention + "key_layernorm.weight";
          break;
        case TensorRole::kO:
          tensor.name = attention + "dense.weight";
          break;
        case TensorRole::kOBias:
          tensor.name = attention + "dense.bias";
          break;
        case TensorRole::kRouterCorrection:
          tensor.name = LayerPrefix(tensor.layer) + "mlp.gate.expert_bias";
          break;
        default:
          break;
      }
    }
    return out;
  }

  Status Unfuse(const core::ModelSpec& spec, TensorIndex& index) const override {
    const core::AttentionSpec& a = spec.attention;
    EM_RETURN_IF_ERROR(SplitStackedExperts({}, index));
    const std::int64_t kv = std::int64_t{a.kv_heads} * a.head_dim;
    return SplitFusedRows(kFused, {{"q", std::int64_t{a.heads} * a.head_dim}, {"k", kv}, {"v", kv}}, index);
  }

  Json Config(const core::ModelSpec& spec) const override {
    const core::MoeSpec& moe = spec.moe;
    const bool v2 = moe.scores == core::MoeSpec::Scores::kSigmoid;
    Json config = DecoderConfig(spec);
    config["architectures"] = {v2 ? kV2 : "BailingMoeForCausalLM"};
    config.erase("attention_bias");
    config["use_qkv_bias"] = spec.attention.qkv_bias;
    config["use_bias"] = spec.attention.o_bias;
    config["norm_head"] = spec.head_norm;
    config["num_experts"] = moe.experts;
    config["num_experts_per_tok"] = moe.top_k;
    config["moe_intermediate_size"] = moe.expert_width;
    const bool even = moe.shared_width % moe.expert_width == 0;
    config["num_shared_experts"] = even ? moe.shared_width / moe.expert_width : 1;
    if (!even) config["moe_shared_expert_intermediate_size"] = moe.shared_width;
    config["norm_topk_prob"] = moe.renormalize;
    int dense = 0;
    for (const core::LayerSpec& layer : spec.layers) {
      if (layer.moe) continue;
      ++dense;
      config["intermediate_size"] = layer.dense_width;
    }
    config["first_k_dense_replace"] = dense;
    if (!v2) return config;
    config["partial_rotary_factor"] = static_cast<double>(spec.attention.RopeDim()) / spec.attention.head_dim;
    config["use_qk_norm"] = spec.attention.qk_norm;
    config["score_function"] = "sigmoid";
    config["moe_router_enable_expert_bias"] = moe.correction;
    config["n_group"] = moe.groups;
    config["topk_group"] = moe.chosen_groups;
    config["routed_scaling_factor"] = std::stod(fmt::format("{:.9g}", moe.scaling));
    return config;
  }

 private:
  static bool IsV2(const ConfigReader& config) {
    const Json* names = config.Find("architectures");
    return names != nullptr && names->is_array() && std::ranges::find(*names, kV2) != names->end();
  }

  static Status ReadV1(const ConfigReader& config, core::ModelSpec& spec) {
    EM_RETURN_IF_ERROR(config.Only("score_function", "softmax"));
    EM_RETURN_IF_ERROR(config.Only("use_qk_norm", false));
    EM_RETURN_IF_ERROR(OnlyWholeRope(config));
    EM_RETURN_IF_ERROR(config.Only("rotary_dim", spec.attention.head_dim));
    EM_ASSIGN_OR_RETURN(const bool renormalize, config.Bool("norm_topk_prob", false));
    spec.moe.renormalize = renormalize && spec.moe.top_k > 1;
    return {};
  }

  static Status ReadV2(const ConfigReader& config, core::ModelSpec& spec) {
    core::MoeSpec& moe = spec.moe;
    EM_RETURN_IF_ERROR(config.Only("score_function", "sigmoid"));
    EM_ASSIGN_OR_RETURN(spec.attention.qk_norm, config.Bool("use_qk_norm", false));
    EM_RETURN_IF_ERROR(ReadPartialRope(config, 1.0, spec));
    EM_RETURN_IF_ERROR(config.Only("rotary_dim", spec.attention.RopeDim()));
    EM_RETURN_IF_ERROR(ReadGroups(config, moe));
    moe.scores = core::MoeSpec::Scores::kSigmoid;
    moe.group_score = core::MoeSpec::GroupScore::kTopTwoSum;
    EM_ASSIGN_OR_RETURN(moe.correction, config.Bool("moe_router_enable_expert_bias", false));
    moe.renormalize = moe.top_k > 1;  // whatever norm_topk_prob says, as in the original's code
    EM_ASSIGN_OR_RETURN(const double scaling, config.Number("routed_scaling_factor", 1e-6, 1e6, 1.0));
    moe.scaling = static_cast<float>(scaling);
    return {};
  }

  bool v2_;
};

}  // namespace

const Family& BailingMoe() {
  static const BailingMoeFamily family(false);
  return family;
}

const Family& BailingMoeV2() {
  static const BailingMoeFamily family(true);
  return family;
}

}  // namespace elasticmoe::model
