// Qwen3-MoE (Qwen3-30B-A3B and kin): GQA with q/k norms, softmax router, MoE layers with dense ones among
// them.
#pragma once

#include "model/family.h"

namespace elasticmoe::model {

const Family& Qwen3Moe();

}  // namespace elasticmoe::model
