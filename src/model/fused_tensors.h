// What a checkpoint holds as one tensor, read as the tensors that it consists of. Pure.
#pragma once

#include <string_view>
#include <vector>

#include "base/error.h"
#include "model/tensor_index.h"

namespace elasticmoe::model {

// What gpt-oss's bf16 checkpoints and its biases look like (modeling_gpt_oss.py: x @ gate_up_proj, whose
// outputs 0, 2, ... are the gate's and 1, 3, ... up's):
//   P.gate_up_proj [experts, k, 2 n]    becomes P.0.gate_proj.weight [n, k], P.0.up_proj.weight, P.1. ...
//   P.down_proj [experts, k, n]         becomes P.0.down_proj.weight [n, k], ...
//   P.gate_up_proj_bias [experts, 2 n]  becomes P.0.gate_proj.bias [n], P.0.up_proj.bias, ...
//   P.down_proj_bias [experts, n]       becomes P.0.down_proj.bias [n], ...
// where P ends in ".experts". What MXFP4 blocks hold is split by quantization.h.
// kInvalidArgument names the tensor that has another shape, or whose parts are there already.
Status SplitFusedExperts(TensorIndex& index);

// What transformers 5 writes where it is not told to write what it has read: the matrices of all experts one
// after another, gate above up.
//   P.gate_up_proj [experts, 2 n, k]    becomes P.0.GATE.weight [n, k], P.0.UP.weight, P.1. ...
//   P.down_proj [experts, k, n]         becomes P.0.DOWN.weight [k, n], ...
// where P ends in ".experts". kInvalidArgument as above.
struct ExpertNames {
  std::string_view gate = "gate_proj", up = "up_proj", down = "down_proj";
};
Status SplitStackedExperts(const ExpertNames& names, TensorIndex& index);

// Every tensor that has `part` in its name has `other` instead.
void RenameTensors(std::string_view part, std::string_view other, TensorIndex& index);

// Rows of a fused matrix that are a matrix of their own.
struct RowPart {
  std::string_view name;
  std::int64_t rows = 0;
};

// Every tensor "P.NAME.weight" [sum of rows, k] becomes "P.NAME.PART.weight" [rows, k], one a part, in that
// order; a bias likewise. kInvalidArgument as above.
Status SplitFusedRows(std::string_view name, const std::vector<RowPart>& parts, TensorIndex& index);

}  // namespace elasticmoe::model
