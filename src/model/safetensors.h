// The safetensors container (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian
// header length, a JSON header, then the tensors' bytes. Parsing is apart from opening files and pure;
// only ReadSafetensors touches the disk, and reads no tensor bytes.
//
// Accepted files keep: every tensor lies within the data section, has the size that its shape and dtype
// say, shares no byte with another, and no name comes twice. Gaps and trailing bytes are allowed.
// All errors are kDataLoss unless said otherwise.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/error.h"

namespace elasticmoe::model {

inline constexpr std::uint64_t kMaxSafetensorsHeaderBytes =
    100'000'000;  // the original implementation's limit

struct SafetensorsTensor {
  std::string name;
  std::string dtype;                 // as written; sizes of unknown ones are not checked
  std::vector<std::int64_t> shape;   // empty = scalar
  std::uint64_t begin = 0, end = 0;  // bytes within the data section
};

// Tensors in the header's order; "__metadata__" is skipped. `data_bytes`: size of the data section.
Expected<std::vector<SafetensorsTensor>> ParseSafetensorsHeader(std::string_view header_json,
                                                                std::uint64_t data_bytes);

struct SafetensorsFile {
  std::vector<SafetensorsTensor> tensors;
  std::uint64_t data_offset = 0;  // of the data section in the file
  std::uint64_t file_bytes = 0;
};

// Also kNotFound, kInvalidArgument (not a regular file) and kUnavailable; each error names `path`.
Expected<SafetensorsFile> ReadSafetensors(const std::filesystem::path& path);

// "weight_map" of model.safetensors.index.json: tensor name -> shard file name, in the file's order.
// kInvalidArgument where a shard is no plain name of a .safetensors file (paths could leave the directory).
Expected<std::vector<std::pair<std::string, std::string>>> ParseWeightMap(std::string_view index_json);

}  // namespace elasticmoe::model
