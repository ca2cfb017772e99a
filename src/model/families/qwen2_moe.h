// Qwen2-MoE, Qwen1.5-MoE: an expert that every token visits, weighted by a gate; biases on q, k and v.
#pragma once

#include "model/family.h"

namespace elasticmoe::model {

const Family& Qwen2Moe();

}  // namespace elasticmoe::model
