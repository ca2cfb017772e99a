// A GGUF file in the terms of a Hugging Face directory: its metadata as config.json, its tensors under the
// names that the family asks for. So families, layout and loading are the same for both. Pure.
#pragma once

#include <vector>

#include "base/error.h"
#include "base/json.h"
#include "core/spec.h"
#include "model/family.h"
#include "model/gguf/gguf.h"
#include "model/tensor_index.h"

namespace elasticmoe::model {

// The config.json that the model would have. eos_token_id lists all tokens that end a turn, by the metadata
// and by well-known names. kUnimplemented: an architecture or setting that no family here has;
// kInvalidArgument names the key.
Expected<Json> GgufConfig(const Gguf& gguf);

// What the family needs, as this file has it: files of deepseek2 since llama.cpp's absorbed attention hold
// kKvUp in two.
std::vector<TensorName> GgufNeeded(const Gguf& gguf, const core::ModelSpec& spec,
                                   std::vector<TensorName> needed);

// All of `needed` (experts out of their stacks), then what is not needed under GGUF's names. kInvalidArgument
// where one is missing; kUnimplemented where one is written in a way that is not read here, or is left over
// and would change the answers.
Expected<TensorIndex> GgufIndex(const Gguf& gguf, const core::ModelSpec& spec,
                                const std::vector<TensorName>& needed);

// The generation_config.json that it would have: what general.sampling.* recommends.
Json GgufGenerationConfig(const Gguf& gguf);

}  // namespace elasticmoe::model
