#include "compute/forward.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/check.h"

namespace elasticmoe::compute {
namespace {

int PanelsOf(int n) { return (n + kPanel - 1) / kPanel; }

// Rows of router logits -> the top_k of softmax, best first; equal scores: the lower expert.
void ChooseExperts(const core::MoeSpec& moe, std::span<float> logits, std::int32_t* experts, float* mix) {
  const float largest = *std::max_element(logits.begin(), logits.end());
  float sum = 0;
  for (float& logit : logits) {
    logit = std::exp(logit - largest);
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
  const std::size_t rows = static_cast<std::size_t>(max_rows);
  const int q = a.heads * a.head_dim;
  residual_.resize(rows * spec.hidden);
  activations_.resize(rows * std::max(spec.hidden, q) * kernels.activation_bytes);
  qkv_.resize(rows * a.QkvRows());
  attended_.resize(rows * q);
  projected_.resize(rows * spec.hidden);
  in_rows_.resize(rows);
  out_rows_.resize(rows);
  const int half = a.head_dim / 2;
  cos_.resize(std::size_t(spec.max_positions) * half);
  sin_.resize(cos_.size());
  for (int i = 0; i < half; ++i) {
    const double frequency = std::pow(a.rope_theta, -2.0 * i / a.head_dim);
    for (int position = 0; position < spec.max_positions; ++position) {
      // Angles in float32, as the reference implementations have them.
      const float angle = static_cast<float>(position) * static_cast<float>(frequency);
      cos_[std::size_t(position) * half + i] = std::cos(angle);
      sin_[std::size_t(position) * half + i] = std::sin(angle);
    }
  }
}

template <class Body>
void Forward::Split(int count, int least, const Body& body) {
  const int pieces = std::clamp(count / std::max(1, least), 1, threads_.Size() * 4);
  threads_.Run(pieces, [&](int piece) {
    const int first = static_cast<int>(static_cast<std::int64_t>(count) * piece / pieces);
    const int last = static_cast<int>(static_cast<std::int64_t>(count) * (piece + 1) / pieces);
    if (first < last) body(first, last);
  });
}

void Forward::Norm(const float* weight, const float* row, float* out) const {
  float sum = 0;
  for (int i = 0; i < spec_.hidden; ++i) sum += row[i] * row[i];
  const float scale = 1.0F / std::sqrt(sum / static_cast<float>(spec_.hidden) + spec_.rms_eps);
  for (int i = 0; i < spec_.hidden; ++i) out[i] = row[i] * scale * weight[i];
}

void Forward::NormRows(const float* weight) {
  Split(rows_, 8, [&](int first, int last) {
    for (int row = first; row < last; ++row) {
      float* normed = &projected_[std::size_t(row) * spec_.hidden];
      Norm(weight, &residual_[std::size_t(row) * spec_.hidden], normed);
      kernels_.to_activation(normed, spec_.hidden,
                             activations_.data() + std::size_t(row) * spec_.hidden * kernels_.activation_bytes);
    }
  });
}

const void* const* Forward::RowPointers(const std::byte* base, std::size_t stride, int rows) {
  for (int row = 0; row < rows; ++row) in_rows_[row] = base + std::size_t(row) * stride;
  return in_rows_.data();
}

void Forward::Matmul(const PackedMatrix& w, const std::byte* in, std::size_t in_stride, int rows, float* out) {
  const void* const* in_rows = RowPointers(in, in_stride, rows);
  for (int row = 0; row < rows; ++row) out_rows_[row] = out + std::size_t(row) * w.n;
  Split(PanelsOf(w.n), 2, [&](int first, int last) { kernels_.matmul(w, in_rows, rows, first, last, out_rows_.data()); });
}

void Forward::Begin(const SharedWeights& weights, std::span<const TokenId> tokens, std::span<const Chunk> chunks) {
  rows_ = static_cast<int>(tokens.size());
  EM_CHECK(rows_ <= max_rows_, "rows={} (limit={})", rows_, max_rows_);
  chunks_ = chunks;
  chunk_of_row_.resize(rows_);
  position_.resize(rows_);
  for (std::size_t c = 0; c < chunks.size(); ++c) {
    for (int i = 0; i < chunks[c].rows; ++i) {
      chunk_of_row_[chunks[c].first_row + i] = static_cast<int>(c);
      position_[chunks[c].first_row + i] = chunks[c].start_position + i;
    }
  }
  Split(rows_, 8, [&](int first, int last) {
    for (int row = first; row < last; ++row) UnpackRow(weights.embedding, tokens[row], &residual_[std::size_t(row) * spec_.hidden]);
  });
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
  const int group = a.heads / a.kv_heads;
  NormRows(w.attention_norm);
  Matmul(w.qkv, activations_.data(), std::size_t(spec_.hidden) * kernels_.activation_bytes, rows_, qkv_.data());

  const auto head_norm = [&](const float* weight, float* head) {
    float sum = 0;
    for (int i = 0; i < a.head_dim; ++i) sum += head[i] * head[i];
    const float scale = 1.0F / std::sqrt(sum / static_cast<float>(a.head_dim) + spec_.rms_eps);
    for (int i = 0; i < a.head_dim; ++i) head[i] = head[i] * scale * weight[i];
  };
  Split(rows_, 4, [&](int first, int last) {
    for (int row = first; row < last; ++row) {
      float* qkv = &qkv_[std::size_t(row) * stride];
      if (w.qkv_bias != nullptr)
        for (int i = 0; i < stride; ++i) qkv[i] += w.qkv_bias[i];
      for (int head = 0; head < a.heads + a.kv_heads; ++head) {
        float* values = qkv + head * a.head_dim;
        if (a.qk_norm) head_norm(head < a.heads ? w.q_norm : w.k_norm, values);
        Rope(values, position_[row]);
      }
      const Chunk& chunk = chunks_[chunk_of_row_[row]];
      std::byte* block = kv.Block(chunk.block_table[position_[row] / kBlockTokens]);
      kernels_.store_kv(kv.layout, layer, position_[row] % kBlockTokens, qkv + q_size,
                        qkv + q_size + a.kv_heads * a.head_dim, block);
    }
  });
  // Every row's K and V are in place: rows of one chunk see each other.
  Split(rows_ * a.kv_heads, 1, [&](int first, int last) {
    for (int unit = first; unit < last; ++unit) {
      const int row = unit / a.kv_heads;
      const int head = unit % a.kv_heads;
      const Chunk& chunk = chunks_[chunk_of_row_[row]];
      kernels_.attend(kv, layer, head, chunk.block_table.data(), position_[row] + 1,
                      &qkv_[std::size_t(row) * stride + head * group * a.head_dim], group, a.scale,
                      &attended_[std::size_t(row) * q_size + head * group * a.head_dim]);
    }
  });
  const std::size_t row_bytes = std::size_t(q_size) * kernels_.activation_bytes;
  Split(rows_, 8, [&](int first, int last) {
    for (int row = first; row < last; ++row)
      kernels_.to_activation(&attended_[std::size_t(row) * q_size], q_size, activations_.data() + row * row_bytes);
  });
  Matmul(w.o, activations_.data(), row_bytes, rows_, projected_.data());
  for (std::size_t i = 0; i < std::size_t(rows_) * spec_.hidden; ++i) residual_[i] += projected_[i];
}

void Forward::DenseMlp(int layer, const SharedWeights& weights) {
  const LayerWeights& w = weights.layers[layer];
  NormRows(w.mlp_norm);
  std::vector<ExpertRow> rows;
  for (int row = 0; row < rows_; ++row)
    rows.push_back({activations_.data() + std::size_t(row) * spec_.hidden * kernels_.activation_bytes,
                    &projected_[std::size_t(row) * spec_.hidden]});
  const ExpertBatch batch{w.dense, rows};
  RunExperts(spec_, kernels_, threads_, {&batch, 1}, scratch_);
  for (std::size_t i = 0; i < std::size_t(rows_) * spec_.hidden; ++i) residual_[i] += projected_[i];
}

void Forward::Route(int layer, const SharedWeights& weights, void* activations, std::int32_t* experts, float* mix) {
  const LayerWeights& w = weights.layers[layer];
  const core::MoeSpec& moe = spec_.moe;
  Split(rows_, 4, [&](int first, int last) {
    std::vector<float> logits(moe.experts);
    for (int row = first; row < last; ++row) {
      float* normed = &projected_[std::size_t(row) * spec_.hidden];
      Norm(w.mlp_norm, &residual_[std::size_t(row) * spec_.hidden], normed);
      kernels_.to_activation(normed, spec_.hidden,
                             static_cast<std::byte*>(activations) + std::size_t(row) * spec_.hidden * kernels_.activation_bytes);
      kernels_.router(normed, w.router, moe.experts, spec_.hidden, logits.data());
      ChooseExperts(moe, logits, experts + std::size_t(row) * moe.top_k, mix + std::size_t(row) * moe.top_k);
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
    Norm(weights.final_norm, &residual_[std::size_t(which[i]) * spec_.hidden], &projected_[std::size_t(i) * spec_.hidden]);
    kernels_.to_activation(&projected_[std::size_t(i) * spec_.hidden], spec_.hidden, activations_.data() + i * row_bytes);
  }
  Matmul(weights.lm_head, activations_.data(), row_bytes, count, logits);
}

void RunExperts(const core::ModelSpec& spec, const Kernels& kernels, ThreadPool& threads, std::span<const ExpertBatch> batches,
                std::vector<std::byte>& scratch) {
  // A task: some panels of one expert, all of its rows, so that its weights are read once.
  struct Task {
    int batch, first_panel, last_panel;
  };
  std::vector<Task> gate_tasks, down_tasks;
  std::vector<std::size_t> first_row(batches.size());
  std::size_t rows = 0;
  std::size_t width = 0;
  for (std::size_t b = 0; b < batches.size(); ++b) {
    first_row[b] = rows;
    rows += batches[b].rows.size();
    width = std::max(width, static_cast<std::size_t>(batches[b].weights.gate.n));
  }
  const std::size_t row_bytes = (width * kernels.activation_bytes + kAlign - 1) / kAlign * kAlign;
  if (scratch.size() < rows * row_bytes) scratch.resize(rows * row_bytes);

  // Enough tasks for an even load, not so many that handing them out costs.
  const int wanted = threads.Size() == 1 ? 1 : std::max(1, threads.Size() * 4 / std::max<int>(1, static_cast<int>(batches.size())));
  const auto cut = [&](std::vector<Task>& tasks, int batch, int panels) {
    const int pieces = std::min(wanted, panels);
    for (int i = 0; i < pieces; ++i) tasks.push_back({batch, panels * i / pieces, panels * (i + 1) / pieces});
  };
  std::vector<const void*> in(rows), hidden_in(rows);
  std::vector<void*> hidden_out(rows);
  std::vector<float*> out(rows);
  for (std::size_t b = 0; b < batches.size(); ++b) {
    for (std::size_t i = 0; i < batches[b].rows.size(); ++i) {
      const std::size_t row = first_row[b] + i;
      in[row] = batches[b].rows[i].in;
      out[row] = batches[b].rows[i].out;
      hidden_in[row] = hidden_out[row] = scratch.data() + row * row_bytes;
    }
    cut(gate_tasks, static_cast<int>(b), PanelsOf(batches[b].weights.gate.n));
    cut(down_tasks, static_cast<int>(b), PanelsOf(spec.hidden));
  }
  threads.Run(static_cast<int>(gate_tasks.size()), [&](int t) {
    const Task& task = gate_tasks[t];
    const ExpertBatch& batch = batches[task.batch];
    kernels.gate_up(batch.weights.gate, batch.weights.up, in.data() + first_row[task.batch], static_cast<int>(batch.rows.size()),
                    task.first_panel, task.last_panel, hidden_out.data() + first_row[task.batch]);
  });
  threads.Run(static_cast<int>(down_tasks.size()), [&](int t) {
    const Task& task = down_tasks[t];
    const ExpertBatch& batch = batches[task.batch];
    kernels.matmul(batch.weights.down, hidden_in.data() + first_row[task.batch], static_cast<int>(batch.rows.size()),
                   task.first_panel, task.last_panel, out.data() + first_row[task.batch]);
  });
}

}  // namespace elasticmoe::compute
