#include "compute/forward.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/check.h"
#include "compute/attend_batch.h"
#include "compute/choose_experts.h"
#include "compute/exp.h"
#include "compute/quantized_row.h"
#include "compute/rms_norm.h"
#include "compute/work.h"

namespace elasticmoe::compute {
Forward::Forward(const core::ModelSpec& spec, const Kernels& kernels, ThreadPool& threads, int max_rows)
    : spec_(spec), kernels_(kernels), threads_(threads), max_rows_(max_rows), rope_(spec.attention) {
  const core::AttentionSpec& a = spec.attention;
  EM_CHECK(a.head_dim % 2 == 0 && a.head_dim <= kMaxHeadDim, "head_dim={}", a.head_dim);
  EM_CHECK(!a.Latent() || a.LatentDim() <= kMaxLatentDim, "latent_dim={}", a.LatentDim());
  const std::size_t rows = static_cast<std::size_t>(max_rows);
  const int out = a.heads * a.OutDim();
  int widest = std::max(spec.hidden, out);
  if (a.Latent()) widest = std::max({widest, a.heads * a.head_dim, a.heads * a.kv_lora_rank, a.q_lora_rank});
  residual_.resize(rows * spec.hidden);
  activations_.resize(rows * widest * kernels.activation_bytes);
  if (spec.weights != WeightFormat::kBf16) {
    quantized_.resize(rows * QuantizedRow::Bytes(widest));
    quantized_rows_.resize(rows);
  }
  qkv_.resize(rows * a.QkvRows());
  attended_.resize(rows * out);
  projected_.resize(rows * spec.hidden);
  router_logits_.resize(rows * (2 * spec.moe.experts + spec.moe.groups));
  if (spec.moe.shared_width > 0) shared_.resize(rows * spec.hidden);
  if (a.Latent()) {
    if (a.q_lora_rank > 0) q_.resize(rows * a.heads * a.head_dim);
    latent_q_.resize(rows * a.heads * a.LatentDim());
    latent_out_.resize(rows * a.heads * a.kv_lora_rank);
  }
  const std::size_t heads = a.Latent() ? a.heads : 1;
  chunk_of_row_.resize(rows);
  position_.resize(rows);
  in_rows_.resize(rows * heads);
  out_rows_.resize(rows * heads);
  dense_rows_.resize(rows);
  tiles_.reserve(rows);
}

void Forward::NormRows(const float* weight) {
  Split(rows_, 8, [&](int first, int last) {
    for (int row = first; row < last; ++row) {
      float* normed = &projected_[std::size_t(row) * spec_.hidden];
      RmsNorm(weight, spec_.rms_eps, spec_.hidden, &residual_[std::size_t(row) * spec_.hidden], normed);
      kernels_.to_activation(
          normed, spec_.hidden,
          activations_.data() + std::size_t(row) * spec_.hidden * kernels_.activation_bytes);
    }
  });
}

const void* const* Forward::RowPointers(const std::byte* base, std::size_t stride, int rows) {
  for (int row = 0; row < rows; ++row) in_rows_[row] = base + std::size_t(row) * stride;
  return in_rows_.data();
}

const void* const* Forward::Operands(const PackedMatrix& w, const void* const* in, int rows) {
  if (w.format == WeightFormat::kBf16) return in;
  const std::size_t stride = QuantizedRow::Bytes(w.k);
  if (quantized_.size() < rows * stride) quantized_.resize(rows * stride);
  if (quantized_rows_.size() < static_cast<std::size_t>(rows)) quantized_rows_.resize(rows);
  Split(rows, 8, [&](int first, int last) {
    for (int row = first; row < last; ++row) {
      quantized_rows_[row] = quantized_.data() + row * stride;
      kernels_.quantized.quantize(in[row], w.k, quantized_.data() + row * stride);
    }
  });
  return quantized_rows_.data();
}

void Forward::Panels(const PackedMatrix& w, const void* const* in, int rows, int begin, int end,
                     float* const* out) {
  const void* const* operands = Operands(w, in, rows);
  const auto matmul = w.format == WeightFormat::kBf16 ? kernels_.matmul : kernels_.quantized.matmul;
  const int least = static_cast<int>(kPieceBytes / CostOf(w, 1, rows)) + 1;
  Split(end - begin, least,
        [&](int first, int last) { matmul(w, operands, rows, begin + first, begin + last, out); });
}

void Forward::Matmul(const PackedMatrix& w, const std::byte* in, std::size_t in_stride, int rows,
                     float* out) {
  for (int row = 0; row < rows; ++row) out_rows_[row] = out + std::size_t(row) * w.n;
  Panels(w, RowPointers(in, in_stride, rows), rows, 0, PanelsOf(w.n), out_rows_.data());
}

void Forward::Begin(const SharedWeights& weights, std::span<const TokenId> tokens,
                    std::span<const Chunk> chunks) {
  rows_ = static_cast<int>(tokens.size());
  EM_CHECK(rows_ <= max_rows_, "rows={} (limit={})", rows_, max_rows_);
  chunks_ = chunks;
  tiles_.clear();
  const int tile_rows = std::max(1, kUnitQueries / (spec_.attention.heads / spec_.attention.kv_heads));
  int positions = 0;
  for (std::size_t c = 0; c < chunks.size(); ++c) {
    const Chunk& chunk = chunks[c];
    EM_CHECK(chunk.first_row + chunk.rows <= rows_ &&
             chunk.start_position + chunk.rows <= spec_.max_positions);
    for (int i = 0; i < chunk.rows; ++i) {
      chunk_of_row_[chunk.first_row + i] = static_cast<int>(c);
      position_[chunk.first_row + i] = chunk.start_position + i;
    }
    for (int i = 0; i < chunk.rows; i += tile_rows)
      tiles_.push_back({static_cast<int>(c), chunk.first_row + i, std::min(tile_rows, chunk.rows - i)});
    positions = std::max(positions, chunk.start_position + chunk.rows);
  }
  rope_.Grow(positions, spec_.max_positions);
  Split(rows_, 8, [&](int first, int last) {
    for (int row = first; row < last; ++row)
      UnpackRow(weights.embedding, tokens[row], &residual_[std::size_t(row) * spec_.hidden]);
  });
}

void Forward::Attention(int layer, const SharedWeights& weights, const KvCache& kv) {
  const LayerWeights& w = weights.layers[layer];
  NormRows(w.attention_norm);
  Matmul(w.qkv, activations_.data(), std::size_t(spec_.hidden) * kernels_.activation_bytes, rows_,
         qkv_.data());
  if (w.qkv_bias != nullptr) {
    const int stride = spec_.attention.QkvRows();
    Split(rows_, 16, [&](int first, int last) {
      for (int row = first; row < last; ++row)
        for (int i = 0; i < stride; ++i) qkv_[std::size_t(row) * stride + i] += w.qkv_bias[i];
    });
  }
  if (spec_.attention.Latent()) {
    LatentAttention(layer, w, kv);
  } else {
    PrepareQkv(layer, w, kv);
    AttendRows(layer, w.sinks, kv);
  }
  const int out = spec_.attention.heads * spec_.attention.OutDim();
  ToActivations(attended_.data(), out, out);
  Matmul(w.o, activations_.data(), std::size_t(out) * kernels_.activation_bytes, rows_, projected_.data());
  if (w.o_bias != nullptr) {
    Split(rows_, 16, [&](int first, int last) {
      for (int row = first; row < last; ++row)
        for (int i = 0; i < spec_.hidden; ++i) projected_[std::size_t(row) * spec_.hidden + i] += w.o_bias[i];
    });
  }
  AddProjected();
}

void Forward::PrepareQkv(int layer, const LayerWeights& w, const KvCache& kv) {
  const core::AttentionSpec& a = spec_.attention;
  const int stride = a.QkvRows();
  const int q_size = a.heads * a.head_dim, k_size = a.kv_heads * a.head_dim;
  Split(rows_, 4, [&](int first, int last) {
    for (int row = first; row < last; ++row) {
      float* qkv = &qkv_[std::size_t(row) * stride];
      if (a.qk_norm_whole) {
        RmsNorm(w.q_norm, spec_.rms_eps, q_size, qkv, qkv);
        RmsNorm(w.k_norm, spec_.rms_eps, k_size, qkv + q_size, qkv + q_size);
      }
      if (a.clip_qkv > 0)
        for (int i = 0; i < stride; ++i) qkv[i] = std::clamp(qkv[i], -a.clip_qkv, a.clip_qkv);
      for (int head = 0; head < a.heads + a.kv_heads; ++head) {
        float* values = qkv + head * a.head_dim;
        if (a.qk_norm)
          RmsNorm(head < a.heads ? w.q_norm : w.k_norm, spec_.rms_eps, a.head_dim, values, values);
        rope_.Turn(values, position_[row]);
      }
      StoreRow(layer, row, qkv + q_size, qkv + q_size + k_size, kv);
    }
  });
}

void Forward::StoreRow(int layer, int row, const float* k, const float* v, const KvCache& kv) {
  const Chunk& chunk = chunks_[chunk_of_row_[row]];
  std::byte* block = kv.Block(chunk.block_table[position_[row] / kBlockTokens]);
  kernels_.store_kv(kv.layout, layer, position_[row] % kBlockTokens, k, v, block);
}

void Forward::ToActivations(const float* values, int stride, int count) {
  Split(rows_, 8, [&](int first, int last) {
    for (int row = first; row < last; ++row)
      kernels_.to_activation(values + std::size_t(row) * stride, count,
                             activations_.data() + std::size_t(row) * count * kernels_.activation_bytes);
  });
}

void Forward::AttendRows(int layer, const float* sinks, const KvCache& kv) {
  const core::AttentionSpec& a = spec_.attention;
  const int group = a.heads / a.kv_heads;
  const int units = static_cast<int>(tiles_.size()) * a.kv_heads;
  const int window = spec_.layers[layer].window;
  Split(units, 1, [&](int first, int last) {
    AttendBatch batch(kernels_, kv, layer, a.scale);
    for (int unit = first; unit < last; ++unit) {
      // Last tiles first: in a long chunk they see the most tokens.
      const Tile& tile = tiles_[tiles_.size() - 1 - unit / a.kv_heads];
      const int kv_head = unit % a.kv_heads;
      batch.Begin(chunks_[tile.chunk].block_table.data(), kv_head);
      for (int i = 0; i < tile.rows * group; ++i) {
        const std::size_t row = tile.first_row + i / group;
        const int head = kv_head * group + i % group;
        const int offset = head * a.head_dim;
        Query query{&qkv_[row * a.QkvRows() + offset], &attended_[row * a.heads * a.head_dim + offset],
                    position_[row] + 1};
        if (window > 0) query.first = std::max(0, position_[row] + 1 - window);
        if (sinks != nullptr) query.sink = sinks[head];
        batch.Add(query);
      }
    }
  });
}

void Forward::AddProjected() {
  Split(rows_, 16, [&](int first, int last) {
    const std::size_t end = std::size_t(last) * spec_.hidden;
    for (std::size_t i = std::size_t(first) * spec_.hidden; i < end; ++i) residual_[i] += projected_[i];
  });
}

void Forward::DenseMlp(int layer, const SharedWeights& weights) {
  const LayerWeights& w = weights.layers[layer];
  NormRows(w.mlp_norm);
  RunDense(w.dense, activations_.data(), projected_.data());
  AddProjected();
}

void Forward::RunDense(const MlpWeights& weights, const std::byte* activations, float* out) {
  for (int row = 0; row < rows_; ++row)
    dense_rows_[row] = {activations + std::size_t(row) * spec_.hidden * kernels_.activation_bytes,
                        out + std::size_t(row) * spec_.hidden};
  const ExpertBatch batch{weights, {dense_rows_.data(), static_cast<std::size_t>(rows_)}};
  RunExperts(spec_, kernels_, threads_, {&batch, 1}, scratch_);
}

void Forward::Route(int layer, const SharedWeights& weights, void* activations, std::int32_t* experts,
                    float* mix) {
  const LayerWeights& w = weights.layers[layer];
  const core::MoeSpec& moe = spec_.moe;
  const int scratch = 2 * moe.experts + moe.groups;  // floats a row: logits, then what is chosen by
  Split(rows_, 4, [&](int first, int last) {
    for (int row = first; row < last; ++row) {
      float* normed = &projected_[std::size_t(row) * spec_.hidden];
      RmsNorm(w.mlp_norm, spec_.rms_eps, spec_.hidden, &residual_[std::size_t(row) * spec_.hidden], normed);
      kernels_.to_activation(
          normed, spec_.hidden,
          static_cast<std::byte*>(activations) + std::size_t(row) * spec_.hidden * kernels_.activation_bytes);
    }
    float* logits = &router_logits_[std::size_t(first) * scratch];
    kernels_.router(&projected_[std::size_t(first) * spec_.hidden], last - first, w.router, moe.experts,
                    spec_.hidden, logits);
    for (int i = 0; w.router_bias != nullptr && i < (last - first) * moe.experts; ++i)
      logits[i] += w.router_bias[i % moe.experts];
    if (moe.scores == core::MoeSpec::Scores::kCosine) ToCosines(w, first, last, logits);
    float* choice = logits + std::size_t(last - first) * moe.experts;
    for (int row = first; row < last; ++row, logits += moe.experts)
      ChooseExperts(moe, w.correction, {logits, static_cast<std::size_t>(moe.experts)},
                    {choice, static_cast<std::size_t>(moe.experts + moe.groups)},
                    experts + std::size_t(row) * moe.top_k, mix + std::size_t(row) * moe.top_k);
  });
  if (moe.shared_width > 0) SharedExpert(w, static_cast<const std::byte*>(activations));
}

// Products of normed rows [first, last) and the router's rows -> the cosines of their angles.
void Forward::ToCosines(const LayerWeights& w, int first, int last, float* logits) const {
  constexpr float kLeast = 1e-12F;  // of a length, as in PyTorch's normalize
  const int experts = spec_.moe.experts;
  for (int e = 0; e < experts; ++e) {
    const float length = std::sqrt(SquareSum(w.router + std::size_t(e) * spec_.hidden, spec_.hidden));
    for (int row = first; row < last; ++row)
      logits[std::size_t(row - first) * experts + e] /= std::max(length, kLeast);
  }
  for (int row = first; row < last; ++row) {
    const float length = std::sqrt(SquareSum(&projected_[std::size_t(row) * spec_.hidden], spec_.hidden));
    for (int e = 0; e < experts; ++e)
      logits[std::size_t(row - first) * experts + e] /= std::max(length, kLeast);
  }
}

// Every token's expert runs at home: shared_ = its outputs, weighted. projected_ holds the normed rows.
void Forward::SharedExpert(const LayerWeights& w, const std::byte* activations) {
  RunDense(w.dense, activations, shared_.data());
  if (w.shared_mix == nullptr) return;
  Split(rows_, 16, [&](int first, int last) {
    for (int row = first; row < last; ++row) {
      float gate = 0;
      kernels_.router(&projected_[std::size_t(row) * spec_.hidden], 1, w.shared_mix, 1, spec_.hidden, &gate);
      const float weight = 1.0F / (1.0F + Exp(-gate));
      for (int i = 0; i < spec_.hidden; ++i) shared_[std::size_t(row) * spec_.hidden + i] *= weight;
    }
  });
}

void Forward::Combine(const float* outputs, const float* mix) {
  const int top_k = spec_.moe.top_k;
  Split(rows_, 8, [&](int first, int last) {
    for (int row = first; row < last; ++row) {
      float* residual = &residual_[std::size_t(row) * spec_.hidden];
      float* sum = &projected_[std::size_t(row) * spec_.hidden];
      std::fill(sum, sum + spec_.hidden, 0.0F);
      for (int j = 0; j < top_k; ++j) {
        const float weight = mix[std::size_t(row) * top_k + j];
        if (weight == 0.0F) continue;  // of no expert, nobody has written its output
        const float* out = outputs + (std::size_t(row) * top_k + j) * spec_.hidden;
        for (int i = 0; i < spec_.hidden; ++i) sum[i] += weight * out[i];
      }
      if (!shared_.empty())
        for (int i = 0; i < spec_.hidden; ++i) sum[i] += shared_[std::size_t(row) * spec_.hidden + i];
      for (int i = 0; i < spec_.hidden; ++i) residual[i] += sum[i];
    }
  });
}

void Forward::HeadInput(const SharedWeights& weights, std::span<const int> which, void* out) {
  const std::size_t row_bytes = std::size_t(spec_.hidden) * kernels_.activation_bytes;
  for (std::size_t i = 0; i < which.size(); ++i) {
    float* normed = &projected_[i * spec_.hidden];
    RmsNorm(weights.final_norm, spec_.rms_eps, spec_.hidden, &residual_[std::size_t(which[i]) * spec_.hidden],
            normed);
    kernels_.to_activation(normed, spec_.hidden, static_cast<std::byte*>(out) + i * row_bytes);
  }
}

void Forward::HeadPart(const SharedWeights& weights, std::span<const void* const> in,
                       std::span<float* const> out, int part, int parts) {
  const PackedMatrix& head = weights.lm_head;
  const int rows = static_cast<int>(in.size()), panels = PanelsOf(head.n);
  const int begin = static_cast<int>(std::int64_t{panels} * part / parts);
  const int end = static_cast<int>(std::int64_t{panels} * (part + 1) / parts);
  if (rows == 0 || begin == end) return;
  Panels(head, in.data(), rows, begin, end, out.data());
}

void Forward::Logits(const SharedWeights& weights, std::span<const int> which, float* logits) {
  const int count = static_cast<int>(which.size());
  EM_CHECK(count <= max_rows_);
  HeadInput(weights, which, activations_.data());
  const std::size_t row_bytes = std::size_t(spec_.hidden) * kernels_.activation_bytes;
  Matmul(weights.lm_head, activations_.data(), row_bytes, count, logits);
}

}  // namespace elasticmoe::compute
