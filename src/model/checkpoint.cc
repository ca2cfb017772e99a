#include "model/checkpoint.h"

#include <algorithm>
#include <map>
#include <system_error>
#include <unordered_map>
#include <unordered_set>

#include "base/file.h"
#include "base/json.h"
#include "model/config_reader.h"
#include "model/safetensors.h"

namespace elasticmoe::model {
namespace {

namespace fs = std::filesystem;

constexpr char kSingle[] = "model.safetensors";
constexpr char kIndex[] = "model.safetensors.index.json";
constexpr std::size_t kConfigLimitBytes = 16 << 20;  // published ones are a few KiB
constexpr std::size_t kIndexLimitBytes = 100 << 20;  // as large as a header may be

Status CheckDirectory(const fs::path& directory) {
  std::error_code code;
  const auto status = fs::status(directory, code);
  if (status.type() == fs::file_type::not_found)
    return Fail(ErrorCode::kNotFound, "no such directory; give the folder that holds config.json");
  if (code) return Fail(ErrorCode::kUnavailable, "{}", code.message());
  if (!fs::is_directory(status))
    return Fail(ErrorCode::kInvalidArgument, "not a directory; give the folder that holds config.json");
  if (!fs::exists(directory / "config.json", code))
    return Fail(ErrorCode::kNotFound, "no config.json in it; give the folder of a Hugging Face checkpoint");
  return {};
}

Expected<Json> ReadJson(const fs::path& path, std::size_t limit_bytes) {
  EM_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, limit_bytes));
  auto json = ParseJson(text);
  if (!json) return Within(fmt::format("reading {}", path.string()), std::move(json.error()));
  return json;
}

Status ReadGenerationValues(const Json& json, Checkpoint& checkpoint) {
  EM_RETURN_IF_ERROR(IsObject(json));
  const ConfigReader config(json);
  EM_ASSIGN_OR_RETURN(auto eos, config.Ints("eos_token_id", 0, checkpoint.spec.vocab - 1));
  if (!eos.empty()) checkpoint.spec.eos_ids = std::move(eos);
  GenerationDefaults& generation = checkpoint.generation;
  if (config.Find("top_k")) {
    EM_ASSIGN_OR_RETURN(const int top_k, config.Int("top_k", -1, INT32_MAX));
    generation.top_k = std::max(top_k, 0);  // -1 is another way to say off
  }
  struct Row {
    const char* key;
    double low, high;
    std::optional<float>& value;
  };
  // Lowest values above zero where zero means nothing. 100 flattens or sharpens beyond any use.
  const Row rows[] = {{"temperature", 0.0, 100.0, generation.temperature},
                      {"top_p", 1e-6, 1.0, generation.top_p},
                      {"min_p", 0.0, 1.0, generation.min_p},
                      {"repetition_penalty", 1e-6, 100.0, generation.repetition_penalty}};
  for (const Row& row : rows) {
    if (!config.Find(row.key)) continue;
    EM_ASSIGN_OR_RETURN(const double value, config.Number(row.key, row.low, row.high, 0.0));
    row.value = static_cast<float>(value);
  }
  return {};
}

Status ReadGenerationConfig(Checkpoint& checkpoint) {
  const fs::path path = checkpoint.directory / "generation_config.json";
  std::error_code code;
  if (!fs::exists(path, code)) return {};
  EM_ASSIGN_OR_RETURN(const Json json, ReadJson(path, kConfigLimitBytes));
  if (auto status = ReadGenerationValues(json, checkpoint); !status)
    return Within(fmt::format("reading {}", path.string()), std::move(status.error()));
  return {};
}

// Everything that the weight files say, before it is held against the model.
struct Contents {
  struct Place {
    int file = 0;
    const SafetensorsTensor* tensor = nullptr;
  };
  std::vector<SafetensorsFile> files;
  std::unordered_map<std::string_view, Place> places;     // by tensor name
  std::unordered_map<std::string, std::string> shard_of;  // the index, by tensor name; empty without one
};

Status FindFiles(const fs::path& directory, Contents& contents, std::vector<fs::path>& files) {
  std::error_code code;
  if (fs::exists(directory / kSingle, code)) {
    files = {directory / kSingle};
    return {};
  }
  const fs::path index = directory / kIndex;
  if (!fs::exists(index, code))
    return Fail(
        ErrorCode::kNotFound,
        "neither {} nor {} in it; fetch the weights, or convert them to safetensors if they are .bin, .pth "
        "or .gguf",
        kSingle, kIndex);
  EM_ASSIGN_OR_RETURN(const std::string text, ReadFile(index, kIndexLimitBytes));
  auto entries = ParseWeightMap(text);
  if (!entries) return Within(fmt::format("reading {}", index.string()), std::move(entries.error()));
  std::map<std::string, int> shards;  // sorted, so that the files have one order
  for (auto& [tensor, shard] : *entries) {
    shards.try_emplace(shard);
    const auto [it, fresh] = contents.shard_of.try_emplace(std::move(tensor), shard);
    if (!fresh && it->second != shard)
      return Fail(ErrorCode::kInvalidArgument,
                  "reading {}: weight_map: tensor {} is in two shards, {} and {}", index.string(),
                  Shown(it->first), it->second, shard);
  }
  for (const auto& [shard, unused] : shards) files.push_back(directory / shard);
  return {};
}

Status ReadContents(const fs::path& directory, Contents& contents, std::vector<fs::path>& files) {
  EM_RETURN_IF_ERROR(FindFiles(directory, contents, files));
  for (const fs::path& path : files) {
    EM_ASSIGN_OR_RETURN(auto file, ReadSafetensors(path));
    contents.files.push_back(std::move(file));
  }
  for (std::size_t i = 0; i < files.size(); ++i) {
    for (const SafetensorsTensor& tensor : contents.files[i].tensors) {
      const auto [it, fresh] =
          contents.places.try_emplace(tensor.name, Contents::Place{static_cast<int>(i), &tensor});
      if (!fresh)
        return Fail(ErrorCode::kInvalidArgument,
                    "reading {}: tensor {} is in {} too; remove one of the files", files[i].string(),
                    Shown(tensor.name), files[it->second.file].filename().string());
    }
  }
  return {};
}

Expected<DType> SupportedType(std::string_view dtype) {
  if (dtype == "BF16") return DType::kBf16;
  if (dtype == "F16") return DType::kF16;
  if (dtype == "F32") return DType::kF32;
  return Fail(ErrorCode::kUnimplemented, "dtype={} (supported: BF16, F16, F32); convert the checkpoint",
              Shown(std::string(dtype)));
}

Status CheckAllPresent(const std::vector<TensorName>& needed, const Contents& contents,
                       const std::vector<fs::path>& files) {
  std::size_t missing = 0;
  const TensorName* first = nullptr;
  for (const TensorName& tensor : needed) {
    if (contents.places.contains(tensor.name)) continue;
    if (missing++ == 0) first = &tensor;
  }
  if (missing == 0) return {};
  const auto listed = contents.shard_of.find(first->name);
  const std::string where = files.size() == 1 ? files[0].filename().string()
                            : listed != contents.shard_of.end()
                                ? fmt::format("{}, where {} says it is", listed->second, kIndex)
                                : fmt::format("any of the {} shards", files.size());
  return Fail(
      ErrorCode::kInvalidArgument,
      "tensor {} of shape [{}] is not in {} ({} of {} tensors are missing); is the download complete, and "
      "does config.json belong to these weights?",
      first->name, fmt::join(first->shape, ", "), where, missing, needed.size());
}

Expected<TensorSource> Place(const TensorName& name, const Contents& contents,
                             const std::vector<fs::path>& files) {
  const Contents::Place& place = contents.places.at(name.name);
  const SafetensorsTensor& tensor = *place.tensor;
  const std::string doing = fmt::format("reading {}: tensor {}", files[place.file].string(), name.name);
  const auto listed = contents.shard_of.find(name.name);
  if (listed != contents.shard_of.end() && files[place.file].filename() != listed->second)
    return Fail(ErrorCode::kInvalidArgument, "{}: {} says it is in {}; fetch the checkpoint again", doing,
                kIndex, listed->second);
  auto type = SupportedType(tensor.dtype);
  if (!type) return Within(doing, std::move(type.error()));
  if (tensor.shape != name.shape)
    return Fail(
        ErrorCode::kInvalidArgument,
        "{}: shape=[{}] (expected [{}] from config.json); these weights and this config.json do not belong "
        "together",
        doing, fmt::join(tensor.shape, ", "), fmt::join(name.shape, ", "));
  return TensorSource{name, *type, place.file, contents.files[place.file].data_offset + tensor.begin,
                      tensor.end - tensor.begin};
}

std::string_view ModuleOf(std::string_view tensor) {
  return tensor.substr(0, tensor.rfind('.'));
}

// Fills `unused`. A tensor beside a needed one (o_proj.bias, q_proj.weight_scale) is part of the same
// operation: ignoring it would change every answer silently, so it is refused.
Status CollectUnused(const std::vector<TensorName>& needed, const Contents& contents,
                     const std::vector<fs::path>& files, Checkpoint& checkpoint) {
  std::unordered_set<std::string_view> names, modules;
  for (const TensorName& tensor : needed) {
    names.insert(tensor.name);
    modules.insert(ModuleOf(tensor.name));
  }
  for (const auto& [name, place] : contents.places)
    if (!names.contains(name)) checkpoint.unused.emplace_back(name);
  std::ranges::sort(checkpoint.unused);
  for (const std::string& name : checkpoint.unused)
    if (modules.contains(ModuleOf(name)))
      return Fail(ErrorCode::kUnimplemented,
                  "reading {}: tensor {} has no place in {} as config.json describes it",
                  files[contents.places.at(name).file].string(), Shown(name), checkpoint.spec.family);
  return {};
}

Status ReadTensors(const Family& family, Checkpoint& checkpoint) {
  Contents contents;
  EM_RETURN_IF_ERROR(ReadContents(checkpoint.directory, contents, checkpoint.files));
  for (const SafetensorsFile& file : contents.files) checkpoint.file_bytes.push_back(file.file_bytes);
  const std::vector<TensorName> needed = family.Tensors(checkpoint.spec);
  EM_RETURN_IF_ERROR(CheckAllPresent(needed, contents, checkpoint.files));
  checkpoint.tensors.reserve(needed.size());
  for (const TensorName& name : needed) {
    EM_ASSIGN_OR_RETURN(auto source, Place(name, contents, checkpoint.files));
    checkpoint.parameters += source.bytes / BytesOf(source.type);
    checkpoint.tensors.push_back(std::move(source));
  }
  std::ranges::sort(checkpoint.tensors, {},
                    [](const TensorSource& tensor) { return std::pair(tensor.file, tensor.offset); });
  return CollectUnused(needed, contents, checkpoint.files, checkpoint);
}

Status Read(Checkpoint& checkpoint) {
  EM_RETURN_IF_ERROR(CheckDirectory(checkpoint.directory));
  const fs::path path = checkpoint.directory / "config.json";
  EM_ASSIGN_OR_RETURN(const Json config, ReadJson(path, kConfigLimitBytes));
  const auto family = FamilyOf(config);
  auto spec = family ? (*family)->Spec(config) : tl::unexpected<Error>(family.error());
  if (!spec) return Within(fmt::format("reading {}", path.string()), std::move(spec.error()));
  checkpoint.spec = *std::move(spec);
  EM_RETURN_IF_ERROR(ReadGenerationConfig(checkpoint));
  return ReadTensors(**family, checkpoint);
}

}  // namespace

Expected<Checkpoint> Checkpoint::Open(const fs::path& directory) {
  Checkpoint checkpoint;
  checkpoint.directory = directory;
  if (auto status = Read(checkpoint); !status)
    return Within(fmt::format("opening model {}", directory.string()), std::move(status.error()));
  return checkpoint;
}

}  // namespace elasticmoe::model
