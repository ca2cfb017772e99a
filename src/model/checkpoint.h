// A model on disk: a Hugging Face directory (config.json, generation_config.json, safetensors, single or
// sharded by model.safetensors.index.json), or a GGUF file (the first part of a split one). Opening checks
// everything that can be checked without reading weights: every needed tensor is there once, of right shape
// and a supported dtype, inside its file, overlapping none.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/json.h"
#include "core/spec.h"
#include "model/family.h"
#include "model/tensor_source.h"

namespace elasticmoe::model {

// Sampling defaults that generation_config.json recommends; empty where it says nothing.
struct GenerationDefaults {
  std::optional<float> temperature;
  std::optional<int> top_k;  // 0 = off
  std::optional<float> top_p;
  std::optional<float> min_p;
  std::optional<float> repetition_penalty;
};

struct Checkpoint {
  std::filesystem::path directory;  // or the GGUF file
  Json config;                      // config.json, or what a GGUF file's metadata come to
  core::ModelSpec spec;             // what SpecOf(config) gives
  GenerationDefaults generation;
  std::vector<std::filesystem::path> files;
  std::vector<std::uint64_t> file_bytes;  // size of files[i]
  std::vector<TensorSource> tensors;      // in file order, so that loading reads front to back
  std::vector<std::string> unused;        // names of tensors that the forward pass does not need, sorted
  std::uint64_t parameters = 0;           // a tied head counts once

  // Reads headers only. Errors name the file, the key and what to do:
  //   kNotFound          the directory, config.json, the weights or a shard is not there
  //   kInvalidArgument   config.json, generation_config.json or the shard index is wrong, a tensor is
  //                      missing or of another shape than config.json says
  //   kDataLoss          a weight file is cut off or its header lies
  //   kUnimplemented     an unknown family, or a dtype, setting or extra tensor that would change the answers
  static Expected<Checkpoint> Open(const std::filesystem::path& model);
};

// The model that a config.json describes, for whoever needs no weights. Errors as Open's.
Expected<core::ModelSpec> SpecOf(const Json& config);

}  // namespace elasticmoe::model
