// DeepSeek-V2, V2-Lite (deepseek_v2) and V3, R1 (deepseek_v3): multi-head latent attention, grouped routing.
#pragma once

#include "model/family.h"

namespace elasticmoe::model {

const Family& DeepseekV2();
const Family& DeepseekV3();

}  // namespace elasticmoe::model
