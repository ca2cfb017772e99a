// ERNIE 4.5 MoE of text (ernie4_5_moe): softmax scores with a correction of the choice, neighbours rotated.
#pragma once

#include "model/family.h"

namespace elasticmoe::model {

const Family& Ernie45Moe();

}  // namespace elasticmoe::model
