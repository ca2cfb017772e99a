#include "model/quantization.h"

#include <optional>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "model/config_reader.h"
#include "model/families/decoder.h"

namespace elasticmoe::model {
namespace {

constexpr std::string_view kScaleInv = "_scale_inv";
constexpr std::string_view kScale = "_scale";
constexpr std::string_view kBlocks = "_blocks";
constexpr std::string_view kScales = "_scales";
constexpr std::int64_t kMxBlock = 32;       // values that share a scale
constexpr std::int64_t kMxBlockBytes = 16;  // two values a byte

std::string Shape(const std::vector<std::int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

using ByName = std::unordered_map<std::string_view, std::size_t>;

ByName Names(const TensorIndex& index) {
  ByName names;
  for (std::size_t i = 0; i < index.tensors.size(); ++i) names.emplace(index.tensors[i].name, i);
  return names;
}

std::string Doing(const TensorIndex& index, const StoredTensor& tensor) {
  return fmt::format("reading {}: tensor {}", index.FileOf(tensor).string(), Shown(tensor.name));
}

// Leaves out the tensors whose place in `drop` is set.
void Drop(const std::vector<bool>& drop, std::vector<StoredTensor>& tensors) {
  std::size_t kept = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (drop[i]) continue;
    if (kept != i) tensors[kept] = std::move(tensors[i]);
    ++kept;
  }
  tensors.resize(kept);
}

// The blocks of the scales that belong to `values`, in a tensor of that shape; nullopt where it has another.
std::optional<std::pair<std::uint32_t, std::uint32_t>> BlockOf(const Quantization& quantization,
                                                               const std::vector<std::int64_t>& values,
                                                               const std::vector<std::int64_t>& scales) {
  const auto rows = static_cast<std::uint32_t>(values[0]), columns = static_cast<std::uint32_t>(values[1]);
  if (quantization.method == Quantization::Method::kFp8) {
    const std::vector<std::int64_t> expected = {
        (values[0] + quantization.block_rows - 1) / quantization.block_rows,
        (values[1] + quantization.block_columns - 1) / quantization.block_columns};
    if (scales != expected) return std::nullopt;
    return std::pair(static_cast<std::uint32_t>(quantization.block_rows),
                     static_cast<std::uint32_t>(quantization.block_columns));
  }
  std::int64_t count = 1;
  for (const std::int64_t size : scales) count *= size;
  if (scales.size() <= 2 && count == 1) return std::pair(rows, columns);
  if (!scales.empty() && scales[0] == values[0] && count == values[0]) return std::pair(1U, columns);
  return std::nullopt;
}

bool IsActivationScale(std::string_view name) {
  return name.ends_with(".input_scale") || name.ends_with(".k_scale") || name.ends_with(".v_scale");
}

Status JoinFp8(const Quantization& quantization, TensorIndex& index) {
  const bool whole = quantization.method == Quantization::Method::kFp8Whole;
  const std::string_view ending = whole ? kScale : kScaleInv;
  const ByName names = Names(index);
  std::vector<bool> drop(index.tensors.size(), false);
  for (std::size_t i = 0; i < index.tensors.size(); ++i) {
    StoredTensor& tensor = index.tensors[i];
    if (tensor.dtype == "F8_E4M3" && !names.contains(tensor.name + std::string(ending)))
      return Fail(ErrorCode::kInvalidArgument, "{}: dtype=F8_E4M3 without {}{}; fetch the checkpoint again",
                  Doing(index, tensor), tensor.name, ending);
    if (whole && IsActivationScale(tensor.name)) {
      drop[i] = true;
      continue;
    }
    if (!tensor.name.ends_with(ending)) continue;
    const std::string base = tensor.name.substr(0, tensor.name.size() - ending.size());
    const auto at = names.find(base);
    if (at == names.end())
      return Fail(ErrorCode::kInvalidArgument, "{}: there is no {}; fetch the checkpoint again",
                  Doing(index, tensor), Shown(base));
    StoredTensor& values = index.tensors[at->second];
    if (values.dtype != "F8_E4M3" || values.shape.size() != 2)
      return Fail(ErrorCode::kInvalidArgument, "{}: {} is {} {} (expected F8_E4M3 of two dimensions)",
                  Doing(index, tensor), base, values.dtype, Shape(values.shape));
    const auto block = BlockOf(quantization, values.shape, tensor.shape);
    if (!block && whole)
      return Fail(ErrorCode::kInvalidArgument, "{}: shape={} (expected one value, or one for each row of {})",
                  Doing(index, tensor), Shape(tensor.shape), Shape(values.shape));
    if (!block)
      return Fail(
          ErrorCode::kInvalidArgument,
          "{}: shape={} (expected one for each block of {} x {} of {}, config.json's weight_block_size)",
          Doing(index, tensor), Shape(tensor.shape), quantization.block_rows, quantization.block_columns,
          Shape(values.shape));
    if (!tensor.known || !PlainType(tensor.data.encoding))
      return Fail(ErrorCode::kUnimplemented, "{}: dtype={} (supported: F32, BF16, F16)", Doing(index, tensor),
                  Shown(tensor.dtype));
    values.data.scales =
        BlockScales{tensor.data.encoding, tensor.data.file, tensor.data.offset, block->first, block->second};
    drop[i] = true;
  }
  Drop(drop, index.tensors);
  return {};
}

// The matrices of all experts, as gpt-oss writes them, become one a expert: `name` or, where gate and up are
// interleaved row by row, two.
void SplitExperts(const StoredTensor& blocks, const StoredTensor& scales, std::string_view prefix,
                  std::vector<std::pair<std::string, RowOrder>> parts, std::vector<StoredTensor>& out) {
  const std::int64_t experts = blocks.shape[0], rows = blocks.shape[1];
  const std::int64_t k = blocks.shape[2] * kMxBlock;
  const std::uint64_t expert_bytes = static_cast<std::uint64_t>(rows * k / 2);
  const std::uint64_t scale_bytes = static_cast<std::uint64_t>(rows * blocks.shape[2]);
  for (std::int64_t expert = 0; expert < experts; ++expert) {
    for (const auto& [name, order] : parts) {
      StoredTensor tensor;
      tensor.name = fmt::format("{}{}.{}.weight", prefix, expert, name);
      tensor.dtype = "mxfp4";
      tensor.shape = {rows / static_cast<std::int64_t>(parts.size()), k};
      tensor.known = true;
      tensor.data = {Encoding::kF4E2M1, blocks.data.file,
                     blocks.data.offset + static_cast<std::uint64_t>(expert) * expert_bytes,
                     expert_bytes / parts.size(), order};
      tensor.data.scales =
          BlockScales{Encoding::kE8M0, scales.data.file,
                      scales.data.offset + static_cast<std::uint64_t>(expert) * scale_bytes, 1, kMxBlock};
      out.push_back(std::move(tensor));
    }
  }
}

Status CheckMxfp4(const TensorIndex& index, const StoredTensor& blocks, const StoredTensor& scales) {
  if (blocks.dtype != "U8" || blocks.shape.size() != 4 || blocks.shape[3] != kMxBlockBytes)
    return Fail(ErrorCode::kInvalidArgument, "{}: {} of shape {} (expected U8 [experts, n, k / 32, {}])",
                Doing(index, blocks), blocks.dtype, Shape(blocks.shape), kMxBlockBytes);
  if (blocks.shape[0] > kMaxExperts || blocks.data.bytes == 0)
    return Fail(ErrorCode::kInvalidArgument, "{}: shape={} (expected some values, and experts <= {})",
                Doing(index, blocks), Shape(blocks.shape), kMaxExperts);
  const std::vector<std::int64_t> expected(blocks.shape.begin(), blocks.shape.end() - 1);
  if (scales.dtype != "U8" || scales.shape != expected)
    return Fail(ErrorCode::kInvalidArgument, "{}: {} of shape {} (expected U8 {})", Doing(index, scales),
                scales.dtype, Shape(scales.shape), Shape(expected));
  return {};
}

Status JoinMxfp4(TensorIndex& index) {
  const ByName names = Names(index);
  std::vector<bool> drop(index.tensors.size(), false);
  std::vector<StoredTensor> made;
  for (std::size_t i = 0; i < index.tensors.size(); ++i) {
    const StoredTensor& tensor = index.tensors[i];
    const bool is_blocks = tensor.name.ends_with(kBlocks);
    if (!is_blocks && !tensor.name.ends_with(kScales)) continue;
    const std::string base = tensor.name.substr(0, tensor.name.size() - kBlocks.size());
    const std::string other = base + std::string(is_blocks ? kScales : kBlocks);
    const auto at = names.find(other);
    if (at == names.end())
      return Fail(ErrorCode::kInvalidArgument, "{}: there is no {}; fetch the checkpoint again",
                  Doing(index, tensor), Shown(other));
    drop[i] = true;
    if (!is_blocks) continue;
    const StoredTensor& scales = index.tensors[at->second];
    EM_RETURN_IF_ERROR(CheckMxfp4(index, tensor, scales));
    const std::string prefix = base.substr(0, base.rfind('.') + 1);
    const std::string_view part = std::string_view(base).substr(prefix.size());
    if (part == "gate_up_proj" && tensor.shape[1] % 2 == 0) {
      SplitExperts(tensor, scales, prefix,
                   {{"gate_proj", {.first = 0, .step = 2}}, {"up_proj", {.first = 1, .step = 2}}}, made);
    } else if (part == "down_proj") {
      SplitExperts(tensor, scales, prefix, {{"down_proj", {}}}, made);
    } else {
      return Fail(ErrorCode::kUnimplemented,
                  "{}: shape={} (supported in MXFP4: gate_up_proj of an even number of rows, down_proj)",
                  Doing(index, tensor), Shape(tensor.shape));
    }
  }
  Drop(drop, index.tensors);
  return AddTensors(std::move(made), index);
}

// llm-compressor's: groups of modules with the form of their weights. Of FP8 with one scale a tensor or a
// row.
Expected<Quantization> ReadCompressed(const ConfigReader& reader) {
  const auto refuse = [](std::string_view key, const Json& found) {
    return Fail(
        ErrorCode::kUnimplemented,
        "quantization_config.{}={} (supported: weights of type float in 8 bits, strategy tensor or channel); "
        "use the bf16 checkpoint or a .gguf",
        key, Shown(found));
  };
  const Json* groups = reader.Find("config_groups");
  if (groups == nullptr || !groups->is_object() || groups->empty())
    return refuse("config_groups", groups != nullptr ? *groups : Json(nullptr));
  for (const auto& [name, group] : groups->items()) {
    const Json* weights = group.is_object() ? ConfigReader(group).Find("weights") : nullptr;
    if (weights == nullptr || !weights->is_object()) return refuse("config_groups." + name, group);
    const ConfigReader of(*weights);
    const Json *bits = of.Find("num_bits"), *type = of.Find("type"), *strategy = of.Find("strategy");
    if (bits == nullptr || *bits != 8 || type == nullptr || *type != "float" || strategy == nullptr ||
        (*strategy != "tensor" && *strategy != "channel"))
      return refuse(fmt::format("config_groups.{}.weights", name), *weights);
  }
  Quantization out;
  out.method = Quantization::Method::kFp8Whole;
  return out;
}

}  // namespace

Expected<Quantization> ReadQuantization(const Json& config) {
  EM_RETURN_IF_ERROR(IsObject(config));
  Quantization out;
  const Json* json = ConfigReader(config).Find("quantization_config");
  if (json == nullptr) return out;
  const auto within = [](Error error) { return Within("quantization_config", std::move(error)); };
  if (auto status = IsObject(*json); !status) return within(std::move(status.error()));
  const ConfigReader reader(*json);
  const Json* method = reader.Find("quant_method");
  if (method != nullptr && *method == "mxfp4") {
    out.method = Quantization::Method::kMxfp4;
    return out;
  }
  if (method != nullptr && *method == "compressed-tensors") return ReadCompressed(reader);
  if (method == nullptr || *method != "fp8")
    return Fail(ErrorCode::kUnimplemented,
                "quantization_config.quant_method={} (supported: \"fp8\", \"compressed-tensors\" of FP8, "
                "\"mxfp4\"); use "
                "the bf16 checkpoint or a .gguf",
                method != nullptr ? Shown(*method) : "null");
  out.method = Quantization::Method::kFp8;
  if (auto status = reader.Only("fmt", "e4m3"); !status) return within(std::move(status.error()));
  if (reader.Find("weight_block_size") == nullptr) {
    out.method = Quantization::Method::kFp8Whole;
    return out;
  }
  auto block = reader.Ints("weight_block_size", 1, 1 << 16);
  if (!block) return within(std::move(block.error()));
  if (block->size() != 2)
    return Fail(
        ErrorCode::kUnimplemented,
        "quantization_config.weight_block_size={} (supported: rows and columns of a block, as in [128, 128])",
        Shown(*reader.Find("weight_block_size")));
  out.block_rows = (*block)[0];
  out.block_columns = (*block)[1];
  return out;
}

Status ResolveQuantized(const Quantization& quantization, TensorIndex& index) {
  switch (quantization.method) {
    case Quantization::Method::kFp8:
    case Quantization::Method::kFp8Whole:
      return JoinFp8(quantization, index);
    case Quantization::Method::kMxfp4:
      return JoinMxfp4(index);
    case Quantization::Method::kNone:
      break;
  }
  for (const StoredTensor& tensor : index.tensors)
    if (tensor.dtype == "F8_E4M3")
      return Fail(ErrorCode::kInvalidArgument,
                  "{}: dtype=F8_E4M3, but config.json has no quantization_config", Doing(index, tensor));
  return {};
}

}  // namespace elasticmoe::model
