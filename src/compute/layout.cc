#include "compute/layout.h"

#include "base/check.h"
#include "compute/kv.h"

namespace elasticmoe::compute {
namespace {

constexpr int kRoles = static_cast<int>(Role::kExpertDown) + 1;

std::size_t Take(std::size_t& at, std::size_t bytes) {
  const std::size_t begin = (at + kAlign - 1) / kAlign * kAlign;
  at = begin + bytes;
  return begin;
}

const float* Floats(const std::byte* blob, const TensorPlace& place) {
  return place.n == 0 ? nullptr : reinterpret_cast<const float*>(blob + place.offset);
}

PackedMatrix Matrix(const std::byte* blob, const TensorPlace& place) {
  if (place.n == 0) return {};
  return {reinterpret_cast<const Bf16*>(blob + place.offset), place.n_fused, place.k};
}

}  // namespace

KvLayout KvLayout::Of(const core::ModelSpec& spec, int element_bytes) {
  return {spec.LayerCount(), spec.attention.kv_heads, spec.attention.head_dim, element_bytes};
}

std::size_t WeightLayout::Index(Role role, int layer) const {
  return static_cast<std::size_t>(layer + 1) * kRoles + static_cast<int>(role);
}

const TensorPlace& WeightLayout::Place(Role role, int layer) const {
  const bool expert = role == Role::kExpertGate || role == Role::kExpertUp || role == Role::kExpertDown;
  const TensorPlace& place = places_[Index(role, expert ? -1 : layer)];
  EM_CHECK(place.n > 0, "role={} layer={}", static_cast<int>(role), layer);
  return place;
}

WeightLayout::WeightLayout(const core::ModelSpec& spec)
    : places_(static_cast<std::size_t>(spec.LayerCount() + 1) * kRoles) {
  std::size_t at = 0;
  const auto vector = [&](Role role, int layer, int n, int k = 1) {
    places_[Index(role, layer)] = {Take(at, std::size_t(n) * k * sizeof(float)), 0, n, n, k, false};
  };
  const auto matrix = [&](Role role, int layer, int n, int k) {
    places_[Index(role, layer)] = {Take(at, PackedBytes(n, k)), 0, n, n, k, true};
  };
  const core::AttentionSpec& a = spec.attention;
  matrix(Role::kEmbedding, -1, spec.vocab, spec.hidden);
  if (!spec.tied_head) matrix(Role::kLmHead, -1, spec.vocab, spec.hidden);
  vector(Role::kFinalNorm, -1, spec.hidden);
  const int q = a.heads * a.head_dim;
  const int kv = a.kv_heads * a.head_dim;
  for (int layer = 0; layer < spec.LayerCount(); ++layer) {
    vector(Role::kAttentionNorm, layer, spec.hidden);
    const std::size_t qkv = Take(at, PackedBytes(a.QkvRows(), spec.hidden));
    places_[Index(Role::kQ, layer)] = {qkv, 0, q, a.QkvRows(), spec.hidden, true};
    places_[Index(Role::kK, layer)] = {qkv, q, kv, a.QkvRows(), spec.hidden, true};
    places_[Index(Role::kV, layer)] = {qkv, q + kv, kv, a.QkvRows(), spec.hidden, true};
    if (a.qkv_bias) {
      const std::size_t bias = Take(at, a.QkvRows() * sizeof(float));
      places_[Index(Role::kQBias, layer)] = {bias, 0, q, a.QkvRows(), 1, false};
      places_[Index(Role::kKBias, layer)] = {bias, q, kv, a.QkvRows(), 1, false};
      places_[Index(Role::kVBias, layer)] = {bias, q + kv, kv, a.QkvRows(), 1, false};
    }
    if (a.qk_norm) {
      vector(Role::kQNorm, layer, a.head_dim);
      vector(Role::kKNorm, layer, a.head_dim);
    }
    matrix(Role::kO, layer, spec.hidden, q);
    vector(Role::kMlpNorm, layer, spec.hidden);
    if (spec.layers[layer].moe) {
      vector(Role::kRouter, layer, spec.moe.experts, spec.hidden);
    } else {
      matrix(Role::kDenseGate, layer, spec.layers[layer].dense_width, spec.hidden);
      matrix(Role::kDenseUp, layer, spec.layers[layer].dense_width, spec.hidden);
      matrix(Role::kDenseDown, layer, spec.hidden, spec.layers[layer].dense_width);
    }
  }
  shared_bytes_ = (at + kAlign - 1) / kAlign * kAlign;
  if (spec.moe.experts > 0) {
    at = 0;
    matrix(Role::kExpertGate, -1, spec.moe.expert_width, spec.hidden);
    matrix(Role::kExpertUp, -1, spec.moe.expert_width, spec.hidden);
    matrix(Role::kExpertDown, -1, spec.hidden, spec.moe.expert_width);
    expert_bytes_ = (at + kAlign - 1) / kAlign * kAlign;
  }
}

void PackTensor(const TensorPlace& place, const void* source, DType type, std::byte* blob) {
  if (place.packed) {
    PackRows(source, type, place.row_begin, place.n, place.k, reinterpret_cast<Bf16*>(blob + place.offset));
  } else {
    ConvertToFloat(source, type, std::size_t(place.n) * place.k,
                   reinterpret_cast<float*>(blob + place.offset) + std::size_t(place.row_begin) * place.k);
  }
}

SharedWeights BindShared(const core::ModelSpec& spec, const WeightLayout& layout, const std::byte* blob) {
  SharedWeights weights;
  weights.embedding = Matrix(blob, layout.Place(Role::kEmbedding));
  weights.lm_head = spec.tied_head ? weights.embedding : Matrix(blob, layout.Place(Role::kLmHead));
  weights.final_norm = Floats(blob, layout.Place(Role::kFinalNorm));
  for (int i = 0; i < spec.LayerCount(); ++i) {
    LayerWeights layer;
    layer.attention_norm = Floats(blob, layout.Place(Role::kAttentionNorm, i));
    layer.qkv = Matrix(blob, layout.Place(Role::kQ, i));
    if (spec.attention.qkv_bias) layer.qkv_bias = Floats(blob, layout.Place(Role::kQBias, i));
    if (spec.attention.qk_norm) {
      layer.q_norm = Floats(blob, layout.Place(Role::kQNorm, i));
      layer.k_norm = Floats(blob, layout.Place(Role::kKNorm, i));
    }
    layer.o = Matrix(blob, layout.Place(Role::kO, i));
    layer.mlp_norm = Floats(blob, layout.Place(Role::kMlpNorm, i));
    if (spec.layers[i].moe) {
      layer.router = Floats(blob, layout.Place(Role::kRouter, i));
    } else {
      layer.dense = {Matrix(blob, layout.Place(Role::kDenseGate, i)),
                     Matrix(blob, layout.Place(Role::kDenseUp, i)),
                     Matrix(blob, layout.Place(Role::kDenseDown, i))};
    }
    weights.layers.push_back(layer);
  }
  return weights;
}

MlpWeights BindExpert(const core::ModelSpec&, const WeightLayout& layout, const std::byte* blob) {
  return {Matrix(blob, layout.Place(Role::kExpertGate)), Matrix(blob, layout.Place(Role::kExpertUp)),
          Matrix(blob, layout.Place(Role::kExpertDown))};
}

}  // namespace elasticmoe::compute
