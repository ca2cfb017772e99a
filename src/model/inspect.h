// What `elasticmoe inspect` shows of a model directory: as data, and as text for people.
#pragma once

#include <filesystem>
#include <string>

#include "base/json.h"
#include "model/checkpoint.h"

namespace elasticmoe::model {

// What a model is, by its config alone. `tensors` as the family names them.
struct ModelFigures {
  std::uint64_t parameters = 0;           // a tied head counts once
  std::uint64_t active_parameters = 0;    // those that one token meets, the embedding as a whole
  std::uint64_t expert_parameters = 0;    // of one expert of one layer; 0 without experts
  std::uint64_t kv_values_per_token = 0;  // cached, of all layers
};
ModelFigures FiguresOf(const core::ModelSpec& spec, const std::vector<TensorName>& tensors);

// Sizes in bytes; those per expert and per token are for bf16. Looks whether tokenizer and chat template
// files are there, but does not read the tokenizer.
Json InspectModel(const Checkpoint& checkpoint);

// All that keeps a model from being served, joined: its config and weights (headers only), its tokenizer, its
// chat template. The code is the first one's.
Status CheckServable(const std::filesystem::path& model);

// Several lines, aligned, ending in a newline. REQUIRES: `report` is InspectModel's.
std::string DescribeModel(const Json& report);

}  // namespace elasticmoe::model
