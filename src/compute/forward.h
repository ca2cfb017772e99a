// One device's part of a forward pass, stage by stage, so that whoever drives it (a worker process, a
// test, the scorer) can put the exchange of expert rows between the stages:
//
//   Begin -> for each layer { Attention; dense: DenseMlp | moe: Route -> (RunExperts anywhere) -> Combine }
//         -> Logits
//
// Rows of one step = tokens of several sequences, chunk by chunk. Nothing survives a step but the KV cache,
// so a step that was cut short is simply begun again.
// Not thread-safe; uses its ThreadPool inside.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "compute/kernels.h"
#include "compute/kv.h"
#include "compute/layout.h"
#include "compute/parallel.h"
#include "compute/rope.h"
#include "core/spec.h"

namespace elasticmoe::compute {

// Consecutive tokens of one sequence.
struct Chunk {
  int first_row = 0;
  int rows = 0;
  int start_position = 0;                      // position of the first row in its sequence
  std::span<const std::uint32_t> block_table;  // covers [0, start_position + rows) tokens
};

// One row's visit to one expert: activations in, float32 [hidden] out (unweighted).
struct ExpertRow {
  const void* in = nullptr;
  float* out = nullptr;
};

class Forward {
 public:
  // References must outlive the object. `max_rows`: largest step.
  Forward(const core::ModelSpec& spec, const Kernels& kernels, ThreadPool& threads, int max_rows);

  // Embeds tokens [rows]. `chunks` and their block tables must live until Logits.
  // REQUIRES: rows <= max_rows, ids in [0, vocab), positions < spec.max_positions.
  void Begin(const SharedWeights& weights, std::span<const TokenId> tokens, std::span<const Chunk> chunks);

  // residual += attention(norm(residual)); writes the rows' K and V.
  void Attention(int layer, const SharedWeights& weights, const KvCache& kv);

  // residual += MLP(norm(residual)) of a dense layer.
  void DenseMlp(int layer, const SharedWeights& weights);

  // The dispatch side of a MoE layer: normed rows in activation format to `activations`
  // [rows, hidden], chosen experts to `experts` [rows, top_k] (best first; -1 = none, after all others) and
  // their weights to `mix`.
  void Route(int layer, const SharedWeights& weights, void* activations, std::int32_t* experts, float* mix);

  // The combine side: residual[row] += sum over j in router order of mix[row, j] * outputs[row, j].
  // outputs float32 [rows, top_k, hidden].
  void Combine(const float* outputs, const float* mix);

  // Final norm and head of the given rows: logits float32 [which.size(), vocab].
  void Logits(const SharedWeights& weights, std::span<const int> which, float* logits);

  // The same in two, so that several devices may each compute a part of the vocabulary: the given rows' input
  // of the head [which.size(), hidden] in activation format, and part `part` of `parts` of its outputs: in[i]
  // one row's input, out[i] its logits [vocab], of which that part is written. The second needs no rows of
  // its own.
  void HeadInput(const SharedWeights& weights, std::span<const int> which, void* out);
  void HeadPart(const SharedWeights& weights, std::span<const void* const> in, std::span<float* const> out,
                int part, int parts);

  int Rows() const { return rows_; }

 private:
  // Rows of one chunk that go through attention together, a unit a KV head: they share the reads of K and V.
  struct Tile {
    int chunk, first_row, rows;
  };

  // Calls body(first, last) for pieces of [0, count), at least `least` long, on all threads.
  template <class Body>
  void Split(int count, int least, const Body& body) {
    const int most = threads_.Size() == 1 ? 1 : threads_.Size() * 4;
    const int pieces = std::clamp(count / std::max(1, least), 1, most);
    threads_.Run(pieces, [&](int piece) {
      const int first = static_cast<int>(static_cast<std::int64_t>(count) * piece / pieces);
      const int last = static_cast<int>(static_cast<std::int64_t>(count) * (piece + 1) / pieces);
      if (first < last) body(first, last);
    });
  }
  void NormRows(const float* weight);  // residual -> activations_
  // qkv_ is normed, clipped and turned in place; K and V go to the cache.
  void PrepareQkv(int layer, const LayerWeights& w, const KvCache& kv);
  void StoreRow(int layer, int row, const float* k, const float* v, const KvCache& kv);
  void AttendRows(int layer, const float* sinks, const KvCache& kv);  // qkv_ -> attended_
  void AddProjected();                                                // residual += projected_
  void RunDense(const MlpWeights& weights, const std::byte* activations, float* out);  // out [rows, hidden]
  void ToCosines(const LayerWeights& w, int first, int last, float* logits) const;
  void SharedExpert(const LayerWeights& w, const std::byte* activations);
  // values [rows, stride], the first `count` of each row -> activations_ [rows, count]
  void ToActivations(const float* values, int stride, int count);

  // Multi-head latent attention, qkv_ -> attended_ (forward_latent.cc). A head's keys are never made: q is
  // taken to where the latents are, and what it gathers there is taken to the head's values.
  void LatentAttention(int layer, const LayerWeights& w, const KvCache& kv);
  void PrepareLatents(int layer, const LayerWeights& w, const KvCache& kv);
  float* PlainQ(int row);  // [heads, head_dim] of a row
  void AttendLatents(int layer, const KvCache& kv);
  // out of head h [rows] = in of head h x w[h]; rows of heads at out + row * out_stride + h * out_head.
  void HeadMatmul(const std::vector<PackedMatrix>& w, int in_head, float* out, int out_stride, int out_head);

  // Rows as w wants to be multiplied by them: as they are, or quantized (until the next call).
  const void* const* Operands(const PackedMatrix& w, const void* const* in, int rows);
  // rows x panels [begin, end) of w.
  void Panels(const PackedMatrix& w, const void* const* in, int rows, int begin, int end, float* const* out);
  // rows x w -> out [rows, w.n]
  void Matmul(const PackedMatrix& w, const std::byte* in, std::size_t in_stride, int rows, float* out);
  const void* const* RowPointers(const std::byte* base, std::size_t stride, int rows);

  const core::ModelSpec& spec_;
  const Kernels& kernels_;
  ThreadPool& threads_;
  int max_rows_;
  int rows_ = 0;
  std::span<const Chunk> chunks_;
  std::vector<int> chunk_of_row_;
  std::vector<int> position_;
  std::vector<Tile> tiles_;
  Rope rope_;
  std::vector<float> residual_;         // [rows, hidden]
  std::vector<std::byte> activations_;  // [rows, the widest input] in activation format
  std::vector<float> qkv_;              // [rows, QkvRows]
  std::vector<float> attended_;         // [rows, heads * OutDim]
  std::vector<float> projected_;        // [rows, hidden]
  std::vector<float> router_logits_;    // [rows, 2 experts + groups]
  std::vector<float> shared_;           // [rows, hidden]: the shared expert's output
  std::vector<float> q_;                // MLA with q_lora_rank: [rows, heads * head_dim]
  std::vector<float> latent_q_;         // MLA: [rows, heads, LatentDim]
  std::vector<float> latent_out_;       // MLA: [rows, heads, kv_lora_rank]
  std::vector<const void*> in_rows_;
  std::vector<float*> out_rows_;
  std::vector<ExpertRow> dense_rows_;
  std::vector<std::byte> quantized_;  // [rows, the widest quantized input], none where all weights are bf16
  std::vector<const void*> quantized_rows_;
  std::vector<std::byte> scratch_;
};

// Runs experts over their rows; experts[i] on rows[i]. Needs no Forward: a device without sequences
// serves its experts too. `scratch` is resized as needed and reused.
struct ExpertBatch {
  MlpWeights weights;
  std::span<const ExpertRow> rows;
};
void RunExperts(const core::ModelSpec& spec, const Kernels& kernels, ThreadPool& threads,
                std::span<const ExpertBatch> batches, std::vector<std::byte>& scratch);

}  // namespace elasticmoe::compute
