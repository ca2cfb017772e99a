// Multi-head latent attention in absorbed form (DeepSeek-V2, arXiv 2405.04434 section 2.1): with k = Wk c and
// v = Wv c of a token's latent c, q . k = (Wk^T q) . c and the output is Wv (sum of p c). So the cache holds
// c and the one rotated key alone, and a step reads them once for all heads.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "compute/attend_batch.h"
#include "compute/forward.h"
#include "compute/rms_norm.h"
#include "compute/work.h"

namespace elasticmoe::compute {
namespace {

// How many heads of a row one thread takes together: most, as each such part reads the whole sequence anew,
// which takes about as long as two heads more; fewer where threads would have nothing to do.
int HeadsAPart(int heads, int rows, int threads) {
  int best = heads;
  std::int64_t least = std::numeric_limits<std::int64_t>::max();
  for (const int some : {64, 32, 16, 8, 4}) {
    const std::int64_t parts = std::int64_t{rows} * ((heads + some - 1) / some);
    const std::int64_t time = (parts + threads - 1) / threads * (std::min(some, heads) + 2);
    if (time < least) best = some, least = time;
  }
  return best;
}

}  // namespace

float* Forward::PlainQ(int row) {
  const core::AttentionSpec& a = spec_.attention;
  return a.q_lora_rank > 0 ? &q_[std::size_t(row) * a.heads * a.head_dim]
                           : &qkv_[std::size_t(row) * a.QkvRows()];
}

void Forward::LatentAttention(int layer, const LayerWeights& w, const KvCache& kv) {
  const core::AttentionSpec& a = spec_.attention;
  PrepareLatents(layer, w, kv);
  ToActivations(PlainQ(0), a.q_lora_rank > 0 ? a.heads * a.head_dim : a.QkvRows(), a.heads * a.head_dim);
  HeadMatmul(w.key_up, a.head_dim, latent_q_.data(), a.heads * a.LatentDim(), a.LatentDim());
  AttendLatents(layer, kv);
  ToActivations(latent_out_.data(), a.heads * a.kv_lora_rank, a.heads * a.kv_lora_rank);
  HeadMatmul(w.value_up, a.kv_lora_rank, attended_.data(), a.heads * a.value_dim, a.value_dim);
}

// Latents and rotated keys go to the cache, q to PlainQ and its rotated part on to latent_q_.
void Forward::PrepareLatents(int layer, const LayerWeights& w, const KvCache& kv) {
  const core::AttentionSpec& a = spec_.attention;
  const int stride = a.QkvRows();
  Split(rows_, 4, [&](int first, int last) {
    for (int row = first; row < last; ++row) {
      float* q = &qkv_[std::size_t(row) * stride];
      float* latent = q + a.QRows();
      if (a.q_lora_rank > 0) RmsNorm(w.q_down_norm, a.latent_eps, a.q_lora_rank, q, q);
      RmsNorm(w.kv_down_norm, a.latent_eps, a.kv_lora_rank, latent, latent);
      rope_.Turn(latent + a.kv_lora_rank, position_[row]);
      StoreRow(layer, row, latent, nullptr, kv);
    }
  });
  if (a.q_lora_rank > 0) {
    ToActivations(qkv_.data(), stride, a.q_lora_rank);
    Matmul(w.q_up, activations_.data(), std::size_t(a.q_lora_rank) * kernels_.activation_bytes, rows_,
           q_.data());
  }
  Split(rows_, 4, [&](int first, int last) {
    for (int row = first; row < last; ++row) {
      for (int head = 0; head < a.heads; ++head) {
        const float* from = PlainQ(row) + head * a.head_dim + a.PlainDim();
        float* to = &latent_q_[(std::size_t(row) * a.heads + head) * a.LatentDim() + a.kv_lora_rank];
        std::copy(from, from + a.RopeDim(), to);
        rope_.Turn(to, position_[row]);
      }
    }
  });
}

void Forward::HeadMatmul(const std::vector<PackedMatrix>& w, int in_head, float* out, int out_stride,
                         int out_head) {
  const int heads = spec_.attention.heads;
  const std::size_t head_bytes = std::size_t(in_head) * kernels_.activation_bytes;
  Split(heads, 1, [&](int first, int last) {
    for (int head = first; head < last; ++head) {
      const void** in_rows = &in_rows_[std::size_t(head) * rows_];
      float** out_rows = &out_rows_[std::size_t(head) * rows_];
      for (int row = 0; row < rows_; ++row) {
        in_rows[row] = activations_.data() + (std::size_t(row) * heads + head) * head_bytes;
        out_rows[row] = out + std::size_t(row) * out_stride + head * out_head;
      }
      kernels_.matmul(w[head], in_rows, rows_, 0, PanelsOf(w[head].n), out_rows);
    }
  });
}

void Forward::AttendLatents(int layer, const KvCache& kv) {
  const core::AttentionSpec& a = spec_.attention;
  const int some = HeadsAPart(a.heads, rows_, threads_.Size());
  const int parts = (a.heads + some - 1) / some;
  Split(rows_ * parts, 1, [&](int first, int last) {
    AttendBatch batch(kernels_, kv, layer, a.scale);
    for (int part = first; part < last; ++part) {
      const int row = rows_ - 1 - part / parts;  // the last rows of a chunk see the most tokens
      const int begin = part % parts * some;
      batch.Begin(chunks_[chunk_of_row_[row]].block_table.data(), 0);
      for (int i = begin; i < std::min(a.heads, begin + some); ++i) {
        const std::size_t head = std::size_t(row) * a.heads + i;
        batch.Add(
            {&latent_q_[head * a.LatentDim()], &latent_out_[head * a.kv_lora_rank], position_[row] + 1});
      }
    }
  });
}

}  // namespace elasticmoe::compute
