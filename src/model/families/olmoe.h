// OLMoE: RMSNorm over the whole q and the whole k.
#pragma once

#include "model/family.h"

namespace elasticmoe::model {

const Family& Olmoe();

}  // namespace elasticmoe::model
