// Ling and Ring: 1.x (bailing_moe) and 2.0 (bailing_moe_v2, or bailing_moe of BailingMoeV2ForCausalLM).
#pragma once

#include "model/family.h"

namespace elasticmoe::model {

const Family& BailingMoe();
const Family& BailingMoeV2();

}  // namespace elasticmoe::model
