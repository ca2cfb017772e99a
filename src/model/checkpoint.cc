#include "model/checkpoint.h"

#include <algorithm>
#include <map>
#include <system_error>
#include <tuple>
#include <unordered_map>
#include <unordered_set>

#include "base/check.h"
#include "base/file.h"
#include "base/json.h"
#include "model/config_reader.h"
#include "model/gguf/gguf.h"
#include "model/gguf/model.h"
#include "model/quantization.h"
#include "model/tensor_index.h"

namespace elasticmoe::model {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kShownRefused = 4;             // tensors that an error names
constexpr std::size_t kConfigLimitBytes = 16 << 20;  // published ones are a few KiB

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

// The tensors of the weight files by name.
using Places = std::unordered_map<std::string_view, const StoredTensor*>;

Status CheckAllPresent(const std::vector<TensorName>& needed, const TensorIndex& index,
                       const Places& places) {
  std::size_t missing = 0;
  const TensorName* first = nullptr;
  for (const TensorName& tensor : needed) {
    if (places.contains(tensor.name)) continue;
    if (missing++ == 0) first = &tensor;
  }
  if (missing == 0) return {};
  const auto listed = index.shard_of.find(first->name);
  const std::string where = index.files.size() == 1 ? index.files[0].filename().string()
                            : listed != index.shard_of.end()
                                ? fmt::format("{}, where {} says it is", listed->second, kSafetensorsIndex)
                                : fmt::format("any of the {} shards", index.files.size());
  return Fail(
      ErrorCode::kInvalidArgument,
      "tensor {} of shape [{}] is not in {} ({} of {} tensors are missing); is the download complete, and "
      "does config.json belong to these weights?",
      first->name, fmt::join(first->shape, ", "), where, missing, needed.size());
}

Expected<TensorSource> Place(const TensorName& name, const StoredTensor& tensor, const TensorIndex& index) {
  const std::string doing = fmt::format("reading {}: tensor {}", index.FileOf(tensor).string(), name.name);
  const auto listed = index.shard_of.find(name.name);
  if (listed != index.shard_of.end() && index.FileOf(tensor).filename() != listed->second)
    return Fail(ErrorCode::kInvalidArgument, "{}: {} says it is in {}; fetch the checkpoint again", doing,
                kSafetensorsIndex, listed->second);
  if (tensor.shape != name.shape)
    return Fail(
        ErrorCode::kInvalidArgument,
        "{}: shape=[{}] (expected [{}] from config.json); these weights and this config.json do not belong "
        "together",
        doing, fmt::join(tensor.shape, ", "), fmt::join(name.shape, ", "));
  return TensorSource{tensor.data, name};
}

// Names every dtype that cannot be read, with a tensor of each.
Status CheckTypes(const std::vector<TensorName>& needed, const TensorIndex& index, const Places& places) {
  std::map<std::string_view, std::pair<std::size_t, const StoredTensor*>> unknown;
  for (const TensorName& name : needed) {
    const StoredTensor* tensor = places.at(name.name);
    if (tensor->known) continue;
    auto& [count, first] = unknown[tensor->dtype];
    if (count++ == 0) first = tensor;
  }
  if (unknown.empty()) return {};
  std::vector<std::string> found;
  for (const auto& [dtype, which] : unknown)
    found.push_back(fmt::format("reading {}: tensor {}: dtype={}{}", index.FileOf(*which.second).string(),
                                which.second->name, Shown(std::string(dtype)),
                                which.first > 1 ? fmt::format(" (and {} more)", which.first - 1) : ""));
  return Fail(ErrorCode::kUnimplemented,
              "{} (supported: BF16, F16, F32, and F8_E4M3 with scales); convert the checkpoint",
              fmt::join(found, "; also: "));
}

std::string_view ModuleOf(std::string_view tensor) {
  return tensor.substr(0, tensor.rfind('.'));
}

// Fills `unused`. A tensor beside a needed one (o_proj.bias, q_proj.weight_scale) is part of the same
// operation: ignoring it would change every answer silently, so it is refused.
Status CollectUnused(const std::vector<TensorName>& needed, const TensorIndex& index, const Places& places,
                     Checkpoint& checkpoint) {
  std::unordered_set<std::string_view> names, modules;
  for (const TensorName& tensor : needed) {
    names.insert(tensor.name);
    modules.insert(ModuleOf(tensor.name));
  }
  for (const StoredTensor& tensor : index.tensors)
    if (!names.contains(tensor.name)) checkpoint.unused.push_back(tensor.name);
  std::ranges::sort(checkpoint.unused);
  std::vector<std::string> refused;
  std::size_t left_out = 0;
  for (const std::string& name : checkpoint.unused) {
    if (!modules.contains(ModuleOf(name))) continue;
    if (refused.size() < kShownRefused)
      refused.push_back(fmt::format("reading {}: tensor {} has no place in {} as config.json describes it",
                                    index.FileOf(*places.at(name)).string(), Shown(name),
                                    checkpoint.spec.family));
    else
      ++left_out;
  }
  if (refused.empty()) return {};
  if (left_out > 0) refused.push_back(fmt::format("{} more such tensors", left_out));
  return Fail(ErrorCode::kUnimplemented, "{}", fmt::join(refused, "; also: "));
}

// A head of normed columns is that head after a final norm that is divided by their lengths.
Status DivideByHead(const TensorIndex& index, std::vector<TensorSource>& tensors) {
  const auto of = [&](TensorRole role) {
    return std::ranges::find(tensors, role, [](const TensorSource& source) { return source.tensor.role; });
  };
  const auto head = of(TensorRole::kLmHead), norm = of(TensorRole::kFinalNorm);
  EM_CHECK(head != tensors.end() && norm != tensors.end());
  if (!PlainType(head->encoding) || head->scales || !head->order.InOrder())
    return Fail(
        ErrorCode::kUnimplemented,
        "reading {}: tensor {}: it is of type {}, and config.json has norm_head=true (supported: BF16, "
        "F16, F32)",
        index.files[head->file].string(), head->tensor.name, NameOf(head->encoding));
  norm->divisor = ColumnLengths{head->encoding, head->file, head->offset,
                                static_cast<std::uint64_t>(head->tensor.shape[0]),
                                static_cast<std::uint64_t>(head->tensor.shape[1])};
  return {};
}

// Looks up what the family needs; fills in the weights' part of `checkpoint`.
Status TakeTensors(const std::vector<TensorName>& needed, TensorIndex index, Checkpoint& checkpoint) {
  Places places;
  for (const StoredTensor& tensor : index.tensors) places.emplace(tensor.name, &tensor);
  EM_RETURN_IF_ERROR(CheckAllPresent(needed, index, places));
  EM_RETURN_IF_ERROR(CheckTypes(needed, index, places));
  checkpoint.tensors.reserve(needed.size());
  for (const TensorName& name : needed) {
    EM_ASSIGN_OR_RETURN(auto source, Place(name, *places.at(name.name), index));
    std::uint64_t values = 1;
    for (const std::int64_t size : name.shape) values *= static_cast<std::uint64_t>(size);
    checkpoint.parameters += values;
    checkpoint.tensors.push_back(std::move(source));
  }
  if (checkpoint.spec.head_norm) EM_RETURN_IF_ERROR(DivideByHead(index, checkpoint.tensors));
  std::ranges::sort(checkpoint.tensors, {}, [](const TensorSource& tensor) {
    return std::tuple(tensor.file, tensor.offset, tensor.order.first);
  });
  EM_RETURN_IF_ERROR(CollectUnused(needed, index, places, checkpoint));
  checkpoint.files = std::move(index.files);
  checkpoint.file_bytes = std::move(index.file_bytes);
  return {};
}

Status Read(Checkpoint& checkpoint) {
  EM_RETURN_IF_ERROR(CheckDirectory(checkpoint.directory));
  const fs::path path = checkpoint.directory / "config.json";
  EM_ASSIGN_OR_RETURN(checkpoint.config, ReadJson(path, kConfigLimitBytes));
  const Json& config = checkpoint.config;
  auto quantization = ReadQuantization(config);
  const auto family = FamilyOf(config);
  auto spec = family ? (*family)->Spec(config) : tl::unexpected<Error>(family.error());
  if (!spec || !quantization) {
    // Both, so that nobody mends one to learn of the other.
    Error error = spec ? std::move(quantization.error()) : std::move(spec.error());
    if (!spec && !quantization) error.message += "; also: " + quantization.error().message;
    return Within(fmt::format("reading {}", path.string()), std::move(error));
  }
  checkpoint.spec = *std::move(spec);
  EM_RETURN_IF_ERROR(ReadGenerationConfig(checkpoint));
  EM_ASSIGN_OR_RETURN(TensorIndex index, IndexSafetensors(checkpoint.directory));
  EM_RETURN_IF_ERROR(ResolveQuantized(*quantization, index));
  EM_RETURN_IF_ERROR((*family)->Unfuse(checkpoint.spec, index));
  return TakeTensors((*family)->Tensors(checkpoint.spec), std::move(index), checkpoint);
}

Status ReadGguf(Checkpoint& checkpoint) {
  EM_ASSIGN_OR_RETURN(const Gguf gguf, OpenGguf(checkpoint.directory));
  const auto within = [&](Error error) {
    return Within(fmt::format("reading {}", checkpoint.directory.string()), std::move(error));
  };
  const auto config = GgufConfig(gguf);
  if (!config) return within(config.error());
  const auto family = FamilyOf(*config);
  auto spec = family ? (*family)->Spec(*config) : tl::unexpected<Error>(family.error());
  if (!spec) return within(std::move(spec.error()));
  checkpoint.config = *config;
  checkpoint.spec = *std::move(spec);
  if (auto status = ReadGenerationValues(GgufGenerationConfig(gguf), checkpoint); !status)
    return within(std::move(status.error()));
  const std::vector<TensorName> needed =
      GgufNeeded(gguf, checkpoint.spec, (*family)->Tensors(checkpoint.spec));
  EM_ASSIGN_OR_RETURN(TensorIndex index, GgufIndex(gguf, checkpoint.spec, needed));
  return TakeTensors(needed, std::move(index), checkpoint);
}

}  // namespace

Expected<core::ModelSpec> SpecOf(const Json& config) {
  EM_ASSIGN_OR_RETURN(const Family* family, FamilyOf(config));
  return family->Spec(config);
}

Expected<Checkpoint> Checkpoint::Open(const fs::path& directory) {
  Checkpoint checkpoint;
  checkpoint.directory = directory;
  if (auto status = IsGgufPath(directory) ? ReadGguf(checkpoint) : Read(checkpoint); !status)
    return Within(fmt::format("opening model {}", directory.string()), std::move(status.error()));
  return checkpoint;
}

}  // namespace elasticmoe::model
