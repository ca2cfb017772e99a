#include "model/quantization.h"

#include <optional>

#include "model/families/decoder.h"
#include "model/quantization_join.h"

namespace elasticmoe::model {
namespace {

constexpr std::string_view kScaleInv = "_scale_inv";
constexpr std::string_view kScale = "_scale";
constexpr std::string_view kBlocks = "_blocks";
constexpr std::string_view kScales = "_scales";
constexpr std::int64_t kMxBlock = 32;       // values that share a scale
constexpr std::int64_t kMxBlockBytes = 16;  // two values a byte

// The blocks of the scales that belong to `values`, in a tensor of that shape; nullopt where it has another.
std::optional<std::pair<std::uint32_t, std::uint32_t>> BlockOf(const Quantization& quantization,
                                                               const std::vector<std::int64_t>& values,
                                                               const std::vector<std::int64_t>& scales) {
  const auto rows = static_cast<std::uint32_t>(values[0]), columns = static_cast<std::uint32_t>(values[1]);
  if (quantization.method != Quantization::Method::kFp8Whole && quantization.block_rows > 0) {
    const std::vector<std::int64_t> expected = {
        (values[0] + quantization.block_rows - 1) / quantization.block_rows,
        (values[1] + quantization.block_columns - 1) / quantization.block_columns};
    if (scales == expected)
      return std::pair(static_cast<std::uint32_t>(quantization.block_rows),
                       static_cast<std::uint32_t>(quantization.block_columns));
    if (quantization.method == Quantization::Method::kFp8) return std::nullopt;
  }
  std::int64_t count = 1;
  for (const std::int64_t size : scales) count *= size;
  if (scales.size() <= 2 && count == 1) return std::pair(rows, columns);
  if (!scales.empty() && scales[0] == values[0] && count == values[0]) return std::pair(1U, columns);
  return std::nullopt;
}

bool IsActivationScale(std::string_view name) {
  for (const char* ending : {".input_scale", ".input_zero_point", ".output_scale", ".k_scale", ".v_scale"})
    if (name.ends_with(ending)) return true;
  return false;
}

Status JoinFp8(const Quantization& quantization, TensorIndex& index) {
  const bool blocks = quantization.method == Quantization::Method::kFp8;
  const std::string_view ending = blocks ? kScaleInv : kScale;
  TensorJoin join(index);
  for (std::size_t i = 0; i < join.Size(); ++i) {
    const StoredTensor& tensor = join.At(i);
    if (tensor.dtype == "F8_E4M3" && join.Find(tensor.name + std::string(ending)) == nullptr)
      return Fail(ErrorCode::kInvalidArgument, "{}: dtype=F8_E4M3 without {}{}; fetch the checkpoint again",
                  Doing(index, tensor), tensor.name, ending);
    if (!blocks && IsActivationScale(tensor.name)) {
      join.Drop(tensor);
      continue;
    }
    if (!tensor.name.ends_with(ending)) continue;
    const std::string base = tensor.name.substr(0, tensor.name.size() - ending.size());
    StoredTensor* values = join.Find(base);
    if (values == nullptr)
      return Fail(ErrorCode::kInvalidArgument, "{}: there is no {}; fetch the checkpoint again",
                  Doing(index, tensor), Shown(base));
    if (values->dtype != "F8_E4M3" || values->shape.size() != 2)
      return Fail(ErrorCode::kInvalidArgument, "{}: {} is {} {} (expected F8_E4M3 of two dimensions)",
                  Doing(index, tensor), base, values->dtype, ShownShape(values->shape));
    const auto block = BlockOf(quantization, values->shape, tensor.shape);
    if (!block && !blocks && quantization.block_rows == 0)
      return Fail(ErrorCode::kInvalidArgument, "{}: shape={} (expected one value, or one for each row of {})",
                  Doing(index, tensor), ShownShape(tensor.shape), ShownShape(values->shape));
    if (!block)
      return Fail(ErrorCode::kInvalidArgument,
                  "{}: shape={} (expected one for each block of {} x {} of {}, config.json's {})",
                  Doing(index, tensor), ShownShape(tensor.shape), quantization.block_rows,
                  quantization.block_columns, ShownShape(values->shape),
                  blocks ? "weight_block_size" : "block_structure");
    if (!tensor.known || !PlainType(tensor.data.encoding))
      return Fail(ErrorCode::kUnimplemented, "{}: dtype={} (supported: F32, BF16, F16)", Doing(index, tensor),
                  Shown(tensor.dtype));
    values->data.scales =
        BlockScales{tensor.data.encoding, tensor.data.file, tensor.data.offset, block->first, block->second};
    join.Drop(tensor);
  }
  return join.Finish({});
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
                Doing(index, blocks), blocks.dtype, ShownShape(blocks.shape), kMxBlockBytes);
  if (blocks.shape[0] > kMaxExperts || blocks.data.bytes == 0)
    return Fail(ErrorCode::kInvalidArgument, "{}: shape={} (expected some values, and experts <= {})",
                Doing(index, blocks), ShownShape(blocks.shape), kMaxExperts);
  const std::vector<std::int64_t> expected(blocks.shape.begin(), blocks.shape.end() - 1);
  if (scales.dtype != "U8" || scales.shape != expected)
    return Fail(ErrorCode::kInvalidArgument, "{}: {} of shape {} (expected U8 {})", Doing(index, scales),
                scales.dtype, ShownShape(scales.shape), ShownShape(expected));
  return {};
}

Status JoinMxfp4(TensorIndex& index) {
  TensorJoin join(index);
  std::vector<StoredTensor> made;
  for (std::size_t i = 0; i < join.Size(); ++i) {
    const StoredTensor& tensor = join.At(i);
    const bool is_blocks = tensor.name.ends_with(kBlocks);
    if (!is_blocks && !tensor.name.ends_with(kScales)) continue;
    const std::string base = tensor.name.substr(0, tensor.name.size() - kBlocks.size());
    const std::string other = base + std::string(is_blocks ? kScales : kBlocks);
    const StoredTensor* half = join.Find(other);
    if (half == nullptr)
      return Fail(ErrorCode::kInvalidArgument, "{}: there is no {}; fetch the checkpoint again",
                  Doing(index, tensor), Shown(other));
    join.Drop(tensor);
    if (!is_blocks) continue;
    const StoredTensor& scales = *half;
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
                  Doing(index, tensor), ShownShape(tensor.shape));
    }
  }
  return join.Finish(std::move(made));
}

}  // namespace

Status ResolveQuantized(const Quantization& quantization, TensorIndex& index) {
  switch (quantization.method) {
    case Quantization::Method::kFp8:
    case Quantization::Method::kFp8Whole:
      return JoinFp8(quantization, index);
    case Quantization::Method::kMxfp4:
      return JoinMxfp4(index);
    case Quantization::Method::kGptq:
    case Quantization::Method::kAwq:
      return JoinWords(quantization, index);
    case Quantization::Method::kCompressed:
      EM_RETURN_IF_ERROR(JoinCompressed(quantization, index));
      return JoinFp8(quantization, index);
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
