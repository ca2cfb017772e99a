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
  enum class Method { kNone, kFp8, kFp8Whole, kMxfp4 };
  Method method = Method::kNone;
  int block_rows = 128, block_columns = 128;  // of kFp8
};

// kUnimplemented or kInvalidArgument name the key.
Expected<Quantization> ReadQuantization(const Json& config);

// Joins values with their scales. What remains has names as if it were not quantised:
//   kFp8     X (F8_E4M3 [n, k]) and X_scale_inv [ceil(n / block_rows), ceil(k / block_columns)] become X
//   kFp8Whole  X (F8_E4M3 [n, k]) and X_scale (one, or [n] or [n, 1]: one a row) become X; the scales of
//   activations and
//            KV caches (P.input_scale, P.k_scale, P.v_scale) go: both stay in bf16 here
//   kMxfp4   P.down_proj_blocks (U8 [experts, n, k / 32, 16]) and P.down_proj_scales (U8 [experts, n, k /
//   32])
//            become P.0.down_proj.weight [n, k], P.1. ...; of P.gate_up_proj_*, rows 0, 2, ... become
//            P.0.gate_proj.weight and rows 1, 3, ... P.0.up_proj.weight (gpt-oss)
// kInvalidArgument names the tensor that misses its other half or has another shape.
Status ResolveQuantized(const Quantization& quantization, TensorIndex& index);

}  // namespace elasticmoe::model
