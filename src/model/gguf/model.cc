#include "model/gguf/model.h"

#include <algorithm>
#include <array>
#include <unordered_map>
#include <unordered_set>

#include "model/config_reader.h"
#include "model/families/decoder.h"
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

Status ReadAttention(const Keys& keys, const Gguf& gguf, Json& config) {
  EM_ASSIGN_OR_RETURN(const std::int64_t hidden, keys.Int("embedding_length"));
  EM_ASSIGN_OR_RETURN(const std::int64_t heads, keys.Same("attention.head_count"));
  config["hidden_size"] = hidden;
  config["num_attention_heads"] = heads;
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
  EM_ASSIGN_OR_RETURN(config["rms_norm_eps"], keys.Number("attention.layer_norm_rms_epsilon"));
  if (keys.Has("attention.sliding_window")) {
    EM_ASSIGN_OR_RETURN(const std::int64_t window, keys.Int("attention.sliding_window"));
    if (window > 0) config["sliding_window"] = window;
  }
  return ReadRope(keys, head_dim, config);
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
  // Layers that have a dense network of their own.
  std::unordered_set<std::string_view> names;
  for (const GgufTensor& tensor : gguf.tensors) names.insert(tensor.name);
  Json dense = Json::array();
  for (std::int64_t layer = 0; layer < std::min<std::int64_t>(layers, kMaxLayers); ++layer)
    if (!names.contains(GgufTensorName(TensorRole::kRouter, static_cast<int>(layer))) &&
        names.contains(GgufTensorName(TensorRole::kDenseGate, static_cast<int>(layer))))
      dense.push_back(layer);
  config["mlp_only_layers"] = std::move(dense);
  return {};
}

std::string_view ModuleOf(std::string_view tensor) {
  return tensor.substr(0, tensor.rfind('.'));
}

// What a tensor means for `name`: itself, or its expert's part of a stack.
Expected<StoredTensor> Take(const GgufTensor& tensor, const TensorName& name, bool stacked,
                            const GgufArchitecture& architecture, const core::ModelSpec& spec,
                            const Gguf& gguf) {
  StoredTensor out;
  out.name = name.name;
  out.shape = tensor.shape;
  out.known = tensor.encoding.has_value();
  out.dtype = out.known ? std::string(NameOf(*tensor.encoding)) : fmt::format("ggml type {}", tensor.type);
  if (!out.known)
    return Fail(ErrorCode::kUnimplemented,
                "reading {}: tensor {}: type={} (supported: F32, F16, BF16, Q4_0 to Q8_0, Q2_K to Q6_K, "
                "IQ4_NL, IQ4_XS, MXFP4); take another quantisation of the model",
                gguf.files[tensor.file].string(), tensor.name, tensor.type);
  out.data = {*tensor.encoding, tensor.file, tensor.offset, tensor.bytes};
  if (stacked) {
    if (out.shape.size() != name.shape.size() + 1 || out.shape[0] != spec.moe.experts)
      return Fail(ErrorCode::kInvalidArgument,
                  "reading {}: tensor {}: shape=[{}] (expected {} experts of [{}])",
                  gguf.files[tensor.file].string(), tensor.name, fmt::join(out.shape, ", "), spec.moe.experts,
                  fmt::join(name.shape, ", "));
    out.shape.erase(out.shape.begin());
    out.data.bytes /= static_cast<std::uint64_t>(spec.moe.experts);
    out.data.offset += out.data.bytes * static_cast<std::uint64_t>(name.expert);
  }
  // Vectors and one-row matrices may leave out a dimension.
  std::int64_t stored = 1, wanted = 1;
  for (const std::int64_t size : out.shape) stored *= size;
  for (const std::int64_t size : name.shape) wanted *= size;
  if (stored == wanted && out.shape.back() == name.shape.back()) out.shape = name.shape;
  if (architecture.rotary_pairs && (name.role == TensorRole::kQ || name.role == TensorRole::kK))
    out.data.order.pairs_head_dim = static_cast<std::uint32_t>(spec.attention.head_dim);
  return out;
}

}  // namespace

Expected<Json> GgufConfig(const Gguf& gguf) {
  EM_ASSIGN_OR_RETURN(const std::string name, gguf.Text("general.architecture"));
  const Keys keys(gguf, name);
  std::int64_t experts = 0;
  if (keys.Has("expert_count")) {
    EM_ASSIGN_OR_RETURN(experts, keys.Int("expert_count"));
  }
  const GgufArchitecture* architecture = FindGgufArchitecture(name, experts > 0);
  if (architecture == nullptr)
    return Fail(ErrorCode::kUnimplemented, "general.architecture={} with expert_count={} (supported: {})",
                Shown(name), experts, GgufArchitectureNames());
  Json config;
  config["model_type"] = architecture->model_type;
  config["hidden_act"] = "silu";
  const GgufTensor* embedding = gguf.Find(GgufTensorName(TensorRole::kEmbedding, -1));
  if (embedding == nullptr || embedding->shape.size() != 2)
    return Fail(
        ErrorCode::kInvalidArgument, "tensor token_embd.weight: {} (expected two dimensions)",
        embedding == nullptr ? "missing" : fmt::format("shape=[{}]", fmt::join(embedding->shape, ", ")));
  config["vocab_size"] = embedding->shape[0];
  config["tie_word_embeddings"] = gguf.Find(GgufTensorName(TensorRole::kLmHead, -1)) == nullptr;
  EM_ASSIGN_OR_RETURN(const std::int64_t layers, keys.Int("block_count"));
  config["num_hidden_layers"] = layers;
  EM_ASSIGN_OR_RETURN(config["max_position_embeddings"], keys.Int("context_length"));
  if (keys.Has("feed_forward_length")) {
    EM_ASSIGN_OR_RETURN(config["intermediate_size"], keys.Same("feed_forward_length"));
  }
  EM_RETURN_IF_ERROR(ReadAttention(keys, gguf, config));
  if (experts > 0) EM_RETURN_IF_ERROR(ReadExperts(keys, *architecture, experts, gguf, layers, config));
  config["eos_token_id"] = TurnEnds(gguf);
  return config;
}

Expected<TensorIndex> GgufIndex(const Gguf& gguf, const core::ModelSpec& spec,
                                const std::vector<TensorName>& needed) {
  const GgufArchitecture* architecture = FindGgufArchitectureOf(spec.family);
  if (architecture == nullptr)
    return Fail(ErrorCode::kUnimplemented, "family {} has no names in GGUF", spec.family);
  std::unordered_map<std::string_view, const GgufTensor*> by_name;
  for (const GgufTensor& tensor : gguf.tensors) by_name.emplace(tensor.name, &tensor);
  std::unordered_set<std::string_view> used, modules;
  TensorIndex index;
  index.files = gguf.files;
  index.file_bytes = gguf.file_bytes;
  index.tensors.reserve(needed.size());
  for (const TensorName& name : needed) {
    const std::string stored = GgufTensorName(name.role, name.layer);
    if (stored.empty()) return Fail(ErrorCode::kUnimplemented, "tensor {} has no name in GGUF", name.name);
    auto at = by_name.find(stored);
    bool stacked = OfExpert(name.role);
    if (at == by_name.end() && stacked) {
      at = by_name.find(GgufExpertName(name.role, name.layer, name.expert));
      stacked = false;
    }
    if (at == by_name.end())
      return Fail(ErrorCode::kInvalidArgument,
                  "tensor {} for {} of shape [{}] is not in {}; is the download complete?", stored, name.name,
                  fmt::join(name.shape, ", "), gguf.files[0].string());
    EM_ASSIGN_OR_RETURN(StoredTensor tensor, Take(*at->second, name, stacked, *architecture, spec, gguf));
    index.tensors.push_back(std::move(tensor));
    used.insert(at->first);
    modules.insert(ModuleOf(at->first));
  }
  for (const GgufTensor& tensor : gguf.tensors) {
    if (used.contains(tensor.name)) continue;
    // Its bias, or factors of the rotation.
    if (modules.contains(ModuleOf(tensor.name)) || tensor.name.starts_with("rope_"))
      return Fail(ErrorCode::kUnimplemented, "reading {}: tensor {} has no place in {} as it is here",
                  gguf.files[tensor.file].string(), Shown(tensor.name), spec.family);
    StoredTensor left;
    left.name = tensor.name;
    left.data.file = tensor.file;
    index.tensors.push_back(std::move(left));
  }
  return index;
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
