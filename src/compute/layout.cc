#include "compute/layout.h"

#include <array>

#include "base/check.h"
#include "compute/kv.h"

namespace elasticmoe::compute {
namespace {

constexpr int kRoles = static_cast<int>(Role::kExpertDownBias) + 1;

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
  return {blob + place.offset, place.n_fused, place.k, place.format};
}

// What an MLP consists of: gate, up and down, and their biases.
using MlpRoles = std::array<Role, 6>;
constexpr MlpRoles kDenseRoles = {Role::kDenseGate,     Role::kDenseUp,     Role::kDenseDown,
                                  Role::kDenseGateBias, Role::kDenseUpBias, Role::kDenseDownBias};
constexpr MlpRoles kSharedRoles = {Role::kSharedGate,     Role::kSharedUp,     Role::kSharedDown,
                                   Role::kSharedGateBias, Role::kSharedUpBias, Role::kSharedDownBias};
constexpr MlpRoles kExpertRoles = {Role::kExpertGate,     Role::kExpertUp,     Role::kExpertDown,
                                   Role::kExpertGateBias, Role::kExpertUpBias, Role::kExpertDownBias};

void BindMlp(const WeightLayout& layout, const std::byte* blob, int layer, bool bias, const MlpRoles& roles,
             MlpWeights& out) {
  const auto place = [&](int i) -> const TensorPlace& { return layout.Place(roles[i], layer); };
  out = {Matrix(blob, place(0)), Matrix(blob, place(1)), Matrix(blob, place(2))};
  if (!bias) return;
  out.gate_bias = Floats(blob, place(3));
  out.up_bias = Floats(blob, place(4));
  out.down_bias = Floats(blob, place(5));
}

void BindLatent(const core::ModelSpec& spec, const WeightLayout& layout, const std::byte* blob, int layer,
                LayerWeights& out) {
  const core::AttentionSpec& a = spec.attention;
  if (a.q_lora_rank > 0) {
    out.q_up = Matrix(blob, layout.Place(Role::kQUp, layer));
    out.q_down_norm = Floats(blob, layout.Place(Role::kQDownNorm, layer));
  }
  out.kv_down_norm = Floats(blob, layout.Place(Role::kKvDownNorm, layer));
  const TensorPlace& up = layout.Place(Role::kKvUp, layer);
  for (int head = 0; head < a.heads; ++head) {
    const std::byte* keys = blob + up.offset + head * up.HeadBytes();
    const std::byte* values = keys + PackedBytes(a.kv_lora_rank, a.PlainDim());
    out.key_up.push_back({keys, a.kv_lora_rank, a.PlainDim()});
    out.value_up.push_back({values, a.value_dim, a.kv_lora_rank});
  }
}

}  // namespace

KvLayout KvLayout::Of(const core::ModelSpec& spec, int element_bytes) {
  const core::AttentionSpec& a = spec.attention;
  if (a.Latent()) return {spec.LayerCount(), 1, a.LatentDim(), element_bytes, a.kv_lora_rank};
  return {spec.LayerCount(), a.kv_heads, a.head_dim, element_bytes};
}

std::size_t WeightLayout::Index(Role role, int layer) const {
  return static_cast<std::size_t>(layer + 1) * kRoles + static_cast<int>(role);
}

const TensorPlace& WeightLayout::Place(Role role, int layer) const {
  const TensorPlace& place = places_[Index(role, model::OfExpert(role) ? -1 : layer)];
  EM_CHECK(place.n > 0, "role={} layer={}", static_cast<int>(role), layer);
  return place;
}

WeightLayout::WeightLayout(const core::ModelSpec& spec)
    : places_(static_cast<std::size_t>(spec.LayerCount() + 1) * kRoles) {
  std::size_t at = 0;
  const auto vector = [&](Role role, int layer, int n, int k = 1) {
    places_[Index(role, layer)] = {Take(at, std::size_t(n) * k * sizeof(float)), 0, n, n, k, false};
  };
  const auto matrix_of = [&](WeightFormat format, Role role, int layer, int n, int k) {
    places_[Index(role, layer)] = {Take(at, PackedBytes(n, k, format)), 0, n, n, k, true, 0, 0, format};
  };
  const auto matrix = [&](Role role, int layer, int n, int k) { matrix_of(spec.weights, role, layer, n, k); };
  const core::AttentionSpec& a = spec.attention;
  const WeightFormat head = spec.weights == WeightFormat::kInt4 ? WeightFormat::kInt8 : spec.weights;
  matrix_of(spec.tied_head ? head : WeightFormat::kBf16, Role::kEmbedding, -1, spec.vocab, spec.hidden);
  if (!spec.tied_head) matrix_of(head, Role::kLmHead, -1, spec.vocab, spec.hidden);
  vector(Role::kFinalNorm, -1, spec.hidden);
  for (int layer = 0; layer < spec.LayerCount(); ++layer) {
    vector(Role::kAttentionNorm, layer, spec.hidden);
    // Several tensors side by side in one matrix, and their biases in one vector: rows from `begin` on.
    const std::size_t qkv = Take(at, PackedBytes(a.QkvRows(), spec.hidden, spec.weights));
    const std::size_t bias = a.qkv_bias ? Take(at, a.QkvRows() * sizeof(float)) : 0;
    const auto part = [&](Role role, Role bias_role, int begin, int n) {
      places_[Index(role, layer)] = {qkv, begin, n, a.QkvRows(), spec.hidden, true, 0, 0, spec.weights};
      if (a.qkv_bias) places_[Index(bias_role, layer)] = {bias, begin, n, a.QkvRows(), 1, false};
    };
    if (a.Latent()) {
      part(a.q_lora_rank > 0 ? Role::kQDown : Role::kQ, Role::kQBias, 0, a.QRows());
      part(Role::kKvDown, Role::kKBias, a.QRows(), a.LatentDim());
      if (a.q_lora_rank > 0) {
        vector(Role::kQDownNorm, layer, a.q_lora_rank);
        matrix(Role::kQUp, layer, a.heads * a.head_dim, a.q_lora_rank);
      }
      vector(Role::kKvDownNorm, layer, a.kv_lora_rank);
      const int n = a.heads * (a.PlainDim() + a.value_dim);
      TensorPlace up{0, 0, n, n, a.kv_lora_rank, true, a.PlainDim(), a.value_dim};
      up.offset = Take(at, a.heads * up.HeadBytes());
      places_[Index(Role::kKvUp, layer)] = up;
      TensorPlace& keys = places_[Index(Role::kKeyUp, layer)];
      keys = {up.offset, 0, a.heads * a.kv_lora_rank, a.heads * a.kv_lora_rank, a.PlainDim(), true};
      keys.head_rows = a.kv_lora_rank;
      TensorPlace& values = places_[Index(Role::kValueUp, layer)];
      values = {up.offset + PackedBytes(a.kv_lora_rank, a.PlainDim()),
                0,
                a.heads * a.value_dim,
                a.heads * a.value_dim,
                a.kv_lora_rank,
                true};
      values.head_rows = a.value_dim;
      keys.head_stride = values.head_stride = up.HeadBytes();
    } else {
      const int kv = a.kv_heads * a.head_dim;
      part(Role::kQ, Role::kQBias, 0, a.QRows());
      part(Role::kK, Role::kKBias, a.QRows(), kv);
      part(Role::kV, Role::kVBias, a.QRows() + kv, kv);
    }
    if (a.qk_norm || a.qk_norm_whole) {
      vector(Role::kQNorm, layer, a.head_dim * (a.qk_norm_whole ? a.heads : 1));
      vector(Role::kKNorm, layer, a.head_dim * (a.qk_norm_whole ? a.kv_heads : 1));
    }
    matrix(Role::kO, layer, spec.hidden, a.heads * a.OutDim());
    if (a.o_bias) vector(Role::kOBias, layer, spec.hidden);
    if (a.sinks) vector(Role::kSinks, layer, a.heads);
    vector(Role::kMlpNorm, layer, spec.hidden);
    if (spec.layers[layer].moe) {
      const int shared = spec.moe.shared_width;
      vector(Role::kRouter, layer, spec.moe.experts, spec.hidden);
      if (spec.moe.router_bias) vector(Role::kRouterBias, layer, spec.moe.experts);
      if (spec.moe.correction) vector(Role::kRouterCorrection, layer, spec.moe.experts);
      if (shared > 0) {
        matrix(Role::kSharedGate, layer, shared, spec.hidden);
        matrix(Role::kSharedUp, layer, shared, spec.hidden);
        matrix(Role::kSharedDown, layer, spec.hidden, shared);
        if (spec.dense_bias) {
          vector(Role::kSharedGateBias, layer, shared);
          vector(Role::kSharedUpBias, layer, shared);
          vector(Role::kSharedDownBias, layer, spec.hidden);
        }
        if (spec.moe.shared_gate) vector(Role::kSharedMix, layer, 1, spec.hidden);
      }
    } else {
      matrix(Role::kDenseGate, layer, spec.layers[layer].dense_width, spec.hidden);
      matrix(Role::kDenseUp, layer, spec.layers[layer].dense_width, spec.hidden);
      matrix(Role::kDenseDown, layer, spec.hidden, spec.layers[layer].dense_width);
      if (spec.dense_bias) {
        vector(Role::kDenseGateBias, layer, spec.layers[layer].dense_width);
        vector(Role::kDenseUpBias, layer, spec.layers[layer].dense_width);
        vector(Role::kDenseDownBias, layer, spec.hidden);
      }
    }
  }
  shared_bytes_ = (at + kAlign - 1) / kAlign * kAlign;
  if (spec.moe.experts > 0) {
    at = 0;
    matrix(Role::kExpertGate, -1, spec.moe.expert_width, spec.hidden);
    matrix(Role::kExpertUp, -1, spec.moe.expert_width, spec.hidden);
    matrix(Role::kExpertDown, -1, spec.hidden, spec.moe.expert_width);
    if (spec.moe.expert_bias) {
      vector(Role::kExpertGateBias, -1, spec.moe.expert_width);
      vector(Role::kExpertUpBias, -1, spec.moe.expert_width);
      vector(Role::kExpertDownBias, -1, spec.hidden);
    }
    expert_bytes_ = (at + kAlign - 1) / kAlign * kAlign;
  }
}

void PackTensor(const TensorPlace& place, const void* source, DType type, std::byte* blob) {
  if (place.head_keys > 0) {
    const int head_rows = place.head_keys + place.head_values;
    const std::size_t row_bytes = std::size_t(place.k) * BytesOf(type);
    for (int i = 0; i < place.n; ++i) {
      const int head = (place.row_begin + i) / head_rows, row = (place.row_begin + i) % head_rows;
      auto* keys = reinterpret_cast<Bf16*>(blob + place.offset + head * place.HeadBytes());
      const void* from = static_cast<const std::byte*>(source) + i * row_bytes;
      if (row < place.head_keys) {
        PackColumn(from, type, row, place.k, place.head_keys, keys);
      } else {
        PackRows(from, type, row - place.head_keys, 1, place.k,
                 keys + PackedBytes(place.k, place.head_keys) / sizeof(Bf16));
      }
    }
  } else if (place.head_rows > 0) {
    const std::size_t row_bytes = std::size_t(place.k) * BytesOf(type);
    for (int i = 0; i < place.n; ++i) {
      const int row = place.row_begin + i;
      PackRows(static_cast<const std::byte*>(source) + i * row_bytes, type, row % place.head_rows, 1, place.k,
               blob + place.offset + row / place.head_rows * place.head_stride);
    }
  } else if (place.packed) {
    PackRows(source, type, place.row_begin, place.n, place.k, blob + place.offset, place.format);
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
    const core::AttentionSpec& a = spec.attention;
    layer.qkv = Matrix(blob, layout.Place(a.q_lora_rank > 0 ? Role::kQDown : Role::kQ, i));
    if (a.qkv_bias) layer.qkv_bias = Floats(blob, layout.Place(Role::kQBias, i));
    if (a.Latent()) BindLatent(spec, layout, blob, i, layer);
    if (a.qk_norm || a.qk_norm_whole) {
      layer.q_norm = Floats(blob, layout.Place(Role::kQNorm, i));
      layer.k_norm = Floats(blob, layout.Place(Role::kKNorm, i));
    }
    layer.o = Matrix(blob, layout.Place(Role::kO, i));
    if (a.o_bias) layer.o_bias = Floats(blob, layout.Place(Role::kOBias, i));
    if (a.sinks) layer.sinks = Floats(blob, layout.Place(Role::kSinks, i));
    layer.mlp_norm = Floats(blob, layout.Place(Role::kMlpNorm, i));
    if (spec.layers[i].moe) {
      layer.router = Floats(blob, layout.Place(Role::kRouter, i));
      if (spec.moe.router_bias) layer.router_bias = Floats(blob, layout.Place(Role::kRouterBias, i));
      if (spec.moe.correction) layer.correction = Floats(blob, layout.Place(Role::kRouterCorrection, i));
      if (spec.moe.shared_width > 0) BindMlp(layout, blob, i, spec.dense_bias, kSharedRoles, layer.dense);
      if (spec.moe.shared_gate) layer.shared_mix = Floats(blob, layout.Place(Role::kSharedMix, i));
    } else {
      BindMlp(layout, blob, i, spec.dense_bias, kDenseRoles, layer.dense);
    }
    weights.layers.push_back(layer);
  }
  return weights;
}

MlpWeights BindExpert(const core::ModelSpec& spec, const WeightLayout& layout, const std::byte* blob) {
  MlpWeights weights;
  BindMlp(layout, blob, -1, spec.moe.expert_bias, kExpertRoles, weights);
  return weights;
}

}  // namespace elasticmoe::compute
