// Weights of 4 or 8 bits as whole numbers: the tensors of GPTQ, AWQ and compressed-tensors.
#include <optional>

#include "model/quantization_join.h"

namespace elasticmoe::model {
namespace {

constexpr std::string_view kQweight = ".qweight";
constexpr std::string_view kPacked = ".weight_packed";
constexpr std::string_view kWeight = ".weight";

// What belongs to the numbers of one matrix.
struct Parts {
  TensorJoin& join;
  const TensorIndex& index;
  const StoredTensor& numbers;
  std::string prefix;  // "P."

  StoredTensor* Find(std::string_view name) const { return join.Find(prefix + std::string(name)); }

  Expected<StoredTensor*> Get(std::string_view name) const {
    if (StoredTensor* tensor = Find(name); tensor != nullptr) return tensor;
    return Fail(ErrorCode::kInvalidArgument, "{}: there is no {}; fetch the checkpoint again",
                Doing(index, numbers), Shown(prefix + std::string(name)));
  }
};

Status Expect(const TensorIndex& index, const StoredTensor& tensor, std::string_view dtype,
              const std::vector<std::int64_t>& shape, std::string_view why) {
  if (tensor.dtype == dtype && tensor.shape == shape) return {};
  return Fail(ErrorCode::kInvalidArgument, "{}: {} of shape {} (expected {} {} {})", Doing(index, tensor),
              Shown(tensor.dtype), ShownShape(tensor.shape), dtype, ShownShape(shape), why);
}

Status ExpectFactors(const TensorIndex& index, const StoredTensor& tensor) {
  if (tensor.known && PlainType(tensor.data.encoding)) return {};
  return Fail(ErrorCode::kUnimplemented, "{}: dtype={} (supported: F32, BF16, F16)", Doing(index, tensor),
              Shown(tensor.dtype));
}

std::int64_t Groups(std::int64_t k, int group) {
  return group == 0 ? 1 : (k + group - 1) / group;
}

// `order` names the group of each of the `k` inputs (act order).
Status JoinOrder(const Parts& parts, StoredTensor& order, const StoredTensor& scales, std::int64_t k,
                 std::int64_t groups, BlockScales& block) {
  EM_RETURN_IF_ERROR(Expect(parts.index, order, "I32", {k}, "one for each input"));
  if (order.data.file != scales.data.file)
    return Fail(ErrorCode::kUnimplemented, "{}: it is in another file than {} (supported: the same)",
                Doing(parts.index, order), scales.name);
  block.blocks = static_cast<std::uint32_t>(groups);
  block.block_of_column = order.data.offset;
  parts.join.Drop(order);
  return {};
}

Expected<StoredTensor> JoinQweight(const Quantization& quantization, const Parts& parts) {
  const bool gptq = quantization.method == Quantization::Method::kGptq;
  const StoredTensor& words = parts.numbers;
  const std::int64_t per = 32 / quantization.bits;
  if (words.dtype != "I32" || words.shape.size() != 2 || words.data.bytes == 0)
    return Fail(ErrorCode::kInvalidArgument, "{}: {} of shape {} (expected I32 of two dimensions)",
                Doing(parts.index, words), Shown(words.dtype), ShownShape(words.shape));
  const std::int64_t k = gptq ? words.shape[0] * per : words.shape[0];
  const std::int64_t n = gptq ? words.shape[1] : words.shape[1] * per;
  const std::int64_t groups = Groups(k, quantization.group);
  EM_ASSIGN_OR_RETURN(StoredTensor * zeros, parts.Get("qzeros"));
  EM_ASSIGN_OR_RETURN(StoredTensor * scales, parts.Get("scales"));
  const std::string why = fmt::format("for {} inputs with group_size={}, {} bits", k,
                                      quantization.group > 0 ? quantization.group : -1, quantization.bits);
  EM_RETURN_IF_ERROR(Expect(parts.index, *zeros, "I32", {groups, (n + per - 1) / per}, why));
  EM_RETURN_IF_ERROR(Expect(parts.index, *scales, scales->dtype, {groups, n}, why));
  EM_RETURN_IF_ERROR(ExpectFactors(parts.index, *scales));
  StoredTensor out = words;
  out.name = parts.prefix + "weight";
  out.dtype = gptq ? "gptq" : "awq";
  out.shape = {n, k};
  out.known = true;
  out.data.encoding = quantization.bits == 4 ? Encoding::kU4 : Encoding::kU8;
  out.data.order = {.columns = static_cast<std::uint32_t>(n),
                    .words = gptq ? RowOrder::Words::kDown : RowOrder::Words::kAwq};
  BlockScales& block = out.data.scales.emplace();
  block.encoding = scales->data.encoding;
  block.file = scales->data.file;
  block.offset = scales->data.offset;
  block.block_columns = static_cast<std::uint32_t>(quantization.group > 0 ? quantization.group : k);
  block.transposed_rows = static_cast<std::uint32_t>(n);
  block.zeros = {.layout = gptq ? ZeroPoints::Layout::kAcross : ZeroPoints::Layout::kAwq,
                 .bits = quantization.bits,
                 .add = gptq && quantization.stored_less_one ? 1 : 0,
                 .file = zeros->data.file,
                 .offset = zeros->data.offset};
  if (StoredTensor* order = gptq ? parts.Find("g_idx") : nullptr; order != nullptr)
    EM_RETURN_IF_ERROR(JoinOrder(parts, *order, *scales, k, groups, block));
  parts.join.Drop(*zeros);
  parts.join.Drop(*scales);
  parts.join.Drop(words);
  return out;
}

// Sets the scales of `out`, whose numbers have `bits` bits and stand for themselves less `offset`.
Status JoinScales(const Parts& parts, int bits, int offset, StoredTensor& out) {
  EM_ASSIGN_OR_RETURN(StoredTensor * scales, parts.Get("weight_scale"));
  const std::int64_t n = out.shape[0], k = out.shape[1];
  const std::vector<std::int64_t>& shape = scales->shape;
  std::int64_t count = 1;
  for (const std::int64_t size : shape) count *= size;
  const bool one = shape.size() <= 2 && count == 1;
  const bool rows = !shape.empty() && shape.size() <= 2 && shape[0] == n;
  const std::int64_t groups = rows && shape.size() == 2 ? shape[1] : 1;
  if (!(one || rows) || groups < 1 || groups > k || k % groups != 0)
    return Fail(ErrorCode::kInvalidArgument,
                "{}: shape={} (expected one value, or [{}, groups] with a divisor of {} as groups)",
                Doing(parts.index, *scales), ShownShape(shape), n, k);
  EM_RETURN_IF_ERROR(ExpectFactors(parts.index, *scales));
  BlockScales& block = out.data.scales.emplace();
  block.encoding = scales->data.encoding;
  block.file = scales->data.file;
  block.offset = scales->data.offset;
  block.block_rows = rows ? 1 : static_cast<std::uint32_t>(n);
  block.block_columns = static_cast<std::uint32_t>(k / groups);
  block.zero = static_cast<float>(offset);
  parts.join.Drop(*scales);
  if (StoredTensor* zeros = parts.Find("weight_zero_point"); zeros != nullptr) {
    const bool words = zeros->dtype == "I32" && offset > 0;
    const std::int64_t per = 32 / bits;
    if (words)
      EM_RETURN_IF_ERROR(
          Expect(parts.index, *zeros, "I32", {(n + per - 1) / per, groups}, "one for each scale"));
    else
      EM_RETURN_IF_ERROR(Expect(parts.index, *zeros, "I8", shape, "one for each scale"));
    if (!rows)
      return Fail(ErrorCode::kUnimplemented, "{}: shape={} (supported: one for each row or group)",
                  Doing(parts.index, *zeros), ShownShape(zeros->shape));
    block.zeros = {.layout = words ? ZeroPoints::Layout::kDown : ZeroPoints::Layout::kBytes,
                   .bits = words ? bits : 8,
                   .add = words ? 0 : offset,
                   .file = zeros->data.file,
                   .offset = zeros->data.offset};
    parts.join.Drop(*zeros);
  }
  if (StoredTensor* order = parts.Find("weight_g_idx"); order != nullptr)
    EM_RETURN_IF_ERROR(JoinOrder(parts, *order, *scales, k, groups, block));
  return {};
}

Expected<StoredTensor> JoinPacked(int bits, const Parts& parts) {
  const StoredTensor& words = parts.numbers;
  if (bits == 0)
    return Fail(ErrorCode::kInvalidArgument,
                "{}: config.json has no group of weights of type int that says so",
                Doing(parts.index, words));
  if (words.dtype != "I32" || words.shape.size() != 2 || words.data.bytes == 0)
    return Fail(ErrorCode::kInvalidArgument, "{}: {} of shape {} (expected I32 of two dimensions)",
                Doing(parts.index, words), Shown(words.dtype), ShownShape(words.shape));
  StoredTensor out = words;
  out.name = parts.prefix + "weight";
  out.dtype = fmt::format("int{}", bits);
  out.shape[1] *= 32 / bits;
  out.known = true;
  out.data.encoding = bits == 4 ? Encoding::kU4 : Encoding::kU8;
  EM_RETURN_IF_ERROR(JoinScales(parts, bits, 1 << (bits - 1), out));
  if (StoredTensor* shape = parts.Find("weight_shape"); shape != nullptr) parts.join.Drop(*shape);
  parts.join.Drop(words);
  return out;
}

}  // namespace

Status JoinWords(const Quantization& quantization, TensorIndex& index) {
  TensorJoin join(index);
  std::vector<StoredTensor> made;
  for (std::size_t i = 0; i < join.Size(); ++i) {
    const StoredTensor& tensor = join.At(i);
    const std::string_view name = tensor.name;
    if (!name.ends_with(kQweight)) continue;
    const Parts parts{join, index, tensor, std::string(name.substr(0, name.size() - kQweight.size() + 1))};
    EM_ASSIGN_OR_RETURN(StoredTensor whole, JoinQweight(quantization, parts));
    made.push_back(std::move(whole));
  }
  return join.Finish(std::move(made));
}

Status JoinCompressed(const Quantization& quantization, TensorIndex& index) {
  TensorJoin join(index);
  std::vector<StoredTensor> made;
  for (std::size_t i = 0; i < join.Size(); ++i) {
    StoredTensor& tensor = join.At(i);
    const std::string_view name = tensor.name;
    if (name.ends_with(kPacked)) {
      const Parts parts{join, index, tensor, std::string(name.substr(0, name.size() - kPacked.size() + 1))};
      EM_ASSIGN_OR_RETURN(StoredTensor whole, JoinPacked(quantization.bits, parts));
      made.push_back(std::move(whole));
    } else if (name.ends_with(kWeight) && tensor.dtype == "I8" && tensor.shape.size() == 2 &&
               tensor.data.bytes > 0) {
      const Parts parts{join, index, tensor, std::string(name.substr(0, name.size() - kWeight.size() + 1))};
      EM_RETURN_IF_ERROR(JoinScales(parts, 8, 0, tensor));
      tensor.data.encoding = Encoding::kI8;
      tensor.known = true;
    }
  }
  return join.Finish(std::move(made));
}

}  // namespace elasticmoe::model
