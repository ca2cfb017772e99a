#include "model/tensor_index.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <system_error>
#include <unordered_set>
#include <utility>

#include "base/file.h"
#include "model/config_reader.h"
#include "model/safetensors.h"

namespace elasticmoe::model {
namespace {

namespace fs = std::filesystem;

constexpr char kSingle[] = "model.safetensors";
constexpr std::size_t kIndexLimitBytes = 100 << 20;  // as large as a header may be

std::optional<Encoding> EncodingOf(std::string_view dtype) {
  if (dtype == "BF16") return Encoding::kBf16;
  if (dtype == "F16") return Encoding::kF16;
  if (dtype == "F32") return Encoding::kF32;
  if (dtype == "F8_E4M3") return Encoding::kF8E4M3;
  return std::nullopt;
}

Status FindFiles(const fs::path& directory, TensorIndex& index) {
  std::error_code code;
  if (fs::exists(directory / kSingle, code)) {
    index.files = {directory / kSingle};
    return {};
  }
  const fs::path path = directory / kSafetensorsIndex;
  if (!fs::exists(path, code))
    return Fail(ErrorCode::kNotFound,
                "neither {} nor {} in it; fetch the weights, convert them to safetensors if they are .bin or "
                ".pth, or name the file itself if it is a .gguf",
                kSingle, kSafetensorsIndex);
  EM_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kIndexLimitBytes));
  auto entries = ParseWeightMap(text);
  if (!entries) return Within(fmt::format("reading {}", path.string()), std::move(entries.error()));
  std::map<std::string, int> shards;  // sorted, so that the files have one order
  for (auto& [tensor, shard] : *entries) {
    shards.try_emplace(shard);
    const auto [it, fresh] = index.shard_of.try_emplace(std::move(tensor), shard);
    if (!fresh && it->second != shard)
      return Fail(ErrorCode::kInvalidArgument,
                  "reading {}: weight_map: tensor {} is in two shards, {} and {}", path.string(),
                  Shown(it->first), it->second, shard);
  }
  for (const auto& [shard, unused] : shards) index.files.push_back(directory / shard);
  return {};
}

}  // namespace

Status AddTensors(std::vector<StoredTensor> made, TensorIndex& index) {
  std::unordered_set<std::string_view> names;
  for (const StoredTensor& tensor : index.tensors) names.insert(tensor.name);
  for (const StoredTensor& tensor : made)
    if (!names.insert(tensor.name).second)
      return Fail(ErrorCode::kInvalidArgument,
                  "reading {}: tensor {}: it is there twice, on its own and within the tensor of all experts",
                  index.FileOf(tensor).string(), Shown(tensor.name));
  std::ranges::move(made, std::back_inserter(index.tensors));
  return {};
}

Expected<TensorIndex> IndexSafetensors(const fs::path& directory) {
  TensorIndex index;
  EM_RETURN_IF_ERROR(FindFiles(directory, index));
  std::unordered_map<std::string, int> file_of;
  for (std::size_t i = 0; i < index.files.size(); ++i) {
    EM_ASSIGN_OR_RETURN(SafetensorsFile file, ReadSafetensors(index.files[i]));
    index.file_bytes.push_back(file.file_bytes);
    for (SafetensorsTensor& tensor : file.tensors) {
      const auto [it, fresh] = file_of.try_emplace(tensor.name, static_cast<int>(i));
      if (!fresh)
        return Fail(ErrorCode::kInvalidArgument,
                    "reading {}: tensor {} is in {} too; remove one of the files", index.files[i].string(),
                    Shown(tensor.name), index.files[it->second].filename().string());
      const auto encoding = EncodingOf(tensor.dtype);
      StoredTensor stored;
      stored.name = std::move(tensor.name);
      stored.dtype = std::move(tensor.dtype);
      stored.shape = std::move(tensor.shape);
      stored.known = encoding.has_value();
      stored.data = {encoding.value_or(Encoding::kBf16), static_cast<int>(i), file.data_offset + tensor.begin,
                     tensor.end - tensor.begin};
      index.tensors.push_back(std::move(stored));
    }
  }
  return index;
}

}  // namespace elasticmoe::model
