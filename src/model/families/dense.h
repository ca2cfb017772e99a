// Decoders without experts: Llama, Mistral, Qwen2, Qwen3. A MoE model of which no layer has experts.
#pragma once

#include "model/family.h"

namespace elasticmoe::model {

const Family& Llama();
const Family& Mistral();
const Family& Qwen2();
const Family& Qwen3();

}  // namespace elasticmoe::model
