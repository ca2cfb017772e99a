#include "model/families/decoder.h"

#include <algorithm>
#include <cmath>

namespace elasticmoe::model {
namespace {

constexpr char kRopeTypes[] = "default, linear, dynamic, yarn, llama3";

double YarnScale(double factor, double mscale) {
  return factor <= 1.0 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

Status ReadYarn(const ConfigReader& reader, core::ModelSpec& spec) {
  core::RopeSpec& rope = spec.attention.rope;
  EM_ASSIGN_OR_RETURN(rope.beta_fast, reader.Number("beta_fast", 1e-3, 1e6, 32.0));
  EM_ASSIGN_OR_RETURN(rope.beta_slow, reader.Number("beta_slow", 1e-3, 1e6, 1.0));
  EM_ASSIGN_OR_RETURN(rope.truncate, reader.Bool("truncate", true));
  // DeepSeek's code has defaults of its own; transformers' takes both values or neither.
  const bool latent = spec.attention.Latent();
  EM_ASSIGN_OR_RETURN(const double mscale, reader.Number("mscale", 0.0, 100.0, latent ? 1.0 : 0.0));
  double amplitude = YarnScale(rope.factor, 1.0);
  if (latent || (mscale != 0.0 && rope.mscale_all_dim != 0.0))
    amplitude = YarnScale(rope.factor, mscale) / YarnScale(rope.factor, rope.mscale_all_dim);
  EM_ASSIGN_OR_RETURN(rope.amplitude, reader.Number("attention_factor", 1e-6, 1e6, amplitude));
  return {};
}

// Yarn may say the contexts before and after instead of their quotient.
Expected<double> ReadFactor(const ConfigReader& reader, const core::ModelSpec& spec, bool yarn) {
  if (reader.Find("factor")) return reader.Number("factor", 1.0, 1e6, 1.0);
  if (!yarn || !reader.Find("original_max_position_embeddings"))
    return Fail(ErrorCode::kInvalidArgument, "factor is missing (expected a number from 1)");
  EM_ASSIGN_OR_RETURN(const int original, reader.Int("original_max_position_embeddings", 1, kMaxPositions));
  if (original > spec.max_positions)
    return Fail(ErrorCode::kInvalidArgument,
                "factor is missing and original_max_position_embeddings={} (expected at most {})", original,
                spec.max_positions);
  return static_cast<double>(spec.max_positions) / original;
}

Status ReadScaling(const ConfigReader& reader, core::ModelSpec& spec) {
  core::RopeSpec& rope = spec.attention.rope;
  EM_ASSIGN_OR_RETURN(spec.attention.rope_theta,
                      reader.Number("rope_theta", 1.0, 1e12, spec.attention.rope_theta));
  const char* key = reader.Find("rope_type") ? "rope_type" : "type";
  const Json* type = reader.Find(key);
  if (!type && reader.Find("factor"))
    return reader.Unsupported("factor={} without rope_type (expected one of {})",
                              Shown(*reader.Find("factor")), kRopeTypes);
  for (const auto& [name, value] : reader.Items())
    if (value.is_object())
      return reader.Unsupported("{}={} (supported: one set of values for all layers)", name, Shown(value));
  // "dynamic" changes nothing up to max_position_embeddings, and more is not served.
  if (!type || *type == "default" || *type == "dynamic") return {};
  using Scaling = core::RopeSpec::Scaling;
  if (*type != "linear" && *type != "yarn" && *type != "llama3")
    return reader.Unsupported("{}={} (supported: {})", key, Shown(*type), kRopeTypes);
  EM_ASSIGN_OR_RETURN(rope.factor, ReadFactor(reader, spec, *type == "yarn"));
  EM_ASSIGN_OR_RETURN(rope.mscale_all_dim, reader.Number("mscale_all_dim", 0.0, 100.0, 0.0));
  if (spec.attention.Latent() && rope.mscale_all_dim != 0.0) {
    const double correction = YarnScale(rope.factor, rope.mscale_all_dim);
    spec.attention.scale = static_cast<float>(spec.attention.scale * correction * correction);
  }
  if (*type == "linear") {
    rope.scaling = Scaling::kLinear;
    return {};
  }
  if (spec.attention.rope_theta <= 1.0)
    return Fail(ErrorCode::kInvalidArgument, "rope_theta={} (expected more than 1)",
                spec.attention.rope_theta);
  EM_ASSIGN_OR_RETURN(rope.original_positions,
                      reader.Int("original_max_position_embeddings", 1, kMaxPositions, spec.max_positions));
  if (*type == "yarn") {
    rope.scaling = Scaling::kYarn;
    return ReadYarn(reader, spec);
  }
  rope.scaling = Scaling::kLlama3;
  EM_ASSIGN_OR_RETURN(rope.low_frequency, reader.Number("low_freq_factor", 1e-3, 1e6, 1.0));
  EM_ASSIGN_OR_RETURN(rope.high_frequency, reader.Number("high_freq_factor", 1e-3, 1e6, 4.0));
  if (rope.high_frequency <= rope.low_frequency)
    return Fail(ErrorCode::kInvalidArgument, "high_freq_factor={} (expected more than low_freq_factor={})",
                rope.high_frequency, rope.low_frequency);
  return {};
}

Json ScalingConfig(const core::RopeSpec& rope) {
  using Scaling = core::RopeSpec::Scaling;
  if (rope.scaling == Scaling::kNone) return nullptr;
  Json config;
  config["factor"] = rope.factor;
  config["rope_type"] = "linear";
  config["mscale_all_dim"] = rope.mscale_all_dim;
  if (rope.scaling == Scaling::kLinear) return config;
  config["original_max_position_embeddings"] = rope.original_positions;
  if (rope.scaling == Scaling::kLlama3) {
    config["rope_type"] = "llama3";
    config["low_freq_factor"] = rope.low_frequency;
    config["high_freq_factor"] = rope.high_frequency;
    return config;
  }
  config["rope_type"] = "yarn";
  config["beta_fast"] = rope.beta_fast;
  config["beta_slow"] = rope.beta_slow;
  config["truncate"] = rope.truncate;
  config["attention_factor"] = rope.amplitude;
  return config;
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
  return ReadRope(config, spec);
}

}  // namespace

Status ReadRope(const ConfigReader& config, core::ModelSpec& spec) {
  EM_ASSIGN_OR_RETURN(spec.attention.rope_theta, config.Number("rope_theta", 1.0, 1e12, 10000.0));
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    const Json* rope = config.Find(key);
    if (!rope) continue;
    if (!rope->is_object())
      return Fail(ErrorCode::kInvalidArgument, "{}={} (expected an object or null)", key, Shown(*rope));
    if (auto status = ReadScaling(config.Inside(*rope, key), spec); !status)
      return Within(key, std::move(status.error()));
  }
  return {};
}

Status ReadDecoder(const ConfigReader& config, core::ModelSpec& spec) {
  EM_RETURN_IF_ERROR(ReadModel(config, spec));
  return ReadAttention(config, spec);
}

Status ReadModel(const ConfigReader& config, core::ModelSpec& spec) {
  const Json* activation = config.Find("hidden_act");
  if (activation && *activation != "silu" && *activation != "swish")  // two names of one function
    EM_RETURN_IF_ERROR(config.Unsupported("hidden_act={} (supported: \"silu\")", Shown(*activation)));
  EM_ASSIGN_OR_RETURN(spec.vocab, config.Int("vocab_size", 1, kMaxVocab));
  EM_ASSIGN_OR_RETURN(spec.hidden, config.Int("hidden_size", 1, kMaxHidden));
  EM_ASSIGN_OR_RETURN(spec.max_positions, config.Int("max_position_embeddings", 1, kMaxPositions));
  EM_ASSIGN_OR_RETURN(const double rms_eps, config.Number("rms_norm_eps", 1e-12, 1.0, 1e-6));
  spec.rms_eps = static_cast<float>(rms_eps);
  EM_ASSIGN_OR_RETURN(spec.tied_head, config.Bool("tie_word_embeddings", false));
  EM_ASSIGN_OR_RETURN(spec.eos_ids, config.Ints("eos_token_id", 0, spec.vocab - 1));
  EM_ASSIGN_OR_RETURN(const int layers, config.Int("num_hidden_layers", 1, kMaxLayers));
  spec.layers.assign(static_cast<std::size_t>(layers), core::LayerSpec{});
  return {};
}

Status OnlyWholeRope(const ConfigReader& config) {
  EM_RETURN_IF_ERROR(config.Only("partial_rotary_factor", 1.0));
  const Json* rope = config.Find("rope_parameters");
  if (!rope || !rope->is_object()) return {};
  return config.Inside(*rope, "rope_parameters").Only("partial_rotary_factor", 1.0);
}

Status ReadPartialRope(const ConfigReader& config, double fallback, core::ModelSpec& spec) {
  EM_ASSIGN_OR_RETURN(double part, config.Number("partial_rotary_factor", 1e-6, 1.0, fallback));
  if (const Json* rope = config.Find("rope_parameters")) {
    EM_ASSIGN_OR_RETURN(part, ConfigReader(*rope).Number("partial_rotary_factor", 1e-6, 1.0, part));
  }
  const int dim = static_cast<int>(spec.attention.head_dim * part);
  if (dim < 2 || dim % 2 != 0)
    return Fail(ErrorCode::kInvalidArgument,
                "partial_rotary_factor={} (expected an even part of head_dim={})", part,
                spec.attention.head_dim);
  spec.attention.rope.dim = dim;
  return {};
}

Status ReadExperts(const ConfigReader& config, const char* experts_key, core::ModelSpec& spec,
                   const char* top_k_key) {
  const auto or_else = [&](const char* key, std::initializer_list<const char*> others) {
    for (const char* other : others)
      if (!config.Find(key) && config.Find(other)) return other;
    return key;
  };
  experts_key = or_else(experts_key, {"num_experts", "num_local_experts"});
  top_k_key = or_else(top_k_key, {"num_experts_per_tok", "experts_per_token"});
  EM_ASSIGN_OR_RETURN(spec.moe.experts, config.Int(experts_key, 1, kMaxExperts));
  if (spec.moe.experts * spec.LayerCount() > kMaxLayerExperts)
    return Fail(ErrorCode::kInvalidArgument, "{}={} times num_hidden_layers={} (limit={})", experts_key,
                spec.moe.experts, spec.LayerCount(), kMaxLayerExperts);
  EM_ASSIGN_OR_RETURN(spec.moe.top_k, config.Int(top_k_key, 1, spec.moe.experts));
  return {};
}

Status ReadWindows(const ConfigReader& config, int first_layer, core::ModelSpec& spec) {
  const Json* types = config.Find("layer_types");
  if (types && (!types->is_array() || static_cast<int>(types->size()) != spec.LayerCount()))
    return Fail(ErrorCode::kInvalidArgument, "layer_types={} (expected a list of num_hidden_layers={})",
                Shown(*types), spec.LayerCount());
  EM_ASSIGN_OR_RETURN(int window, config.Int("sliding_window", 1, INT32_MAX, 0));
  if (window >= spec.max_positions) window = 0;  // hides nothing
  for (int layer = 0; layer < spec.LayerCount(); ++layer) {
    bool sliding = layer >= first_layer;
    if (types) {
      const Json& type = (*types)[layer];
      if (type != "full_attention" && type != "sliding_attention")
        EM_RETURN_IF_ERROR(config.Unsupported(
            "layer_types holds {} (supported: \"full_attention\", \"sliding_attention\")", Shown(type)));
      sliding = type == "sliding_attention";
      if (sliding && !config.Find("sliding_window"))
        return Fail(ErrorCode::kInvalidArgument, "sliding_window is missing (layer_types asks for it)");
    }
    spec.layers[layer].window = sliding ? window : 0;
  }
  return {};
}

Status OnlyFullAttention(const ConfigReader& config) {
  const Json* types = config.Find("layer_types");
  if (!types || !types->is_array()) return {};
  for (const Json& type : *types)
    if (type != "full_attention")
      EM_RETURN_IF_ERROR(
          config.Unsupported("layer_types holds {} (supported: \"full_attention\")", Shown(type)));
  return {};
}

void WriteWindows(const core::ModelSpec& spec, Json& config) {
  config["use_sliding_window"] = false;
  config["sliding_window"] = nullptr;
  if (std::ranges::all_of(spec.layers, [](const auto& layer) { return layer.window == 0; })) return;
  Json types = Json::array();
  for (const core::LayerSpec& layer : spec.layers) {
    types.push_back(layer.window > 0 ? "sliding_attention" : "full_attention");
    if (layer.window > 0) config["sliding_window"] = layer.window;
  }
  config["use_sliding_window"] = true;
  config["layer_types"] = std::move(types);
}

Status ReadSparseLayers(const ConfigReader& config, core::ModelSpec& spec) {
  EM_ASSIGN_OR_RETURN(const int step, config.Int("decoder_sparse_step", 1, kMaxLayers, 1));
  EM_ASSIGN_OR_RETURN(const std::vector<int> only, config.Ints("mlp_only_layers", 0, INT32_MAX));
  std::vector<bool> listed(spec.layers.size(), false);
  for (const int layer : only)
    if (layer < spec.LayerCount()) listed[layer] = true;  // others have no effect, as in the original
  for (int layer = 0; layer < spec.LayerCount(); ++layer)
    spec.layers[layer].moe = !listed[layer] && (layer + 1) % step == 0;
  if (std::ranges::none_of(spec.layers, &core::LayerSpec::moe))
    EM_RETURN_IF_ERROR(config.Unsupported(
        "decoder_sparse_step={} and mlp_only_layers leave no layer with experts (supported: at least one)",
        step));
  return ReadDenseWidth(config, spec);
}

Status ReadDenseWidth(const ConfigReader& config, core::ModelSpec& spec) {
  if (std::ranges::all_of(spec.layers, &core::LayerSpec::moe)) return {};
  EM_ASSIGN_OR_RETURN(const int width, config.Int("intermediate_size", 1, kMaxWidth));
  for (core::LayerSpec& layer : spec.layers)
    if (!layer.moe) layer.dense_width = width;
  return {};
}

void WriteSparseLayers(const core::ModelSpec& spec, Json& config) {
  config["decoder_sparse_step"] = 1;
  Json dense = Json::array();
  for (int layer = 0; layer < spec.LayerCount(); ++layer) {
    if (spec.layers[layer].moe) continue;
    dense.push_back(layer);
    config["intermediate_size"] = spec.layers[layer].dense_width;
  }
  config["mlp_only_layers"] = std::move(dense);
}

Status ReadGroups(const ConfigReader& config, core::MoeSpec& moe) {
  EM_ASSIGN_OR_RETURN(moe.groups, config.Int("n_group", 1, kMaxExperts, 1));
  EM_ASSIGN_OR_RETURN(moe.chosen_groups, config.Int("topk_group", 1, kMaxExperts, 1));
  if (moe.experts % moe.groups != 0)
    return Fail(ErrorCode::kInvalidArgument, "n_group={} (expected a divisor of the {} experts)", moe.groups,
                moe.experts);
  if (moe.chosen_groups > moe.groups)
    return Fail(ErrorCode::kInvalidArgument, "topk_group={} (expected at most n_group={})", moe.chosen_groups,
                moe.groups);
  if (moe.top_k > moe.experts / moe.groups * moe.chosen_groups)
    return Fail(ErrorCode::kInvalidArgument,
                "num_experts_per_tok={} (expected at most the {} experts of topk_group={} groups)", moe.top_k,
                moe.experts / moe.groups * moe.chosen_groups, moe.chosen_groups);
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
  config["rope_scaling"] = ScalingConfig(spec.attention.rope);
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
  add(TensorRole::kMlpNorm, "post_attention_layernorm.weight", {hidden});
  add(TensorRole::kO, "self_attn.o_proj.weight",
      {hidden, std::int64_t{attention.heads} * attention.OutDim()});
  if (attention.o_bias) add(TensorRole::kOBias, "self_attn.o_proj.bias", {hidden});
  if (attention.Latent()) {
    const std::int64_t latent = attention.kv_lora_rank;
    if (const std::int64_t rank = attention.q_lora_rank; rank > 0) {
      add(TensorRole::kQDown, "self_attn.q_a_proj.weight", {rank, hidden});
      if (attention.qkv_bias) add(TensorRole::kQBias, "self_attn.q_a_proj.bias", {rank});
      add(TensorRole::kQDownNorm, "self_attn.q_a_layernorm.weight", {rank});
      add(TensorRole::kQUp, "self_attn.q_b_proj.weight", {q, rank});
    } else {
      add(TensorRole::kQ, "self_attn.q_proj.weight", {q, hidden});
    }
    const std::int64_t down = attention.LatentDim();
    add(TensorRole::kKvDown, "self_attn.kv_a_proj_with_mqa.weight", {down, hidden});
    if (attention.qkv_bias) add(TensorRole::kKBias, "self_attn.kv_a_proj_with_mqa.bias", {down});
    add(TensorRole::kKvDownNorm, "self_attn.kv_a_layernorm.weight", {latent});
    add(TensorRole::kKvUp, "self_attn.kv_b_proj.weight",
        {std::int64_t{attention.heads} * (attention.PlainDim() + attention.value_dim), latent});
    return;
  }
  add(TensorRole::kQ, "self_attn.q_proj.weight", {q, hidden});
  add(TensorRole::kK, "self_attn.k_proj.weight", {kv, hidden});
  add(TensorRole::kV, "self_attn.v_proj.weight", {kv, hidden});
  if (attention.qkv_bias) {
    add(TensorRole::kQBias, "self_attn.q_proj.bias", {q});
    add(TensorRole::kKBias, "self_attn.k_proj.bias", {kv});
    add(TensorRole::kVBias, "self_attn.v_proj.bias", {kv});
  }
  if (attention.qk_norm || attention.qk_norm_whole) {
    const bool whole = attention.qk_norm_whole;
    add(TensorRole::kQNorm, "self_attn.q_norm.weight", {whole ? q : attention.head_dim});
    add(TensorRole::kKNorm, "self_attn.k_norm.weight", {whole ? kv : attention.head_dim});
  }
}

void AddMlpTensors(const core::ModelSpec& spec, int layer, const char* shared, std::vector<TensorName>& out) {
  using enum TensorRole;
  const std::string prefix = LayerPrefix(layer) + "mlp.";
  const auto add = [&](TensorRole gate, TensorRole up, TensorRole down, int expert, const std::string& at,
                       std::int64_t width) {
    out.push_back({gate, layer, expert, at + "gate_proj.weight", {width, spec.hidden}});
    out.push_back({up, layer, expert, at + "up_proj.weight", {width, spec.hidden}});
    out.push_back({down, layer, expert, at + "down_proj.weight", {spec.hidden, width}});
  };
  const auto add_bias = [&](bool has, TensorRole gate, TensorRole up, TensorRole down, int expert,
                            const std::string& at, std::int64_t width) {
    if (!has) return;
    out.push_back({gate, layer, expert, at + "gate_proj.bias", {width}});
    out.push_back({up, layer, expert, at + "up_proj.bias", {width}});
    out.push_back({down, layer, expert, at + "down_proj.bias", {spec.hidden}});
  };
  if (!spec.layers[layer].moe) {
    const int width = spec.layers[layer].dense_width;
    add(kDenseGate, kDenseUp, kDenseDown, -1, prefix, width);
    return add_bias(spec.dense_bias, kDenseGateBias, kDenseUpBias, kDenseDownBias, -1, prefix, width);
  }
  const core::MoeSpec& moe = spec.moe;
  out.push_back({kRouter, layer, -1, prefix + "gate.weight", {moe.experts, spec.hidden}});
  if (moe.correction)
    out.push_back({kRouterCorrection, layer, -1, prefix + "gate.e_score_correction_bias", {moe.experts}});
  for (int e = 0; e < moe.experts; ++e) {
    const std::string at = fmt::format("{}experts.{}.", prefix, e);
    add(kExpertGate, kExpertUp, kExpertDown, e, at, moe.expert_width);
    add_bias(moe.expert_bias, kExpertGateBias, kExpertUpBias, kExpertDownBias, e, at, moe.expert_width);
  }
  if (moe.shared_width == 0) return;
  const std::string at = prefix + shared + ".";
  add(kSharedGate, kSharedUp, kSharedDown, -1, at, moe.shared_width);
  add_bias(spec.dense_bias, kSharedGateBias, kSharedUpBias, kSharedDownBias, -1, at, moe.shared_width);
  if (moe.shared_gate)
    out.push_back({kSharedMix, layer, -1, prefix + shared + "_gate.weight", {1, spec.hidden}});
}

std::vector<TensorName> DecoderTensors(const core::ModelSpec& spec, const char* shared) {
  std::vector<TensorName> out;
  AddGlobalTensors(spec, out);
  for (int layer = 0; layer < spec.LayerCount(); ++layer) {
    AddAttentionTensors(spec, layer, out);
    AddMlpTensors(spec, layer, shared, out);
  }
  return out;
}

}  // namespace elasticmoe::model
