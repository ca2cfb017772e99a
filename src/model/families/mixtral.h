// Mixtral (8x7B, 8x22B): GQA without q/k norms, every layer MoE, chosen experts' weights renormalised.
#pragma once

#include "model/family.h"

namespace elasticmoe::model {

const Family& Mixtral();

}  // namespace elasticmoe::model
