// A Hugging Face checkpoint directory: config.json, generation_config.json, safetensors (single or sharded by
// model.safetensors.index.json). Opening checks everything that can be checked without reading weights:
// every needed tensor is there once, of right shape and a supported dtype, inside its file, overlapping none.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "base/error.h"
#include "core/spec.h"
#include "model/dtype.h"
#include "model/family.h"

namespace elasticmoe::model {

// Where a tensor's bytes lie on disk.
struct TensorSource {
  TensorName tensor;
  DType type = DType::kBf16;
  int file = 0;              // index into Checkpoint::files
  std::uint64_t offset = 0;  // of the first byte in that file
  std::uint64_t bytes = 0;
};

struct Checkpoint {
  std::filesystem::path directory;
  core::ModelSpec spec;
  std::vector<std::filesystem::path> files;
  std::vector<TensorSource> tensors;  // in file order, so that loading reads front to back
  std::uint64_t parameters = 0;

  // Reads headers only. Errors name the file, the key and what to do.
  static Expected<Checkpoint> Open(const std::filesystem::path& directory);
};

}  // namespace elasticmoe::model
