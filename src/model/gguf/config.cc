// GGUF's metadata as config.json. What a family makes of them is checked there.
#include <algorithm>
#include <array>
#include <cmath>
#include <unordered_set>

#include "model/config_reader.h"
#include "model/families/decoder.h"
#include "model/gguf/model.h"
#include "model/gguf/names.h"

namespace elasticmoe::model {
namespace {

// What ends a turn in the chat formats of the models here, whichever of them the metadata lists.
constexpr std::array<std::string_view, 8> kTurnEnds = {
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>",
    "<|eom_id|>", "<|return|>",    "<|call|>",   "<｜end▁of▁sentence｜>"};
constexpr std::int64_t kControlToken = 3;  // in tokenizer.ggml.token_type

// Metadata of one architecture; every value is checked again by the family that reads the config.
class Keys {
 public:
  Keys(const Gguf& gguf, std::string_view architecture) : gguf_(gguf), prefix_(architecture) {
    prefix_ += '.';
  }

  bool Has(std::string_view key) const { return gguf_.Has(prefix_ + std::string(key)); }
  Expected<std::int64_t> Int(std::string_view key) const { return gguf_.Int(prefix_ + std::string(key)); }
  Expected<double> Number(std::string_view key) const { return gguf_.Number(prefix_ + std::string(key)); }
  Expected<std::string> Text(std::string_view key) const { return gguf_.Text(prefix_ + std::string(key)); }

  // An integer, or a list of them that are all the same.
  Expected<std::int64_t> Same(std::string_view key) const {
    const auto* list = gguf_.Get<std::vector<std::int64_t>>(prefix_ + std::string(key));
    if (list == nullptr || list->empty()) return Int(key);
    if (std::ranges::adjacent_find(*list, std::not_equal_to<>()) != list->end())
      return Fail(ErrorCode::kUnimplemented, "{}{} differs between layers (supported: the same for all)",
                  prefix_, key);
    return list->front();
  }

 private:
  const Gguf& gguf_;
  std::string prefix_;
};

Json TurnEnds(const Gguf& gguf) {
  std::vector<std::int64_t> ids;
  const auto add = [&](std::int64_t id) {
    if (std::ranges::find(ids, id) == ids.end()) ids.push_back(id);
  };
  for (const char* key :
       {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"})
    if (const auto* id = gguf.Get<std::int64_t>(key)) add(*id);
  const auto tokens = gguf.Texts("tokenizer.ggml.tokens");
  const auto* types = gguf.Get<std::vector<std::int64_t>>("tokenizer.ggml.token_type");
  if (tokens && types != nullptr && types->size() == tokens->size())
    for (std::size_t i = 0; i < tokens->size(); ++i)
      if ((*types)[i] == kControlToken && std::ranges::find(kTurnEnds, (*tokens)[i]) != kTurnEnds.end())
        add(static_cast<std::int64_t>(i));
  return ids.empty() ? Json(nullptr) : Json(ids);
}

Status ReadRope(const Keys& keys, std::int64_t head_dim, Json& config) {
  if (keys.Has("rope.freq_base")) {
    EM_ASSIGN_OR_RETURN(config["rope_theta"], keys.Number("rope.freq_base"));
  }
  if (keys.Has("rope.dimension_count")) {
    EM_ASSIGN_OR_RETURN(const std::int64_t rotated, keys.Int("rope.dimension_count"));
    if (rotated != head_dim)
      config["partial_rotary_factor"] = static_cast<double>(rotated) / static_cast<double>(head_dim);
  }
  if (!keys.Has("rope.scaling.type")) return {};
  EM_ASSIGN_OR_RETURN(const std::string type, keys.Text("rope.scaling.type"));
  if (type == "none") return {};
  Json rope = {{"rope_type", type}};
  if (keys.Has("rope.scaling.yarn_log_multiplier")) {
    // A tenth of DeepSeek's mscale_all_dim, which is its mscale too.
    EM_ASSIGN_OR_RETURN(const double multiplier, keys.Number("rope.scaling.yarn_log_multiplier"));
    rope["mscale"] = rope["mscale_all_dim"] = std::round(multiplier * 1e7) / 1e6;
  }
  if (config["model_type"] == "gpt_oss") rope["truncate"] = false;  // the metadata have no word for it
  const std::array<std::pair<const char*, const char*>, 4> rows = {
      {{"factor", "rope.scaling.factor"},
       {"original_max_position_embeddings", "rope.scaling.original_context_length"},
       {"beta_fast", "rope.scaling.yarn_beta_fast"},
       {"beta_slow", "rope.scaling.yarn_beta_slow"}}};
  for (const auto& [name, key] : rows) {
    if (!keys.Has(key)) continue;
    if (auto integer = keys.Int(key)) {
      rope[name] = *integer;
      continue;
    }
    EM_ASSIGN_OR_RETURN(rope[name], keys.Number(key));
  }
  config["rope_scaling"] = std::move(rope);
  return {};
}

// Latent attention: key_length and value_length are a head's in older files; where they are the latent's, the
// head's are called key_length_mla and value_length_mla.
Status ReadLatents(const Keys& keys, Json& config) {
  const bool mla = keys.Has("attention.key_length_mla");
  EM_ASSIGN_OR_RETURN(const std::int64_t key,
                      keys.Int(mla ? "attention.key_length_mla" : "attention.key_length"));
  EM_ASSIGN_OR_RETURN(config["v_head_dim"],
                      keys.Int(mla ? "attention.value_length_mla" : "attention.value_length"));
  EM_ASSIGN_OR_RETURN(config["kv_lora_rank"], keys.Int("attention.kv_lora_rank"));
  if (keys.Has("attention.q_lora_rank")) {
    EM_ASSIGN_OR_RETURN(config["q_lora_rank"], keys.Int("attention.q_lora_rank"));
  }
  EM_ASSIGN_OR_RETURN(const std::int64_t rotated, keys.Int("rope.dimension_count"));
  config["qk_rope_head_dim"] = rotated;
  config["qk_nope_head_dim"] = key - rotated;
  EM_ASSIGN_OR_RETURN(config["rms_norm_eps"], keys.Number("attention.layer_norm_rms_epsilon"));
  return ReadRope(keys, rotated, config);
}

Status ReadAttention(const Keys& keys, const Gguf& gguf, Json& config) {
  EM_ASSIGN_OR_RETURN(const std::int64_t hidden, keys.Int("embedding_length"));
  EM_ASSIGN_OR_RETURN(const std::int64_t heads, keys.Same("attention.head_count"));
  config["hidden_size"] = hidden;
  config["num_attention_heads"] = heads;
  if (keys.Has("attention.kv_lora_rank")) return ReadLatents(keys, config);
  if (keys.Has("attention.head_count_kv")) {
    EM_ASSIGN_OR_RETURN(config["num_key_value_heads"], keys.Same("attention.head_count_kv"));
  }
  std::int64_t head_dim = heads > 0 ? hidden / heads : 0;
  if (keys.Has("attention.key_length")) {
    EM_ASSIGN_OR_RETURN(head_dim, keys.Int("attention.key_length"));
    if (keys.Has("attention.value_length")) {
      EM_ASSIGN_OR_RETURN(const std::int64_t value, keys.Int("attention.value_length"));
      if (value != head_dim)
        return Fail(ErrorCode::kUnimplemented,
                    "attention.value_length={} (supported: attention.key_length={})", value, head_dim);
    }
  }
  if (head_dim < 1)
    return Fail(ErrorCode::kInvalidArgument, "attention.head_count={} does not fit embedding_length={}",
                heads, hidden);
  config["head_dim"] = head_dim;
  config["attention_bias"] = gguf.Find("blk.0.attn_q.bias") != nullptr;
  config["mlp_bias"] = gguf.Find("blk.0.ffn_gate.bias") != nullptr;
  config["use_qk_norm"] = gguf.Find("blk.0.attn_q_norm.weight") != nullptr;
  EM_ASSIGN_OR_RETURN(config["rms_norm_eps"], keys.Number("attention.layer_norm_rms_epsilon"));
  if (keys.Has("attention.sliding_window")) {
    EM_ASSIGN_OR_RETURN(const std::int64_t window, keys.Int("attention.sliding_window"));
    if (window > 0) config["sliding_window"] = window;
  }
  return ReadRope(keys, head_dim, config);
}

// The experts of DeepSeek, GLM, Ling and ERNIE.
Status ReadRouting(const Keys& keys, const GgufArchitecture& architecture, const Gguf& gguf, Json& config) {
  struct Row {
    std::string_view name;
    const char* key;
    int without;
  };
  for (const Row& row :
       {Row{architecture.shared_key, "expert_shared_count", 0},
        Row{architecture.dense_key, "leading_dense_block_count", 0}, Row{"n_group", "expert_group_count", 1},
        Row{"topk_group", "expert_group_used_count", 1}}) {
    Json& value = config[std::string(row.name)];
    value = row.without;
    if (!keys.Has(row.key)) continue;
    EM_ASSIGN_OR_RETURN(value, keys.Int(row.key));
  }
  const std::string_view type = architecture.model_type;
  const auto any = [&](TensorRole role) {
    return std::ranges::any_of(gguf.tensors, [&](const GgufTensor& tensor) {
      return tensor.name.ends_with(GgufTensorName(architecture, role, 0).substr(std::string("blk.0").size()));
    });
  };
  if (type == "ernie4_5_moe") {
    config["use_bias"] = gguf.Find("blk.0.attn_q.bias") != nullptr;
    config["moe_use_aux_free"] = any(TensorRole::kRouterCorrection);
    if (keys.Has("interleave_moe_layer_step")) {
      EM_ASSIGN_OR_RETURN(config["moe_layer_interval"], keys.Int("interleave_moe_layer_step"));
    }
    return {};
  }
  if (type.starts_with("bailing")) {
    for (const char* name : {"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"})
      if (gguf.Find(name) != nullptr) config["use_qkv_bias"] = true;
    config["use_bias"] = gguf.Find("blk.0.attn_output.bias") != nullptr;
    config["score_function"] = architecture.gating == GgufGating::kSigmoid ? "sigmoid" : "softmax";
    config["moe_router_enable_expert_bias"] = any(TensorRole::kRouterCorrection);
    // Tools differ in what they write as the shared experts' width: it is that of their matrix.
    const std::string ending = GgufTensorName(architecture, TensorRole::kSharedGate, 0).substr(5);
    const auto gate = std::ranges::find_if(
        gguf.tensors, [&](const GgufTensor& tensor) { return tensor.name.ends_with(ending); });
    const std::int64_t count = config[std::string(architecture.shared_key)].get<std::int64_t>();
    if (gate != gguf.tensors.end() && count > 0 && !gate->shape.empty() && gate->shape[0] % count == 0)
      config["moe_shared_expert_intermediate_size"] = gate->shape[0] / count;
  }
  if (keys.Has("expert_weights_scale")) {
    EM_ASSIGN_OR_RETURN(const double scale, keys.Number("expert_weights_scale"));
    if (scale != 0) config["routed_scaling_factor"] = scale;  // 0: not scaled
  }
  const bool sigmoid = architecture.gating == GgufGating::kSigmoid;
  if (type == "bailing_moe" && config.contains("routed_scaling_factor") &&
      config["routed_scaling_factor"] != 1)
    return Fail(ErrorCode::kUnimplemented, "{}.expert_weights_scale={} (supported: 1)", architecture.name,
                Shown(config["routed_scaling_factor"]));
  if (architecture.name != "deepseek2") return {};
  config["scoring_func"] = sigmoid ? "sigmoid" : "softmax";
  config["topk_method"] = sigmoid ? "noaux_tc" : config["n_group"] != 1 ? "group_limited_greedy" : "greedy";
  return {};
}

Status ReadExperts(const Keys& keys, const GgufArchitecture& architecture, std::int64_t experts,
                   const Gguf& gguf, std::int64_t layers, Json& config) {
  config[std::string(architecture.experts_key)] = experts;
  EM_ASSIGN_OR_RETURN(config["num_experts_per_tok"], keys.Int("expert_used_count"));
  const bool own = keys.Has("expert_feed_forward_length") || !architecture.width_is_experts;
  EM_ASSIGN_OR_RETURN(config[std::string(architecture.expert_width_key)],
                      keys.Int(own ? "expert_feed_forward_length" : "feed_forward_length"));
  config["norm_topk_prob"] = architecture.renormalize;
  if (const auto* norm = gguf.Get<bool>(fmt::format("{}.expert_weights_norm", architecture.name)))
    config["norm_topk_prob"] = *norm;
  if (keys.Has("expert_shared_feed_forward_length")) {
    EM_ASSIGN_OR_RETURN(config["shared_expert_intermediate_size"],
                        keys.Int("expert_shared_feed_forward_length"));
  }
  if (!architecture.shared_key.empty()) EM_RETURN_IF_ERROR(ReadRouting(keys, architecture, gguf, config));
  // Layers that have a dense network of their own.
  std::unordered_set<std::string_view> names;
  for (const GgufTensor& tensor : gguf.tensors) names.insert(tensor.name);
  Json dense = Json::array();
  for (std::int64_t layer = 0; layer < std::min<std::int64_t>(layers, kMaxLayers); ++layer)
    if (!names.contains(GgufTensorName(architecture, TensorRole::kRouter, static_cast<int>(layer))) &&
        names.contains(GgufTensorName(architecture, TensorRole::kDenseGate, static_cast<int>(layer))))
      dense.push_back(layer);
  config["mlp_only_layers"] = std::move(dense);
  return {};
}

}  // namespace

Expected<Json> GgufConfig(const Gguf& gguf) {
  EM_ASSIGN_OR_RETURN(const std::string name, gguf.Text("general.architecture"));
  const Keys keys(gguf, name);
  std::int64_t experts = 0;
  if (keys.Has("expert_count")) {
    EM_ASSIGN_OR_RETURN(experts, keys.Int("expert_count"));
  }
  std::int64_t gating = 0;
  if (keys.Has("expert_gating_func")) {
    EM_ASSIGN_OR_RETURN(gating, keys.Int("expert_gating_func"));
  }
  const GgufArchitecture* architecture = FindGgufArchitecture(name, experts > 0, gating);
  if (architecture == nullptr)
    return Fail(ErrorCode::kUnimplemented,
                "general.architecture={} with expert_count={}, expert_gating_func={} (supported: {})",
                Shown(name), experts, gating, GgufArchitectureNames());
  Json config;
  config["model_type"] = architecture->model_type;
  config["hidden_act"] = "silu";
  const GgufTensor* embedding = gguf.Find(GgufTensorName(*architecture, TensorRole::kEmbedding, -1));
  if (embedding == nullptr || embedding->shape.size() != 2)
    return Fail(
        ErrorCode::kInvalidArgument, "tensor token_embd.weight: {} (expected two dimensions)",
        embedding == nullptr ? "missing" : fmt::format("shape=[{}]", fmt::join(embedding->shape, ", ")));
  config["vocab_size"] = embedding->shape[0];
  config["tie_word_embeddings"] =
      gguf.Find(GgufTensorName(*architecture, TensorRole::kLmHead, -1)) == nullptr;
  EM_ASSIGN_OR_RETURN(std::int64_t layers, keys.Int("block_count"));
  if (keys.Has("nextn_predict_layers")) {  // they come last and are counted
    EM_ASSIGN_OR_RETURN(const std::int64_t next, keys.Int("nextn_predict_layers"));
    layers -= next;
  }
  config["num_hidden_layers"] = layers;
  EM_ASSIGN_OR_RETURN(config["max_position_embeddings"], keys.Int("context_length"));
  if (keys.Has("feed_forward_length")) {
    EM_ASSIGN_OR_RETURN(config["intermediate_size"], keys.Same("feed_forward_length"));
  }
  EM_RETURN_IF_ERROR(ReadAttention(keys, gguf, config));
  if (experts > 0) EM_RETURN_IF_ERROR(ReadExperts(keys, *architecture, experts, gguf, layers, config));
  config["eos_token_id"] = TurnEnds(gguf);
  // What metadata leave out is not there, whatever a config.json without the key would mean.
  EM_ASSIGN_OR_RETURN(const Family* family, FindFamily(architecture->model_type));
  const Json defaults = family->Defaults();
  for (const auto& [key, unused] : defaults.items())
    if (!config.contains(key)) config[key] = nullptr;
  return config;
}

Json GgufGenerationConfig(const Gguf& gguf) {
  Json config = Json::object();
  for (const auto& [name, key] :
       {std::pair("temperature", "temp"), std::pair("top_p", "top_p"), std::pair("min_p", "min_p"),
        std::pair("repetition_penalty", "penalty_repeat"), std::pair("top_k", "top_k")}) {
    const auto at = gguf.metadata.find(fmt::format("general.sampling.{}", key));
    if (at == gguf.metadata.end()) continue;
    if (const auto* integer = std::get_if<std::int64_t>(&at->second)) config[name] = *integer;
    if (const auto* number = std::get_if<double>(&at->second)) config[name] = *number;
  }
  return config;
}

}  // namespace elasticmoe::model
