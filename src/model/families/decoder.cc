#include "model/families/decoder.h"

#include <cmath>

namespace elasticmoe::model {
namespace {

// "rope_scaling" (with rope_theta beside it) or, in newer configs, "rope_parameters" (with rope_theta
// inside).
Status ReadRope(const ConfigReader& config, core::AttentionSpec& attention) {
  EM_ASSIGN_OR_RETURN(attention.rope_theta, config.Number("rope_theta", 1.0, 1e12, 10000.0));
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    const Json* rope = config.Find(key);
    if (!rope) continue;
    if (!rope->is_object())
      return Fail(ErrorCode::kInvalidArgument, "{}={} (expected an object or null)", key, Shown(*rope));
    const ConfigReader reader(*rope);
    for (const char* type : {"rope_type", "type"})
      if (auto status = reader.Only(type, "default"); !status) return Within(key, std::move(status.error()));
    if (!reader.Find("rope_type") && !reader.Find("type") && reader.Find("factor"))
      return Fail(ErrorCode::kUnimplemented, "{}={} (supported: null or rope_type \"default\")", key,
                  Shown(*rope));
    auto theta = reader.Number("rope_theta", 1.0, 1e12, attention.rope_theta);
    if (!theta) return Within(key, std::move(theta.error()));
    attention.rope_theta = *theta;
  }
  return config.Only("partial_rotary_factor", 1.0);
}

Status ReadAttention(const ConfigReader& config, core::ModelSpec& spec) {
  core::AttentionSpec& attention = spec.attention;
  EM_ASSIGN_OR_RETURN(attention.heads, config.Int("num_attention_heads", 1, kMaxHeads));
  EM_ASSIGN_OR_RETURN(attention.kv_heads, config.Int("num_key_value_heads", 1, kMaxHeads, attention.heads));
  if (attention.heads % attention.kv_heads != 0)
    return Fail(ErrorCode::kInvalidArgument,
                "num_key_value_heads={} (expected a divisor of num_attention_heads={})", attention.kv_heads,
                attention.heads);
  if (!config.Find("head_dim") && spec.hidden % attention.heads != 0)
    return Fail(ErrorCode::kInvalidArgument,
                "head_dim is missing and hidden_size={} is no multiple of num_attention_heads={}",
                spec.hidden, attention.heads);
  EM_ASSIGN_OR_RETURN(attention.head_dim,
                      config.Int("head_dim", 1, kMaxHeadDim, spec.hidden / attention.heads));
  if (attention.head_dim % 2 != 0 || attention.head_dim < 2 || attention.head_dim > kMaxHeadDim)
    return Fail(ErrorCode::kInvalidArgument, "head_dim={} (expected an even number from 2 to {})",
                attention.head_dim, kMaxHeadDim);
  EM_ASSIGN_OR_RETURN(attention.qkv_bias, config.Bool("attention_bias", false));
  attention.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(attention.head_dim)));
  return ReadRope(config, attention);
}

}  // namespace

Status ReadDecoder(const ConfigReader& config, core::ModelSpec& spec) {
  EM_RETURN_IF_ERROR(config.Only("hidden_act", "silu"));
  EM_ASSIGN_OR_RETURN(spec.vocab, config.Int("vocab_size", 1, kMaxVocab));
  EM_ASSIGN_OR_RETURN(spec.hidden, config.Int("hidden_size", 1, kMaxHidden));
  EM_ASSIGN_OR_RETURN(spec.max_positions, config.Int("max_position_embeddings", 1, kMaxPositions));
  EM_ASSIGN_OR_RETURN(const double rms_eps, config.Number("rms_norm_eps", 1e-12, 1.0, 1e-6));
  spec.rms_eps = static_cast<float>(rms_eps);
  EM_ASSIGN_OR_RETURN(spec.tied_head, config.Bool("tie_word_embeddings", false));
  EM_RETURN_IF_ERROR(ReadAttention(config, spec));
  EM_ASSIGN_OR_RETURN(spec.eos_ids, config.Ints("eos_token_id", 0, spec.vocab - 1));
  if (const Json* types = config.Find("layer_types"); types && types->is_array())
    for (const Json& type : *types)
      if (type != "full_attention")
        return Fail(ErrorCode::kUnimplemented, "layer_types holds {} (supported: \"full_attention\")",
                    Shown(type));
  EM_ASSIGN_OR_RETURN(const int layers, config.Int("num_hidden_layers", 1, kMaxLayers));
  spec.layers.assign(static_cast<std::size_t>(layers), core::LayerSpec{});
  return {};
}

Status ReadExperts(const ConfigReader& config, const char* experts_key, core::ModelSpec& spec) {
  EM_ASSIGN_OR_RETURN(spec.moe.experts, config.Int(experts_key, 1, kMaxExperts));
  if (spec.moe.experts * spec.LayerCount() > kMaxLayerExperts)
    return Fail(ErrorCode::kInvalidArgument, "{}={} times num_hidden_layers={} (limit={})", experts_key,
                spec.moe.experts, spec.LayerCount(), kMaxLayerExperts);
  EM_ASSIGN_OR_RETURN(spec.moe.top_k, config.Int("num_experts_per_tok", 1, spec.moe.experts));
  return {};
}

Json DecoderConfig(const core::ModelSpec& spec) {
  Json config;
  config["model_type"] = spec.family;
  config["vocab_size"] = spec.vocab;
  config["hidden_size"] = spec.hidden;
  config["num_hidden_layers"] = spec.LayerCount();
  config["num_attention_heads"] = spec.attention.heads;
  config["num_key_value_heads"] = spec.attention.kv_heads;
  config["head_dim"] = spec.attention.head_dim;
  config["attention_bias"] = spec.attention.qkv_bias;
  config["hidden_act"] = "silu";
  config["max_position_embeddings"] = spec.max_positions;
  // A decimal of six digits reads back as the same float and looks as it was written.
  config["rms_norm_eps"] = std::stod(fmt::format("{:.6g}", spec.rms_eps));
  config["rope_theta"] = spec.attention.rope_theta;
  config["rope_scaling"] = nullptr;
  config["tie_word_embeddings"] = spec.tied_head;
  config["torch_dtype"] = "bfloat16";
  config["bos_token_id"] = nullptr;
  config["eos_token_id"] = nullptr;
  if (spec.eos_ids.size() == 1) config["eos_token_id"] = spec.eos_ids[0];
  if (spec.eos_ids.size() > 1) config["eos_token_id"] = spec.eos_ids;
  return config;
}

void AddGlobalTensors(const core::ModelSpec& spec, std::vector<TensorName>& out) {
  out.push_back({TensorRole::kEmbedding, -1, -1, "model.embed_tokens.weight", {spec.vocab, spec.hidden}});
  out.push_back({TensorRole::kFinalNorm, -1, -1, "model.norm.weight", {spec.hidden}});
  if (!spec.tied_head)
    out.push_back({TensorRole::kLmHead, -1, -1, "lm_head.weight", {spec.vocab, spec.hidden}});
}

std::string LayerPrefix(int layer) {
  return fmt::format("model.layers.{}.", layer);
}

void AddAttentionTensors(const core::ModelSpec& spec, int layer, std::vector<TensorName>& out) {
  const core::AttentionSpec& attention = spec.attention;
  const std::int64_t hidden = spec.hidden;
  const std::int64_t q = std::int64_t{attention.heads} * attention.head_dim;
  const std::int64_t kv = std::int64_t{attention.kv_heads} * attention.head_dim;
  const std::string prefix = LayerPrefix(layer);
  const auto add = [&](TensorRole role, const char* name, std::vector<std::int64_t> shape) {
    out.push_back({role, layer, -1, prefix + name, std::move(shape)});
  };
  add(TensorRole::kAttentionNorm, "input_layernorm.weight", {hidden});
  add(TensorRole::kQ, "self_attn.q_proj.weight", {q, hidden});
  add(TensorRole::kK, "self_attn.k_proj.weight", {kv, hidden});
  add(TensorRole::kV, "self_attn.v_proj.weight", {kv, hidden});
  if (attention.qkv_bias) {
    add(TensorRole::kQBias, "self_attn.q_proj.bias", {q});
    add(TensorRole::kKBias, "self_attn.k_proj.bias", {kv});
    add(TensorRole::kVBias, "self_attn.v_proj.bias", {kv});
  }
  if (attention.qk_norm) {
    add(TensorRole::kQNorm, "self_attn.q_norm.weight", {attention.head_dim});
    add(TensorRole::kKNorm, "self_attn.k_norm.weight", {attention.head_dim});
  }
  add(TensorRole::kO, "self_attn.o_proj.weight", {hidden, q});
  add(TensorRole::kMlpNorm, "post_attention_layernorm.weight", {hidden});
}

}  // namespace elasticmoe::model
