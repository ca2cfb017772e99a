#include "model/gguf/model.h"

#include <algorithm>
#include <unordered_map>
#include <unordered_set>

#include "model/config_reader.h"
#include "model/gguf/names.h"

namespace elasticmoe::model {
namespace {

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

// q, k and v in one tensor: rows of q, then of k, then of v.
std::int64_t FirstFusedRow(TensorRole role, const core::AttentionSpec& a) {
  if (role == TensorRole::kQ || role == TensorRole::kQBias) return 0;
  const bool k = role == TensorRole::kK || role == TensorRole::kKBias;
  return std::int64_t{a.heads + (k ? 0 : a.kv_heads)} * a.head_dim;
}

Status CheckFused(const GgufTensor& tensor, const core::ModelSpec& spec, const Gguf& gguf) {
  if (!tensor.shape.empty() && tensor.shape[0] == spec.attention.QkvRows()) return {};
  return Fail(ErrorCode::kInvalidArgument, "reading {}: tensor {}: shape=[{}] (expected {} rows)",
              gguf.files[tensor.file].string(), tensor.name, fmt::join(tensor.shape, ", "),
              spec.attention.QkvRows());
}

}  // namespace

std::vector<TensorName> GgufNeeded(const Gguf& gguf, const core::ModelSpec& spec,
                                   std::vector<TensorName> needed) {
  if (gguf.Find("blk.0.attn_k_b.weight") == nullptr) return needed;
  const core::AttentionSpec& a = spec.attention;
  std::vector<TensorName> out;
  for (TensorName& tensor : needed) {
    if (tensor.role != TensorRole::kKvUp) {
      out.push_back(std::move(tensor));
      continue;
    }
    const std::string module = tensor.name.substr(0, tensor.name.find("kv_b_proj"));
    out.push_back({TensorRole::kKeyUp,
                   tensor.layer,
                   -1,
                   module + "k_b_proj.weight",
                   {a.heads, a.kv_lora_rank, a.PlainDim()}});
    out.push_back({TensorRole::kValueUp,
                   tensor.layer,
                   -1,
                   module + "v_b_proj.weight",
                   {a.heads, a.value_dim, a.kv_lora_rank}});
  }
  return out;
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
    const std::string stored = GgufTensorName(*architecture, name.role, name.layer);
    if (stored.empty()) return Fail(ErrorCode::kUnimplemented, "tensor {} has no name in GGUF", name.name);
    auto at = by_name.find(stored);
    bool stacked = OfExpert(name.role);
    if (at == by_name.end() && stacked) {
      at = by_name.find(GgufExpertName(*architecture, name.role, name.layer, name.expert));
      stacked = false;
    }
    std::uint32_t first = 0;
    if (at == by_name.end() && architecture->fused_qkv) {
      at = by_name.find(GgufFusedName(name.role, name.layer));
      if (at != by_name.end()) {
        EM_RETURN_IF_ERROR(CheckFused(*at->second, spec, gguf));
        first = static_cast<std::uint32_t>(FirstFusedRow(name.role, spec.attention));
      }
    }
    if (at == by_name.end())
      return Fail(ErrorCode::kInvalidArgument,
                  "tensor {} for {} of shape [{}] is not in {}; is the download complete?", stored, name.name,
                  fmt::join(name.shape, ", "), gguf.files[0].string());
    EM_ASSIGN_OR_RETURN(StoredTensor tensor, Take(*at->second, name, stacked, *architecture, spec, gguf));
    if (tensor.shape != name.shape && at->first.find("attn_qkv") != at->first.npos) {
      tensor.data.bytes = tensor.data.bytes / static_cast<std::uint64_t>(tensor.shape[0]) *
                          static_cast<std::uint64_t>(name.shape[0]);
      tensor.data.order.first = first;
      tensor.shape = name.shape;
    }
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

}  // namespace elasticmoe::model
