// GLM-4.5, 4.6 (glm4_moe): DeepSeek-V3's routing over grouped-query attention with partly rotated heads.
#pragma once

#include "model/family.h"

namespace elasticmoe::model {

const Family& Glm4Moe();

}  // namespace elasticmoe::model
