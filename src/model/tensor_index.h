// What the weight files of a checkpoint hold, before it is held against a model: every tensor with its name
// and shape, in whichever file it lies.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/error.h"
#include "model/tensor_source.h"

namespace elasticmoe::model {

inline constexpr char kSafetensorsIndex[] = "model.safetensors.index.json";

struct StoredTensor {
  std::string name;
  std::string dtype;                // as the file writes it
  std::vector<std::int64_t> shape;  // slowest dimension first
  TensorData data = {};             // its encoding counts only where `known`
  bool known = false;               // the dtype is one of Encoding
};

struct TensorIndex {
  std::vector<std::filesystem::path> files;
  std::vector<std::uint64_t> file_bytes;
  std::vector<StoredTensor> tensors;                      // names differ
  std::unordered_map<std::string, std::string> shard_of;  // what an index file says, by tensor name

  const std::filesystem::path& FileOf(const StoredTensor& tensor) const { return files[tensor.data.file]; }
};

// Adds tensors that were made out of others. kInvalidArgument where one of that name is there already; the
// index is then as it was.
Status AddTensors(std::vector<StoredTensor> made, TensorIndex& index);

// model.safetensors, or the shards of model.safetensors.index.json. Reads headers only. Errors name the file.
Expected<TensorIndex> IndexSafetensors(const std::filesystem::path& directory);

}  // namespace elasticmoe::model
