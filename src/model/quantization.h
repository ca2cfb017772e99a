// config.json's "quantization_config": how the weights of a checkpoint were made smaller, and how the tensors
// that say so are read as one. Pure.
#pragma once

#include <string>
#include <vector>

#include "base/error.h"
#include "base/json.h"
#include "model/tensor_index.h"

namespace elasticmoe::model {

struct Quantization {
  enum class Method { kNone, kFp8, kFp8Whole, kMxfp4, kGptq, kAwq, kCompressed };
  Method method = Method::kNone;
  // Of kFp8, and of kCompressed where its scales are one a block; 0 there: one a matrix or a row.
  int block_rows = 128, block_columns = 128;
  int bits = 0;                 // of kGptq, and of what kCompressed packs (0: nothing)
  int group = 0;                // of kGptq and kAwq: inputs that share a factor, 0 = all
  bool stored_less_one = true;  // of kGptq: its zeros, but in its second format
};

// kUnimplemented names every key that asks for what is not read, kInvalidArgument the one that is wrong.
Expected<Quantization> ReadQuantization(const Json& config);

// Joins values with their scales. What remains has names as if it were not quantised:
//   kFp8     X (F8_E4M3 [n, k]) and X_scale_inv [ceil(n / block_rows), ceil(k / block_columns)] become X
//   kFp8Whole  X (F8_E4M3 [n, k]) and X_scale (one, or [n] or [n, 1]: one a row) become X; the scales of
//            activations and KV caches (P.input_scale, P.k_scale, P.v_scale) go: both stay in bf16 here
//   kMxfp4   P.down_proj_blocks (U8 [experts, n, k / 32, 16]) and P.down_proj_scales (U8 [experts, n, k /
//            32]) become P.0.down_proj.weight [n, k], P.1. ...; of P.gate_up_proj_*, rows 0, 2, ... become
//            P.0.gate_proj.weight and rows 1, 3, ... P.0.up_proj.weight (gpt-oss)
//   kGptq    P.qweight (I32 [k / (32 / bits), n]), P.qzeros (I32 [groups, n / (32 / bits)]), P.scales
//            [groups, n] and, where it is there, P.g_idx (I32 [k]: the group of each input) become P.weight
//            [n, k]
//   kAwq     P.qweight (I32 [k, n / 8]), P.qzeros (I32 [groups, n / 8]) and P.scales [groups, n] likewise
//   kCompressed  P.weight_packed (I32 [n, k / (32 / bits)]), P.weight_scale ([n, groups]) and, where they are
//            there, P.weight_zero_point (I32 [n / (32 / bits), groups] or I8 [n, groups]) and P.weight_g_idx
//            become P.weight, P.weight_shape goes; P.weight of I8 [n, k] has the same scales and a zero point
//            of I8; P.weight of F8_E4M3 is joined as in kFp8Whole, or by blocks
// kInvalidArgument names the tensor that misses its other half or has another shape.
Status ResolveQuantized(const Quantization& quantization, TensorIndex& index);

}  // namespace elasticmoe::model
