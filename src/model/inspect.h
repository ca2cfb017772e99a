// What `elasticmoe inspect` shows of a model directory: as data, and as text for people.
#pragma once

#include <string>

#include "base/json.h"
#include "model/checkpoint.h"

namespace elasticmoe::model {

// Sizes in bytes; those per expert and per token are for bf16. Looks whether tokenizer and chat template
// files are there, but does not read the tokenizer.
Json InspectModel(const Checkpoint& checkpoint);

// Several lines, aligned, ending in a newline. REQUIRES: `report` is InspectModel's.
std::string DescribeModel(const Json& report);

}  // namespace elasticmoe::model
