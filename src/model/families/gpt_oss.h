// gpt-oss (gpt_oss): attention sinks, windows on every other layer, biases, a clamped swiglu.
#pragma once

#include "model/family.h"

namespace elasticmoe::model {

const Family& GptOss();

}  // namespace elasticmoe::model
