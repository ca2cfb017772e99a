// The contract of the compute kernels. One table of functions an instruction set; all batch-invariant:
// each output element is accumulated in one fixed order over k, whatever m is and however the work is
// split over threads. Different tables may differ in the last bits, one table never from itself.
//
// Activations travel in the table's own format: float32 (reference) or bf16 (SIMD tables).
// All functions are thread-safe on disjoint outputs and never allocate.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "compute/activation.h"
#include "compute/kv.h"
#include "compute/packed.h"

namespace elasticmoe::compute {

inline constexpr int kMaxHeadDim = 512;
inline constexpr int kMaxLatentDim = 1024;  // DeepSeek: 512 + 64

// One head of one row.
struct Query {
  const float* q = nullptr;  // [head_dim]
  float* out = nullptr;      // [head_dim]; over latents [latent_values]
  int tokens = 1;            // attends to tokens [first, tokens) of its sequence
  int first = 0;             // not over latents
  float sink =
      -std::numeric_limits<float>::infinity();  // a logit without a value; -inf = none. Not over latents
};

inline constexpr int kUnitQueries = 16;

// Queries of one sequence whose heads share a KV head, handed to Kernels::attend together.
struct AttendUnit {
  const std::uint32_t* block_table = nullptr;  // covers the tokens of all queries
  int kv_head = 0;                             // 0 over latents
  const Query* queries = nullptr;              // [count]
  int count = 0;                               // in [1, kUnitQueries]
};

// Products of int8 and int4 matrices (packed.h). Their rows are quantized rows (quantized_row.h): groups of
// 64 inputs of int8 that share a scale. Sums within a group are exact integers, scaled and added group by
// group, front to back.
struct QuantizedKernels {
  // QuantizeGroups (quantize.h), as fast as the instruction set allows; the same bits in every table.
  void (*pack)(const float* values, WeightFormat format, int first_lane, std::byte* group);

  // A row of k activations in the table's format -> a quantized row.
  void (*quantize)(const void* activations, int k, void* quantized);

  // As Kernels::matmul, over quantized rows.
  void (*matmul)(const PackedMatrix& w, const void* const* rows, int m, int panel_begin, int panel_end,
                 float* const* out);

  // As Kernels::gate_up, quantized rows in and out: the panels' groups of each out[i] are written. REQUIRES:
  // an even panel_begin, and a panel_end that is even or the last.
  void (*gate_up)(const PackedMatrix& gate, const PackedMatrix& up, const Activation& activation,
                  const void* const* rows, int m, int panel_begin, int panel_end, void* const* out);
};

struct Kernels {
  std::string_view name;         // "reference", "avx2", "avx512", "avx512vnni", "avx512bf16", "amxbf16"
  int activation_bytes = 4;      // of one activation element: 4 = float32, 2 = bf16
  int kv_element_bytes = 4;      // of one K or V element in the cache
  bool wants_even_rows = false;  // faster where the rows of a call lie at one distance from each other

  // float32 row -> activation format.
  void (*to_activation)(const float* in, int count, void* out);

  // out[i][j] for rows i in [0, m), outputs j of panels [panel_begin, panel_end): sum over k of
  // x[i][k] * w[j][k]. rows[i] points at k activations; out[i] at float32 [w.n], of which only the
  // panels' part is written (no further than w.n).
  void (*matmul)(const PackedMatrix& w, const void* const* rows, int m, int panel_begin, int panel_end,
                 float* const* out);

  // out[i][j] = activation(gate_j . x[i], up_j . x[i]) in activation format, same panels of two matrices of
  // one shape.
  void (*gate_up)(const PackedMatrix& gate, const PackedMatrix& up, const Activation& activation,
                  const void* const* rows, int m, int panel_begin, int panel_end, void* const* out);

  // logits[i][e] = x[i] . w[e], all float32 and dense: x [m, hidden], w [experts, hidden], logits [m,
  // experts].
  void (*router)(const float* x, int m, const float* w, int experts, int hidden, float* logits);

  // Writes the K and V of one token (float32 [kv_heads, head_dim] each, RoPE applied) into `layer` of
  // its block, at token slot `slot` in [0, kBlockTokens). Over latents k is the row [head_dim] and v unused.
  void (*store_kv)(const KvLayout& layout, int layer, int slot, const float* k, const float* v,
                   std::byte* block);

  // Attention of `count` units, one after the other (what the next one reads is fetched meanwhile): blocks in
  // order, online softmax. A query's result depends on its own tokens only, not on the other queries or units
  // nor on what else its last block holds. REQUIRES: an even head_dim <= kMaxHeadDim, over latents
  // <= kMaxLatentDim.
  void (*attend)(const KvCache& kv, int layer, const AttendUnit* units, int count, float scale);

  QuantizedKernels quantized;  // matmul and gate_up above are for bf16 matrices
};

// The tables this machine can run, best first; "reference" is always the last.
const std::vector<const Kernels*>& AvailableKernels();

// "auto" = the best. kInvalidArgument with the names this machine has, if `name` is none of them.
Expected<const Kernels*> FindKernels(std::string_view name);

}  // namespace elasticmoe::compute
