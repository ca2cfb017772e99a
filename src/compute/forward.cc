#include "compute/forward.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/check.h"
#include "compute/exp.h"
#include "compute/work.h"

namespace elasticmoe::compute {
namespace {

// Sum of squares in 16 lanes, then a tree: one order for every length, and the compiler may use registers.
float SquareSum(const float* x, int count) {
  constexpr int kLanes = 16;
  float lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane] * x[i + lane];
  for (int lane = 0; i < count; ++i, ++lane) lanes[lane] += x[i] * x[i];
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

void RmsNorm(const float* weight, float eps, int count, const float* in, float* out) {
  const float scale = 1.0F / std::sqrt(SquareSum(in, count) / static_cast<float>(count) + eps);
  for (int i = 0; i < count; ++i) out[i] = in[i] * scale * weight[i];
}

// Rows of router logits -> the top_k of softmax, best first; equal scores: the lower expert.
void ChooseExperts(const core::MoeSpec& moe, std::span<float> logits, std::int32_t* experts, float* mix) {
  const float largest = *std::max_element(logits.begin(), logits.end());
  float sum = 0;
  for (float& logit : logits) {
    logit = Exp(logit - largest);
    sum += logit;
  }
  for (int j = 0; j < moe.top_k; ++j) {
    int best = 0;
    for (int e = 1; e < moe.experts; ++e)
      if (logits[e] > logits[best]) best = e;
    experts[j] = best;
    mix[j] = logits[best] / sum;
    logits[best] = -1.0F;
  }
  if (!moe.renormalize) return;
  float chosen = 0;
  for (int j = 0; j < moe.top_k; ++j) chosen += mix[j];
  for (int j = 0; j < moe.top_k; ++j) mix[j] /= chosen;
}

}  // namespace

Forward::Forward(const core::ModelSpec& spec, const Kernels& kernels, ThreadPool& threads, int max_rows)
    : spec_(spec), kernels_(kernels), threads_(threads), max_rows_(max_rows) {
  const core::AttentionSpec& a = spec.attention;
  EM_CHECK(a.head_dim % 2 == 0 && a.head_dim <= kMaxHeadDim, "head_dim={}", a.head_dim);
  const std::size_t rows = static_cast<std::size_t>(max_rows);
  const int q = a.heads * a.head_dim;
  residual_.resize(rows * spec.hidden);
  activations_.resize(rows * std::max(spec.hidden, q) * kernels.activation_bytes);
  qkv_.resize(rows * a.QkvRows());
  attended_.resize(rows * q);
  projected_.resize(rows * spec.hidden);
  router_logits_.resize(rows * spec.moe.experts);
  chunk_of_row_.resize(rows);
  position_.resize(rows);
  in_rows_.resize(rows);
  out_rows_.resize(rows);
  dense_rows_.resize(rows);
  tiles_.reserve(rows);
}

template <class Body>
void Forward::Split(int count, int least, const Body& body) {
  const int most = threads_.Size() == 1 ? 1 : threads_.Size() * 4;
  const int pieces = std::clamp(count / std::max(1, least), 1, most);
  threads_.Run(pieces, [&](int piece) {
    const int first = static_cast<int>(static_cast<std::int64_t>(count) * piece / pieces);
    const int last = static_cast<int>(static_cast<std::int64_t>(count) * (piece + 1) / pieces);
    if (first < last) body(first, last);
  });
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

void Forward::Matmul(const PackedMatrix& w, const std::byte* in, std::size_t in_stride, int rows,
                     float* out) {
  const void* const* in_rows = RowPointers(in, in_stride, rows);
  for (int row = 0; row < rows; ++row) out_rows_[row] = out + std::size_t(row) * w.n;
  const int panels = PanelsOf(w.n);
  const int least = static_cast<int>(kPieceBytes / CostOf(1, w.k, rows)) + 1;
  Split(panels, least,
        [&](int first, int last) { kernels_.matmul(w, in_rows, rows, first, last, out_rows_.data()); });
}

void Forward::Begin(const SharedWeights& weights, std::span<const TokenId> tokens,
                    std::span<const Chunk> chunks) {
  rows_ = static_cast<int>(tokens.size());
  EM_CHECK(rows_ <= max_rows_, "rows={} (limit={})", rows_, max_rows_);
  chunks_ = chunks;
  tiles_.clear();
  const int tile_rows = std::max(1, kTileQueries / (spec_.attention.heads / spec_.attention.kv_heads));
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
  GrowRope(positions);
  Split(rows_, 8, [&](int first, int last) {
    for (int row = first; row < last; ++row)
      UnpackRow(weights.embedding, tokens[row], &residual_[std::size_t(row) * spec_.hidden]);
  });
}

void Forward::GrowRope(int positions) {
  const int half = spec_.attention.head_dim / 2;
  int position = static_cast<int>(cos_.size()) / half;
  if (position >= positions) return;
  const int end = std::min(spec_.max_positions, (positions + 1023) / 1024 * 1024);
  cos_.resize(std::size_t(end) * half);
  sin_.resize(cos_.size());
  for (; position < end; ++position) {
    for (int i = 0; i < half; ++i) {
      // Frequencies and angles in float32, as the reference implementations have them.
      const float frequency =
          static_cast<float>(std::pow(spec_.attention.rope_theta, -2.0 * i / spec_.attention.head_dim));
      const float angle = static_cast<float>(position) * frequency;
      cos_[std::size_t(position) * half + i] = std::cos(angle);
      sin_[std::size_t(position) * half + i] = std::sin(angle);
    }
  }
}

void Forward::Rope(float* head, int position) const {
  const int half = spec_.attention.head_dim / 2;
  const float* cosines = &cos_[std::size_t(position) * half];
  const float* sines = &sin_[std::size_t(position) * half];
  for (int i = 0; i < half; ++i) {
    const float a = head[i];
    const float b = head[i + half];
    head[i] = a * cosines[i] - b * sines[i];
    head[i + half] = b * cosines[i] + a * sines[i];
  }
}

void Forward::Attention(int layer, const SharedWeights& weights, const KvCache& kv) {
  const core::AttentionSpec& a = spec_.attention;
  const LayerWeights& w = weights.layers[layer];
  const int stride = a.QkvRows();
  const int q_size = a.heads * a.head_dim;
  NormRows(w.attention_norm);
  Matmul(w.qkv, activations_.data(), std::size_t(spec_.hidden) * kernels_.activation_bytes, rows_,
         qkv_.data());

  Split(rows_, 4, [&](int first, int last) {
    for (int row = first; row < last; ++row) {
      float* qkv = &qkv_[std::size_t(row) * stride];
      if (w.qkv_bias != nullptr)
        for (int i = 0; i < stride; ++i) qkv[i] += w.qkv_bias[i];
      for (int head = 0; head < a.heads + a.kv_heads; ++head) {
        float* values = qkv + head * a.head_dim;
        if (a.qk_norm)
          RmsNorm(head < a.heads ? w.q_norm : w.k_norm, spec_.rms_eps, a.head_dim, values, values);
        Rope(values, position_[row]);
      }
      const Chunk& chunk = chunks_[chunk_of_row_[row]];
      std::byte* block = kv.Block(chunk.block_table[position_[row] / kBlockTokens]);
      kernels_.store_kv(kv.layout, layer, position_[row] % kBlockTokens, qkv + q_size,
                        qkv + q_size + a.kv_heads * a.head_dim, block);
    }
  });
  // Every row's K and V are in place: rows of one chunk see each other.
  AttendRows(layer, kv);
  const std::size_t row_bytes = std::size_t(q_size) * kernels_.activation_bytes;
  Split(rows_, 8, [&](int first, int last) {
    for (int row = first; row < last; ++row)
      kernels_.to_activation(&attended_[std::size_t(row) * q_size], q_size,
                             activations_.data() + row * row_bytes);
  });
  Matmul(w.o, activations_.data(), row_bytes, rows_, projected_.data());
  AddProjected();
}

void Forward::AttendRows(int layer, const KvCache& kv) {
  const core::AttentionSpec& a = spec_.attention;
  const int group = a.heads / a.kv_heads;
  const int units = static_cast<int>(tiles_.size()) * a.kv_heads;
  Split(units, 1, [&](int first, int last) {
    Query queries[kTileQueries];
    for (int unit = first; unit < last; ++unit) {
      // Last tiles first: in a long chunk they see the most tokens.
      const Tile& tile = tiles_[tiles_.size() - 1 - unit / a.kv_heads];
      const int kv_head = unit % a.kv_heads;
      const std::uint32_t* table = chunks_[tile.chunk].block_table.data();
      int count = 0;
      for (int i = 0; i < tile.rows * group; ++i) {
        const std::size_t row = tile.first_row + i / group;
        const int offset = (kv_head * group + i % group) * a.head_dim;
        queries[count++] = {&qkv_[row * a.QkvRows() + offset],
                            &attended_[row * a.heads * a.head_dim + offset], position_[row] + 1};
        if (count < kTileQueries && i + 1 < tile.rows * group) continue;
        kernels_.attend(kv, layer, kv_head, table, queries, count, a.scale);
        count = 0;
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
  for (int row = 0; row < rows_; ++row)
    dense_rows_[row] = {activations_.data() + std::size_t(row) * spec_.hidden * kernels_.activation_bytes,
                        &projected_[std::size_t(row) * spec_.hidden]};
  const ExpertBatch batch{w.dense, {dense_rows_.data(), static_cast<std::size_t>(rows_)}};
  RunExperts(spec_, kernels_, threads_, {&batch, 1}, scratch_);
  AddProjected();
}

void Forward::Route(int layer, const SharedWeights& weights, void* activations, std::int32_t* experts,
                    float* mix) {
  const LayerWeights& w = weights.layers[layer];
  const core::MoeSpec& moe = spec_.moe;
  Split(rows_, 4, [&](int first, int last) {
    for (int row = first; row < last; ++row) {
      float* normed = &projected_[std::size_t(row) * spec_.hidden];
      RmsNorm(w.mlp_norm, spec_.rms_eps, spec_.hidden, &residual_[std::size_t(row) * spec_.hidden], normed);
      kernels_.to_activation(
          normed, spec_.hidden,
          static_cast<std::byte*>(activations) + std::size_t(row) * spec_.hidden * kernels_.activation_bytes);
    }
    float* logits = &router_logits_[std::size_t(first) * moe.experts];
    kernels_.router(&projected_[std::size_t(first) * spec_.hidden], last - first, w.router, moe.experts,
                    spec_.hidden, logits);
    for (int row = first; row < last; ++row, logits += moe.experts)
      ChooseExperts(moe, {logits, static_cast<std::size_t>(moe.experts)},
                    experts + std::size_t(row) * moe.top_k, mix + std::size_t(row) * moe.top_k);
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
        const float* out = outputs + (std::size_t(row) * top_k + j) * spec_.hidden;
        for (int i = 0; i < spec_.hidden; ++i) sum[i] += weight * out[i];
      }
      for (int i = 0; i < spec_.hidden; ++i) residual[i] += sum[i];
    }
  });
}

void Forward::Logits(const SharedWeights& weights, std::span<const int> which, float* logits) {
  const int count = static_cast<int>(which.size());
  EM_CHECK(count <= max_rows_);
  const std::size_t row_bytes = std::size_t(spec_.hidden) * kernels_.activation_bytes;
  for (int i = 0; i < count; ++i) {
    RmsNorm(weights.final_norm, spec_.rms_eps, spec_.hidden, &residual_[std::size_t(which[i]) * spec_.hidden],
            &projected_[std::size_t(i) * spec_.hidden]);
    kernels_.to_activation(&projected_[std::size_t(i) * spec_.hidden], spec_.hidden,
                           activations_.data() + i * row_bytes);
  }
  Matmul(weights.lm_head, activations_.data(), row_bytes, count, logits);
}

}  // namespace elasticmoe::compute
